"""The conventions of the released network, each against a slow, obvious computation."""

import copy
import math

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, Instances
from modeling.caffe_reference import random_boxes, slow_decode, slow_iou
from PIL import Image
from torch import nn

from mnc_d2.data import build_test_resize, register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.experiments import CaffeMultitaskNetworkCascade
from mnc_d2.experiments.caffe import CaffeAnchorGenerator, CaffeMNCROIHeads, CaffeRPN, InclusiveBoxTransform
from mnc_d2.experiments.caffe.boxes import NetworkInputSize, clip_to_pixels, pixel_extents
from mnc_d2.experiments.caffe.pasting import paste_masks
from mnc_d2.experiments.caffe.voting import CaffeMaskFrame
from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import MNCOutputLayers, vote_masks

CONFIG = "PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage_caffe.yaml"

# ---- anchors


def make_anchors(stride=16):
    return CaffeAnchorGenerator(sizes=[[128, 256, 512]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[stride], offset=0.0)


def test_anchors_of_the_first_cell_are_py_faster_rcnns():
    assert list(make_anchors().cell_anchors)[0].tolist() == [
        [-84, -40, 99, 55],
        [-176, -88, 191, 103],
        [-360, -184, 375, 199],
        [-56, -56, 71, 71],
        [-120, -120, 135, 135],
        [-248, -248, 263, 263],
        [-36, -80, 51, 95],
        [-80, -168, 95, 183],
        [-168, -344, 183, 359],
    ]


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_anchors_are_rounded_cells_grown_around_their_centre(stride):
    expected = []
    for ratio in (0.5, 1.0, 2.0):
        width = round(math.sqrt(stride * stride / ratio))
        height = round(width * ratio)
        for size in (128, 256, 512):
            w, h, centre = width * size / stride, height * size / stride, (stride - 1) / 2
            # Inclusive corners: w pixels from the first to the last.
            expected.append([centre - (w - 1) / 2, centre - (h - 1) / 2, centre + (w - 1) / 2, centre + (h - 1) / 2])
    assert list(make_anchors(stride).cell_anchors)[0].tolist() == expected


def test_anchors_go_by_row_column_and_anchor():
    (anchors,) = make_anchors()([torch.zeros(1, 1, 2, 3)])
    first = list(make_anchors().cell_anchors)[0]
    expected = [anchor + 16 * torch.tensor([x, y, x, y]) for y in range(2) for x in range(3) for anchor in first]
    assert torch.equal(anchors.tensor, torch.stack(expected))


# ---- boxes


@pytest.mark.parametrize("classes", [1, 3])
def test_decoding(classes):
    boxes = random_boxes(6).double()
    deltas = torch.randn(6, 4 * classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = (10.0, 10.0, 5.0, 2.0)
    decoded = InclusiveBoxTransform(weights).apply_deltas(deltas, boxes)
    for i in range(6):
        for k in range(classes):
            delta = [d / w for d, w in zip(deltas[i, 4 * k : 4 * k + 4].tolist(), weights)]
            assert decoded[i, 4 * k : 4 * k + 4].tolist() == pytest.approx(slow_decode(boxes[i].tolist(), delta))


def test_decoding_does_not_limit_the_size():
    decoded = InclusiveBoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(
        torch.tensor([[0.0, 0.0, 10.0, 200.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    )
    assert decoded[0, 2] == pytest.approx(1 + math.exp(10), rel=1e-6)
    assert clip_to_pixels(decoded, (50, 60)).tolist() == [[0, 0, 59, 49]]


def test_decoding_of_no_boxes():
    decoded = InclusiveBoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(torch.zeros(0, 84), torch.zeros(0, 4))
    assert decoded.shape == (0, 84)


def test_clipping_is_to_the_first_and_the_last_pixel():
    boxes = torch.tensor([[-3.0, -2.0, 70.0, 80.0], [65.0, 55.0, 66.0, 56.0], [-9.0, -9.0, -5.0, -5.0], [1, 2, 59, 49]])
    expected = [[0, 0, 59, 49], [59, 49, 59, 49], [0, 0, 0, 0], [1, 2, 59, 49]]
    assert clip_to_pixels(boxes, (50, 60)).tolist() == expected


def test_extents_end_where_the_last_pixel_ends():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 8.0]])
    assert pixel_extents(boxes).tolist() == [[1, 2, 4, 5, 5, 6, 8.5, 9]]


def test_input_size_is_a_size_and_survives_copies():
    size = copy.deepcopy(NetworkInputSize((600, 840), 1.68, (357, 500)))
    assert size == (600, 840) and size.scale == 1.68 and size.original == (357, 500)


# ---- proposals


def make_rpn(**overrides):
    arguments = {
        "in_features": ["conv5"],
        "head": StandardRPNHead(in_channels=1, num_anchors=9),
        "anchor_generator": make_anchors(),
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": InclusiveBoxTransform((1.0, 1.0, 1.0, 1.0)),
        "batch_size_per_image": 32,
        "positive_fraction": 0.5,
        "pre_nms_topk": (0, 60),
        "post_nms_topk": (0, 20),
        "nms_thresh": 0.7,
        "min_box_size": 16,
        **overrides,
    }
    return CaffeRPN(**arguments).eval()


def slow_proposals(anchors, scores, deltas, size, pre_nms=60, post_nms=20):
    """Clip, leave out what is small, sort, take the best, NMS, take the best: boxes and scores."""
    height, width = size
    candidates = []
    for anchor, score, delta in zip(anchors.tolist(), scores.tolist(), deltas.tolist()):
        box = slow_decode(anchor, delta)
        box = [min(max(v, 0), limit - 1) for v, limit in zip(box, (width, height) * 2)]
        if min(box[2] - box[0] + 1, box[3] - box[1] + 1) >= 16 * size.scale:
            candidates.append((score, box))
    kept = []
    for score, box in sorted(candidates, reverse=True)[:pre_nms]:
        if all(slow_iou(box, other) <= 0.7 for _, other in kept):
            kept.append((score, box))
    return kept[:post_nms]


@pytest.mark.parametrize("scale", [1.0, 1.7, 0.5])
def test_proposals(scale):
    rpn = make_rpn()
    (anchors,) = rpn.anchor_generator([torch.zeros(1, 1, 6, 8)])
    generator = torch.Generator().manual_seed(0)
    scores = torch.randperm(len(anchors), generator=generator)[None] / len(anchors)
    deltas = 0.4 * torch.randn(1, len(anchors), 4, generator=generator)
    deltas[..., 2:] -= 1.5  # some are too small
    size = NetworkInputSize((90, 120), scale, (90, 120))
    expected = slow_proposals(anchors.tensor.double(), scores[0], deltas[0].double(), size)
    (result,) = rpn.predict_proposals([anchors], [scores], [deltas], [size])
    assert 5 < len(expected) <= 20
    assert result.image_size is size
    assert result.objectness_logits.tolist() == [score for score, _ in expected]
    # Coordinates of about 100 pixels in float32.
    np.testing.assert_allclose(result.proposal_boxes.tensor, [box for _, box in expected], rtol=0, atol=1e-3)


def propose(boxes, scores, scale=1.0, **overrides):
    """Proposals from boxes that are given as anchors, best first: their coordinates."""
    boxes, scores = torch.tensor(boxes, dtype=torch.float32), torch.tensor([scores])
    size = NetworkInputSize((100, 100), scale, (100, 100))
    rpn = make_rpn(**overrides)
    (result,) = rpn.predict_proposals([Boxes(boxes)], [scores], [torch.zeros(1, len(boxes), 4)], [size])
    return result.proposal_boxes.tensor.tolist()


def anchor_of(box):
    """An anchor that is decoded to this box with deltas of 0: its far corner is one less."""
    return [box[0], box[1], box[2] - 1, box[3] - 1]


def test_the_least_side_is_that_in_the_original_image_with_both_end_pixels():
    enough, too_small = [10.0, 10.0, 41.0, 41.0], [50.0, 10.0, 80.9, 60.0]  # 32 and 31.9 pixels
    assert propose([anchor_of(enough), anchor_of(too_small)], [0.5, 0.9], scale=2.0) == [enough]


def test_small_boxes_neither_count_nor_suppress():
    # The small one has 15 / 16 of the other and a higher score, and the limit before NMS is 1.
    small, box = [20.0, 20.0, 34.0, 90.0], [20.0, 20.0, 35.0, 90.0]
    assert propose([anchor_of(small), anchor_of(box)], [0.9, 0.5], pre_nms_topk=(0, 1)) == [box]


def test_overlap_counts_the_last_pixels():
    # 0.704 of one another with the last pixels, 0.696 without; the third is 0.681 of the first with them.
    first, near, far = [10.0, 10.0, 49.0, 49.0], [10.0, 10.0, 49.0, 37.15], [10.0, 10.0, 42.0, 42.0]
    assert slow_iou(first, near) > 0.7 > (39 * 27.15) / (39 * 39)
    assert propose([anchor_of(first), anchor_of(near)], [0.9, 0.5]) == [first]
    assert propose([anchor_of(first), anchor_of(far)], [0.9, 0.5]) == [first, far]


def test_no_proposal_is_left():
    assert propose([[10.0, 10.0, 12.0, 12.0]], [0.9]) == []


def test_what_is_not_finite_is_left_out():
    box = [10.0, 10.0, 50.0, 50.0]
    boxes = [anchor_of(box), [math.nan, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]]
    assert propose(boxes, [0.5, 0.9, math.nan]) == [box]


# ---- masks in the image


def slow_paste(mask, box, size, threshold):
    """The mask, binarised, at the centre of each pixel, bilinearly between the centres of its cells."""
    x1, y1, x2, y2 = box
    length = len(mask)
    binary = mask >= threshold
    result = np.zeros(size, dtype=bool)

    def neighbours(i, count):
        position = min(max((i + 0.5) * length / count - 0.5, 0), length - 1)
        low = int(position)
        return low, min(low + 1, length - 1), position - low

    for y in range(y1, y2):
        top, bottom, v = neighbours(y - y1, y2 - y1)
        for x in range(x1, x2):
            left, right, u = neighbours(x - x1, x2 - x1)
            upper = (1 - u) * binary[top, left] + u * binary[top, right]
            lower = (1 - u) * binary[bottom, left] + u * binary[bottom, right]
            result[y, x] = (1 - v) * upper + v * lower >= threshold
    return result


def test_masks_are_binary_before_they_are_resized():
    masks = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 3.0, 19.0, 14.0], [0.0, 0.0, 30.0, 20.0], [7.0, 7.0, 8.0, 8.0], [25.0, 1.0, 30.0, 4.0]])
    pasted = paste_masks(masks, boxes, (20, 30), 0.4)
    assert pasted.dtype == torch.bool
    for mask, box, result in zip(masks.numpy(), boxes.int().tolist(), pasted.numpy()):
        assert np.array_equal(result, slow_paste(mask, box, (20, 30), 0.4))


def test_masks_do_not_fade_at_the_border():
    pasted = paste_masks(torch.ones(1, 3, 3), torch.tensor([[2.0, 1.0, 12.0, 9.0]]), (10, 14), 0.4)
    expected = torch.zeros(1, 10, 14, dtype=torch.bool)
    expected[0, 1:9, 2:12] = True
    assert torch.equal(pasted, expected)


def test_no_masks():
    assert paste_masks(torch.zeros(0, 3, 3), torch.zeros(0, 4), (10, 14), 0.4).shape == (0, 10, 14)


# ---- the whole model


@pytest.fixture(scope="module")
def cfg():
    cfg = get_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    # The fully connected layers and the number of RoIs are what takes memory and time.
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.MNC.MASK_FC_DIM", 16])
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TEST", 20, "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160])
    cfg.MODEL.MNC.OUTPUTS = ["instances", "box_instances", "passes"]
    return cfg


@pytest.fixture(scope="module")
def model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name in ("anchor_deltas", "objectness_logits"):
        nn.init.normal_(getattr(model.proposal_generator.rpn_head, name).weight, std=0.1)
    for name in ("seg_cls_score", "cls_score", "bbox_pred"):
        nn.init.normal_(getattr(model.roi_heads.passes[0].classifier.predictor, name).weight, std=0.1)
    return model


def make_input(cfg, height, width, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = build_test_resize(cfg).get_transform(image).apply_image(image)
    return {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy()), "height": height, "width": width}


def test_the_config_selects_every_part(cfg, model):
    assert isinstance(model, CaffeMultitaskNetworkCascade)
    rpn, heads = model.proposal_generator, model.roi_heads
    (of_all_passes,) = heads.passes
    predictor = of_all_passes.classifier.predictor
    assert isinstance(rpn, CaffeRPN) and isinstance(rpn.anchor_generator, CaffeAnchorGenerator)
    assert isinstance(rpn.box2box_transform, InclusiveBoxTransform)
    assert rpn.anchor_generator.offset == 0
    assert (rpn.pre_nms_topk[False], rpn.nms_thresh, rpn.min_box_size) == (6000, 0.7, 16)
    assert isinstance(heads, CaffeMNCROIHeads) and isinstance(predictor, MNCOutputLayers)
    assert isinstance(predictor.box2box_transform, InclusiveBoxTransform)
    assert predictor.box2box_transform.weights == (1.0, 1.0, 1.0, 1.0)
    poolers = heads.pooler.pooler, heads.pooler.later
    assert [(x.sampling, x.sampling_ratio) for x in poolers] == [("caffe", 2), ("caffe", 1)]
    assert heads.vote.func is vote_masks and isinstance(heads.vote.keywords["frame"], CaffeMaskFrame)
    assert heads.next_box_background and heads.num_passes_test == 2
    assert predictor.test_score_thresh == 0 and predictor.test_nms_thresh == 0.3
    assert model.backbone.ceil_mode and model.backbone.size_divisibility == 0
    assert model.input_format == "BGR" and model.pixel_mean.flatten().tolist() == pytest.approx(
        [102.9801, 115.9465, 122.7717]
    )
    assert of_all_passes.mask_head.mask_size == 21 and model.mask_threshold == 0.4
    released = get_config(CONFIG)
    # The network's classes are VOC's, in the order of the alphabet.
    names = MetadataCatalog.get(released.DATASETS.TEST[0]).thing_classes
    assert len(names) == released.MODEL.ROI_HEADS.NUM_CLASSES == 20 and names == sorted(names)
    assert (names[0], names[14], names[19]) == ("aeroplane", "person", "tvmonitor")
    assert (released.INPUT.MIN_SIZE_TEST, released.INPUT.MAX_SIZE_TEST) == (600, 1000)
    assert released.MODEL.RPN.POST_NMS_TOPK_TEST == 300


@pytest.mark.parametrize("size", [(57, 80), (80, 57), (40, 100), (200, 150)], ids=str)
def test_detections_of_images_of_any_size(cfg, model, size):
    with torch.no_grad():
        (result,) = model([make_input(cfg, *size)])
    height, width = size
    limits = torch.tensor([width, height, width, height])
    instances, boxes = result["instances"], result["box_instances"]
    assert len(instances) > 0 and instances.pred_masks.shape == (len(instances), *size)
    for detections in (instances, boxes):
        assert detections.image_size == size
        tensor = detections.pred_boxes.tensor
        assert len(tensor) > 0 and (tensor >= 0).all() and (tensor <= limits).all()
    # Every pixel of a mask lies in its box.
    for mask, box in zip(instances.pred_masks, instances.pred_boxes.tensor.int().tolist()):
        outside = mask.clone()
        outside[box[1] : box[3], box[0] : box[2]] = False
        assert not outside.any()
    assert len(result["passes"]) == 2
    for output in result["passes"]:
        assert output.image_size == size and output.mask_probabilities.shape[1:] == (21, 21)


def test_an_image_without_proposals_has_no_detections(cfg, model, monkeypatch):
    monkeypatch.setattr(model.proposal_generator, "min_box_size", 1e6)
    with torch.no_grad():
        (result,) = model([make_input(cfg, 57, 80)])
    assert len(result["instances"]) == len(result["box_instances"]) == 0
    assert result["instances"].pred_masks.shape == (0, 57, 80)


def test_passes_tell_the_boxes_in_the_original_image(cfg, model):
    inputs = make_input(cfg, 57, 80)
    with torch.no_grad():
        images = model.preprocess_image([inputs])
        ((proposals,), _) = model.proposal_generator(images, model.backbone(images.tensor))
        (result,) = model([inputs])
    last_pixel = torch.tensor([79, 56, 79, 56])
    expected = (proposals.proposal_boxes.tensor / (96 / 57)).minimum(last_pixel) + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(result["passes"][0].pred_boxes.tensor, expected)


def test_a_batch_gives_what_each_image_gives(cfg, model):
    inputs = [make_input(cfg, 57, 80, seed=1), make_input(cfg, 90, 70, seed=2)]
    with torch.no_grad():
        together, alone = model(inputs), [model([x])[0] for x in inputs]
    for a, b in zip(together, alone):
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


def test_the_evaluation_of_a_dataset_gives_the_same(cfg, model, coco_dataset, clean_catalogs):
    annotations, root = coco_dataset
    register_coco_dataset("drawn", str(annotations), str(root))
    for batch in MNCTrainer.build_test_loader(cfg, "drawn"):
        image = np.asarray(Image.open(batch[0]["file_name"]))[:, :, ::-1]
        resized = build_test_resize(cfg).get_transform(image).apply_image(image)
        inputs = {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy()), "height": 96, "width": 96}
        with torch.no_grad():
            ours, expected = model(batch)[0]["instances"], model([inputs])[0]["instances"]
        assert len(ours) > 0 and torch.equal(ours.scores, expected.scores)
        assert torch.equal(ours.pred_masks, expected.pred_masks)


def test_the_scale_is_exact(cfg, model):
    images = model.preprocess_image([make_input(cfg, 57, 80)])
    (size,) = images.image_sizes
    # Not 135 / 80, as the sizes say.
    assert size == (96, 135) and size.scale == 96 / 57 and size.original == (57, 80)
    assert images.tensor.shape == (1, 3, 96, 135)


def test_images_resized_otherwise_are_refused(model):
    inputs = {"image": torch.zeros(3, 96, 134), "height": 57, "width": 80, "file_name": "cat.jpg"}
    with pytest.raises(ValueError, match="cat.jpg of 80 x 57 .* to 134 x 96.*INPUT.EXACT_SCALE_TEST"):
        model([inputs])
    with pytest.raises(ValueError, match="in whole grey levels, but .* float32"):
        model([{**inputs, "image": torch.zeros(3, 96, 135, dtype=torch.uint8)}])
    with pytest.raises(ValueError, match='"height" and "width"'):
        model([{"image": torch.zeros(3, 96, 135)}])


def test_images_that_were_rounded_are_refused(cfg, model):
    """Detectron2's predictor hands over whole grey levels as float32."""
    inputs = make_input(cfg, 57, 80)
    with pytest.raises(ValueError, match="in whole grey levels.*MNCPredictor"):
        model([{**inputs, "image": inputs["image"].round()}])
    flat = torch.full((3, 96, 135), 200.0)
    assert len(model([{**inputs, "image": flat}])) == 1
    # An image that keeps its size has whole grey levels.
    assert len(model([make_input(cfg, 96, 150)])) == 1
    # So has one of a third of its size: every sample is in the middle of a pixel.
    assert len(model([make_input(cfg, 3 * 96, 3 * 100)])) == 1


def test_deltas_without_bounds_give_boxes_of_the_image():
    decoded = InclusiveBoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(
        torch.tensor([[0.0, 0.0, 90.0, 1e30]]), torch.tensor([[3.0, 4.0, 10.0, 10.0]])
    )
    assert decoded.isfinite().all()
    assert clip_to_pixels(decoded, (50, 60)).tolist() == [[0, 0, 59, 49]]


def test_anchors_have_no_offset(cfg):
    cfg = cfg.clone()
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR.OFFSET is 0.5"):
        build_model(cfg)


def test_training_is_refused(cfg, model):
    inputs = make_input(cfg, 57, 80)
    model.train()
    try:
        with pytest.raises(RuntimeError, match="cannot be trained.*mnc_VGG_16_5stage.yaml"):
            model([{**inputs, "instances": Instances((96, 135))}])
    finally:
        model.eval()


def test_passes_with_weights_of_their_own_are_refused(cfg):
    cfg = cfg.clone()
    cfg.MODEL.MNC.SHARE_PASSES = False
    with pytest.raises(ValueError, match="SHARE_PASSES"):
        build_model(cfg)


def test_a_feature_pyramid_is_refused(cfg):
    cfg = cfg.clone()
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    with pytest.raises(ValueError, match=r"one feature map.*\['p2', 'p3'\]"):
        build_model(cfg)
