"""Files of mask proposals, and how they follow their image."""

import os
import zipfile

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from mnc_d2.data import MNCDatasetMapper, build_mapper, register_coco_dataset
from mnc_d2.experiments import MaskProposalMapper, mask_proposals_path, save_mask_proposals
from mnc_d2.experiments.mask_proposals import load_mask_proposals, transform_mask_proposals

BOXES = np.array([[10, 20, 30, 50], [0, 0, 8, 8], [40, 5, 60, 25]], np.float32)
SCORES = np.array([0.2, 0.9, 0.5], np.float32)


def make_masks(dtype=np.uint8):
    masks = np.random.default_rng(0).integers(0, 256, (3, 7, 7))
    return masks.astype(np.uint8) if dtype == np.uint8 else masks > 127


@pytest.fixture
def path(tmp_path):
    return tmp_path / "proposals.npz"


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_what_is_saved_is_loaded_best_first(path, dtype):
    save_mask_proposals(path, BOXES, make_masks(dtype), SCORES)
    proposals = load_mask_proposals(path)
    order = [1, 2, 0]
    assert proposals.proposal_boxes.tensor.tolist() == BOXES[order].tolist()
    assert proposals.objectness_logits.tolist() == SCORES[order].tolist()
    expected = make_masks(dtype)[order].astype(np.float32) / (255 if dtype == np.uint8 else 1)
    np.testing.assert_allclose(proposals.proposal_masks.numpy(), expected, rtol=1e-6)
    assert load_mask_proposals(path, limit=2).objectness_logits.tolist() == SCORES[[1, 2]].tolist()
    assert os.listdir(path.parent) == [path.name]


def test_scores_of_any_dtype_are_in_the_same_order(path):
    save_mask_proposals(path, BOXES, make_masks(), np.array([0, 200, 100], np.uint8))
    assert load_mask_proposals(path).objectness_logits.tolist() == [200, 100, 0]
    np.savez(path, boxes=BOXES, masks=make_masks(), scores=np.array([0, 200, 100], np.uint8))
    assert load_mask_proposals(path).objectness_logits.tolist() == [200, 100, 0]


def test_no_proposals(path):
    save_mask_proposals(path, np.zeros((0, 4)), np.zeros((0, 7, 7), bool), np.zeros(0))
    proposals = load_mask_proposals(path)
    assert len(proposals) == 0 and proposals.proposal_masks.shape == (0, 7, 7)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": BOXES[:2]}, r"expected boxes \(P, 4\)"),
        ({"scores": SCORES[:2]}, r"expected boxes \(P, 4\)"),
        ({"masks": make_masks()[:, :5]}, "must be square"),
        ({"masks": make_masks().astype(np.float32)}, "bool or uint8.*float32"),
        ({"boxes": BOXES * np.nan}, "must be finite"),
        ({"boxes": BOXES[:, [2, 1, 0, 3]]}, r"box 0 has no area: \[30.0, 20.0, 10.0, 50.0\]"),
    ],
    ids=["fewer boxes", "fewer scores", "not square", "float", "nan", "no area"],
)
def test_bad_arrays_are_errors_that_name_the_file(path, change, message):
    arrays = {"boxes": BOXES, "masks": make_masks(), "scores": SCORES, **change}
    with pytest.raises(ValueError, match=f"proposals.npz.*{message}"):
        save_mask_proposals(path, **arrays)
    assert not path.exists()
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"proposals.npz.*{message}"):
        load_mask_proposals(path)


def test_a_file_that_is_missing_or_of_another_kind_is_an_error_that_names_it(path):
    with pytest.raises(FileNotFoundError, match="proposals.npz do not exist.*DATASETS.MASK_PROPOSALS"):
        load_mask_proposals(path)
    save_mask_proposals(path, BOXES, make_masks(), SCORES)
    whole = path.read_bytes()
    for content in (b"nothing", b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="proposals.npz cannot be read"):
            load_mask_proposals(path)
    np.savez(path, boxes=np.array([{}], dtype=object), masks=make_masks(), scores=SCORES)
    with pytest.raises(ValueError, match="proposals.npz cannot be read.*allow_pickle"):
        load_mask_proposals(path)


def write_header(path, shape, dtype="|u1", values=b""):
    """A file whose masks have this header and these bytes."""
    save_mask_proposals(path, BOXES, make_masks(), SCORES)
    np.savez(path, boxes=BOXES, scores=SCORES)
    with zipfile.ZipFile(path, "a") as archive, archive.open("masks.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.write(values)


def test_a_file_that_claims_more_than_it_has_takes_no_memory(path):
    write_header(path, (3, 2**20, 2**20))
    with pytest.raises(ValueError, match="proposals.npz cannot be read: masks.npy claims 3298534883328 bytes, has 0"):
        load_mask_proposals(path)
    # 2 ** 64 bytes: in 64 bits the product is 0.
    write_header(path, (2**32, 2**32))
    with pytest.raises(ValueError, match="claims 18446744073709551616 bytes, has 0"):
        load_mask_proposals(path)


def test_an_array_in_place_of_an_archive_is_named(path):
    with open(path, "wb") as file:
        np.save(file, BOXES)
    with pytest.raises(ValueError, match="proposals.npz cannot be read"):
        load_mask_proposals(path)


def test_the_files_of_all_images_are_checked_before(small_config, coco_dataset, clean_catalogs, tmp_path):
    cfg = small_config(**{"DATASETS.MASK_PROPOSALS": str(tmp_path)})
    register_coco_dataset("drawn", *coco_dataset)
    for name in ("1.npz", "2.npz"):
        save_mask_proposals(tmp_path / name, BOXES, make_masks(), SCORES)
    MaskProposalMapper.check_files(cfg, ["drawn"])
    np.savez(tmp_path / "2.npz", boxes=BOXES[:2], masks=make_masks(), scores=SCORES)
    with pytest.raises(ValueError, match=r"2\.npz: expected boxes"):
        MaskProposalMapper.check_files(cfg, ["drawn"])
    (tmp_path / "1.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.npz do not exist"):
        MaskProposalMapper.check_files(cfg, ["drawn"])


def paste(proposals, size):
    """The masks in the image, where boxes are on whole pixels and m divides their sides: (P, H, W)."""
    image = np.zeros((len(proposals), *size))
    for canvas, box, mask in zip(image, proposals.proposal_boxes.tensor.int().tolist(), proposals.proposal_masks):
        x1, y1, x2, y2 = box
        canvas[y1:y2, x1:x2] = np.kron(mask.numpy(), np.ones(((y2 - y1) // len(mask), (x2 - x1) // len(mask))))
    return image


@pytest.mark.parametrize("flips", [[], ["x"], ["y"], ["x", "y"], ["x", "x"]], ids=str)
@pytest.mark.parametrize("scale", [1, 2])
def test_masks_follow_flips_and_resizing_as_the_image_does(path, flips, scale):
    boxes = np.array([[7, 14, 21, 35], [40, 0, 47, 14]], np.float32)
    save_mask_proposals(path, boxes, make_masks()[:2], SCORES[:2])
    proposals = load_mask_proposals(path)
    height, width = 40, 60
    image = paste(proposals, (height, width))
    transforms = T.TransformList(
        [T.ResizeTransform(height, width, scale * height, scale * width)]
        + [T.HFlipTransform(scale * width) if flip == "x" else T.VFlipTransform(scale * height) for flip in flips]
    )
    moved = transform_mask_proposals(proposals, transforms, (scale * height, scale * width))
    assert moved.image_size == (scale * height, scale * width)
    expected = np.kron(image, np.ones((1, scale, scale)))
    for flip in flips:
        expected = expected[:, :, ::-1] if flip == "x" else expected[:, ::-1]
    np.testing.assert_array_equal(paste(moved, moved.image_size), expected)


def test_crops_keep_whole_boxes_and_drop_those_outside(path):
    save_mask_proposals(path, BOXES, make_masks(), SCORES)
    proposals = load_mask_proposals(path)
    moved = transform_mask_proposals(proposals, T.TransformList([T.CropTransform(20, 10, 40, 30)]), (30, 40))
    # Best first: the second box of the file is outside, the third and first are cut.
    assert moved.proposal_boxes.tensor.tolist() == [[20, -5, 40, 15], [-10, 10, 10, 40]]
    assert torch.equal(moved.proposal_masks, proposals.proposal_masks[1:])


def test_transforms_that_masks_cannot_follow_are_errors(path):
    save_mask_proposals(path, BOXES, make_masks(), SCORES)
    rotation = T.TransformList([T.RotationTransform(40, 60, 30)])
    with pytest.raises(ValueError, match="cannot follow RotationTransform"):
        transform_mask_proposals(load_mask_proposals(path), rotation, (40, 60))


@pytest.mark.parametrize("is_train", [True, False])
def test_the_mapper_reads_the_proposals_of_each_image(small_config, coco_dataset, tmp_path, is_train):
    _, images = coco_dataset
    file_name = str(images / "1.png")
    path = mask_proposals_path(tmp_path, file_name)
    assert path == tmp_path / "1.npz"
    save_mask_proposals(path, BOXES, make_masks(), SCORES)
    cfg = small_config(
        **{
            "INPUT.DATASET_MAPPER_NAME": "MaskProposalMapper",
            "DATASETS.MASK_PROPOSALS": str(tmp_path),
            "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 1,
            "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": 2,
            "INPUT.CROP.ENABLED": False,
            "INPUT.MIN_SIZE_TRAIN": (192,),
            "INPUT.MIN_SIZE_TEST": 192,
            "INPUT.RANDOM_FLIP": "none",
        }
    )
    record = {"file_name": file_name, "height": 96, "width": 96, "image_id": 1, "annotations": []}
    proposals = build_mapper(cfg, is_train=is_train)(record)["proposals"]
    assert proposals.image_size == (192, 192)
    assert proposals.proposal_boxes.tensor.tolist() == (2 * BOXES[[1, 2]][: 1 if is_train else 2]).tolist()


def test_the_default_mapper_gives_none(small_config, coco_dataset):
    record = {"file_name": str(coco_dataset[1] / "1.png"), "height": 96, "width": 96, "image_id": 1, "annotations": []}
    assert "proposals" not in MNCDatasetMapper(small_config(), is_train=True)(record)
