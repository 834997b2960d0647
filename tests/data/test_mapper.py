"""The mapper: masks of any format become bitmasks, and instances without one survive."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BitMasks, BoxMode
from PIL import Image

from mnc_d2.data import MNCDatasetMapper

H, W = 40, 60


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)).save(path)
    return path


def make_mapper(*augmentations, **kwargs):
    settings = {"is_train": True, "image_format": "BGR", "use_instance_mask": True, **kwargs}
    return MNCDatasetMapper(augmentations=list(augmentations), **settings)


def record(image_file, *annotations):
    return {"file_name": str(image_file), "height": H, "width": W, "image_id": 1, "annotations": list(annotations)}


def instance(x0, y0, x1, y1, kind, category_id=0, iscrowd=0):
    """A rectangle, with integer corners, as "polygon", "rle" or "box"."""
    anno = {"bbox": [x0, y0, x1 - x0, y1 - y0], "bbox_mode": BoxMode.XYWH_ABS}
    anno.update(category_id=category_id, iscrowd=iscrowd)
    if kind == "polygon":
        anno["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    elif kind == "rle":
        anno["segmentation"] = mask_util.encode(np.asfortranarray(rectangle(x0, y0, x1, y1), dtype=np.uint8))
    else:
        assert kind == "box"
    return anno


def rectangle(x0, y0, x1, y1, size=(H, W)):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_mask_of_each_format_becomes_the_same_bitmask(image_file, kind):
    data = make_mapper()(record(image_file, instance(5, 8, 25, 30, kind, category_id=3)))
    instances = data["instances"]
    assert data["image"].shape == (3, H, W) and data["image"].dtype == torch.uint8
    assert instances.gt_boxes.tensor.tolist() == [[5, 8, 25, 30]]
    assert instances.gt_classes.tolist() == [3]
    assert isinstance(instances.gt_masks, BitMasks)
    np.testing.assert_array_equal(instances.gt_masks.tensor[0].numpy(), rectangle(5, 8, 25, 30))
    assert instances.gt_has_mask.tolist() == [True]


@pytest.mark.parametrize("empty", [None, [], {}])
def test_box_only_instance_has_an_empty_mask_and_is_kept(image_file, empty):
    anno = instance(5, 8, 25, 30, "box")
    anno["segmentation"] = empty
    for annotation in (anno, instance(5, 8, 25, 30, "box")):
        instances = make_mapper()(record(image_file, annotation))["instances"]
        assert instances.gt_boxes.tensor.tolist() == [[5, 8, 25, 30]]
        assert instances.gt_has_mask.tolist() == [False]
        assert instances.gt_has_mask.dtype == torch.bool
        assert not instances.gt_masks.tensor.any()
        assert instances.gt_masks.tensor.shape == (1, H, W)


@pytest.mark.parametrize("order", [("box", "polygon", "rle"), ("rle", "box", "polygon"), ("polygon", "rle", "box")])
def test_mixed_annotations_keep_their_order(image_file, order):
    annos = [instance(2 + 15 * i, 3, 12 + 15 * i, 20, kind, category_id=i) for i, kind in enumerate(order)]
    instances = make_mapper()(record(image_file, *annos))["instances"]
    assert instances.gt_classes.tolist() == [0, 1, 2]
    assert instances.gt_has_mask.tolist() == [kind != "box" for kind in order]
    for i, kind in enumerate(order):
        expected = rectangle(2 + 15 * i, 3, 12 + 15 * i, 20) & (kind != "box")
        np.testing.assert_array_equal(instances.gt_masks.tensor[i].numpy(), expected)


def test_flip_moves_image_box_and_mask_together(image_file):
    annos = [instance(5, 8, 25, 30, "polygon"), instance(5, 8, 25, 30, "rle"), instance(5, 8, 25, 30, "box")]
    plain = make_mapper()(record(image_file, *annos))
    flipped = make_mapper(T.RandomFlip(prob=1.0))(record(image_file, *annos))
    assert torch.equal(flipped["image"], plain["image"].flip(2))
    assert torch.equal(flipped["instances"].gt_masks.tensor, plain["instances"].gt_masks.tensor.flip(2))
    assert flipped["instances"].gt_boxes.tensor.tolist() == [[W - 25, 8, W - 5, 30]] * 3
    assert flipped["instances"].gt_has_mask.tolist() == [True, True, False]


def test_resize_scales_everything(image_file):
    annos = [instance(5, 8, 25, 30, kind) for kind in ("polygon", "rle", "box")]
    instances = make_mapper(T.Resize((2 * H, 2 * W)))(record(image_file, *annos))["instances"]
    assert instances.image_size == (2 * H, 2 * W)
    assert instances.gt_boxes.tensor.tolist() == [[10, 16, 50, 60]] * 3
    for i in (0, 1):
        expected = rectangle(10, 16, 50, 60, (2 * H, 2 * W))
        np.testing.assert_array_equal(instances.gt_masks.tensor[i].numpy(), expected)


def triangle(kind):
    """(0, 0), (30, 0), (0, 30): cut at x = 15 its lower edge is at y = 15, its box's at 30."""
    anno = {"bbox": [0, 0, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    polygon = [[0, 0, 30, 0, 0, 30]]
    if kind == "polygon":
        anno["segmentation"] = polygon
    elif kind == "rle":
        anno["segmentation"] = mask_util.merge(mask_util.frPyObjects(polygon, H, W))
    return anno


def test_crop_recomputes_boxes_of_masks_only(image_file):
    crop = T.CropTransform(15, 0, 40, 40)
    mapper = make_mapper(crop, recompute_boxes=True)
    instances = mapper(record(image_file, *[triangle(kind) for kind in ("polygon", "rle", "box")]))["instances"]
    boxes = instances.gt_boxes.tensor
    for i in (0, 1):
        assert boxes[i, :2].tolist() == [0, 0] and boxes[i, 2:].sub(15).abs().max() <= 1
    assert boxes[2].tolist() == [0, 0, 15, 30]


def test_boxes_are_not_recomputed_without_crop(image_file):
    anno = instance(5, 8, 25, 30, "rle")
    anno["bbox"] = [4, 7, 22, 24]
    instances = make_mapper()(record(image_file, anno))["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[4, 7, 26, 31]]


@pytest.mark.parametrize("recompute_boxes", [True, False])
def test_what_the_crop_left_outside_is_dropped(image_file, recompute_boxes):
    annos = [instance(2, 2, 10, 10, kind, category_id=i) for i, kind in enumerate(("rle", "box"))]
    far = instance(2, 2, 50, 10, "rle", category_id=2)  # its box reaches into the crop, its mask does not
    far["segmentation"] = annos[0]["segmentation"]
    kept = instance(30, 5, 55, 30, "box", category_id=3)
    mapper = make_mapper(T.CropTransform(20, 0, 40, 40), recompute_boxes=recompute_boxes)
    instances = mapper(record(image_file, *annos, far, kept))["instances"]
    assert instances.gt_classes.tolist() == [3]
    assert instances.gt_has_mask.tolist() == [False]


def test_crowd_is_dropped(image_file):
    annos = [instance(5, 8, 25, 30, "rle", iscrowd=1), instance(1, 2, 8, 9, "rle", category_id=1)]
    instances = make_mapper()(record(image_file, *annos))["instances"]
    assert instances.gt_classes.tolist() == [1]


@pytest.mark.parametrize("recompute_boxes", [True, False])
@pytest.mark.parametrize("annos", [[], [instance(5, 8, 25, 30, "rle", iscrowd=1)]])
def test_image_without_instances_has_all_fields(image_file, annos, recompute_boxes):
    instances = make_mapper(recompute_boxes=recompute_boxes)(record(image_file, *annos))["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_masks", "gt_has_mask"}
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_masks.tensor.shape == (0, H, W)
    assert instances.gt_has_mask.dtype == torch.bool and instances.gt_classes.dtype == torch.int64


def test_record_is_not_changed(image_file):
    given = record(image_file, instance(5, 8, 25, 30, "polygon"), instance(5, 8, 25, 30, "box"))
    make_mapper(T.RandomFlip(prob=1.0))(given)
    assert given == record(image_file, instance(5, 8, 25, 30, "polygon"), instance(5, 8, 25, 30, "box"))


def test_inference_gives_no_instances(image_file):
    data = make_mapper(is_train=False)(record(image_file, instance(5, 8, 25, 30, "polygon")))
    assert "instances" not in data and "annotations" not in data
    assert (data["height"], data["width"]) == (H, W)


def test_from_config(image_file):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (H,)
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.SIZE = [1.0, 1.0]
    mapper = MNCDatasetMapper(cfg, is_train=True)
    assert mapper.is_train and mapper.recompute_boxes
    instances = mapper(record(image_file, instance(5, 8, 25, 30, "polygon")))["instances"]
    assert instances.gt_has_mask.tolist() == [True]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_the_short_side_of_a_thin_image_keeps_a_pixel(tmp_path, size, flip):
    """Flipped arrays with a side of one pixel have a negative stride that numpy takes for contiguous."""
    height, width = size
    Image.new("L", (width, height)).save(tmp_path / "thin.png")
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT, cfg.INPUT.RANDOM_FLIP = "bitmask", flip
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (600,), 1000
    mapper = MNCDatasetMapper(cfg, is_train=True)
    (flips,) = (x for x in mapper.augmentations.augs if isinstance(x, T.RandomFlip))
    flips.prob = 1.0
    whole = {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    whole["segmentation"] = mask_util.encode(np.ones(size, dtype=np.uint8, order="F"))
    data = mapper({"file_name": str(tmp_path / "thin.png"), "height": height, "width": width, "annotations": [whole]})
    expected = (600, 600) if size == (1, 1) else tuple(min(x, 1000) for x in size)
    assert data["image"].shape[1:] == expected
    assert data["instances"].gt_boxes.tensor.tolist() == [[0, 0, expected[1], expected[0]]]
    assert data["instances"].gt_masks.tensor.shape[1:] == expected and data["instances"].gt_masks.tensor.all()


def test_polygon_mask_format_is_refused_by_its_key():
    cfg = get_cfg()
    cfg.INPUT.MASK_FORMAT = "polygon"
    with pytest.raises(ValueError, match=r"INPUT\.MASK_FORMAT.*bitmask"):
        MNCDatasetMapper(cfg, is_train=True)


def test_unreadable_image_is_named(image_file):
    image_file.write_text("not an image")
    with pytest.raises(OSError, match=r"image\.png cannot be read"):
        make_mapper()(record(image_file))


def test_image_of_another_size_is_named(image_file):
    given = record(image_file)
    given["width"] = W + 1
    with pytest.raises(SizeMismatchError, match=r"image\.png"):
        make_mapper()(given)
