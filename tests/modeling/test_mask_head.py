"""Mask regression: targets, loss and IoU against slow loops."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import build_mask_head
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from modeling.inputs import make_inputs

from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import MaskFusionHead, MaskRegressionHead
from mnc_d2.modeling.roi_heads.labels import RoILabels
from mnc_d2.modeling.roi_heads.mask_supervision import crop_masks, instance_mask_iou, mask_loss, warp_mask_targets

H, W, M = 40, 50, 4


def make_masks(count=3):
    """Ellipses, the last one over the border."""
    y, x = np.mgrid[:H, :W] + 0.5
    centres = [(14.0, 12.0, 9.0, 7.0), (30.0, 25.0, 12.0, 10.0), (47.0, 36.0, 10.0, 9.0)][:count]
    return np.stack([((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1 for cx, cy, rx, ry in centres])


# Boxes whose cells are whole pixels: coverage is the mean of the pixels. (x1, y1, cell width, cell height)
WHOLE_PIXEL_BOXES = {
    "around the instance": (2, 1, 6, 6),
    "a part of the instance": (12, 10, 2, 1),
    "beside the instance": (36, 2, 3, 2),
    "mask leaves the box": (12, 4, 3, 5),
}


@pytest.mark.parametrize(("x1", "y1", "w", "h"), WHOLE_PIXEL_BOXES.values(), ids=WHOLE_PIXEL_BOXES.keys())
def test_crop_is_the_covered_part_of_each_mask_cell(x1, y1, w, h):
    masks = make_masks()
    box = torch.tensor([[x1, y1, x1 + M * w, y1 + M * h]], dtype=torch.float32)
    crop = crop_masks(torch.from_numpy(masks), torch.tensor([0]), box, M)
    expected = np.array(
        [
            [masks[0, y1 + i * h : y1 + (i + 1) * h, x1 + j * w : x1 + (j + 1) * w].mean() for j in range(M)]
            for i in range(M)
        ]
    )
    # Means of at most 36 zeros and ones in float32.
    np.testing.assert_allclose(crop[0].numpy(), expected, atol=1e-5)


def test_crop_of_any_box_is_near_the_area_that_the_mask_covers():
    masks = make_masks(2)
    generator = np.random.default_rng(0)
    start = generator.uniform(0, (W - 30, H - 28), (20, 2))
    boxes = np.concatenate((start, start + generator.uniform(6, 28, (20, 2))), axis=1)
    indices = generator.integers(0, 2, 20)
    crops = crop_masks(torch.from_numpy(masks), torch.from_numpy(indices), torch.from_numpy(boxes).float(), M)
    # Exact areas of pixels as unit squares, cell by cell.
    for box, index, crop in zip(boxes, indices, crops.numpy()):
        rows = overlap(box[1], box[3], H)
        columns = overlap(box[0], box[2], W)
        expected = rows @ masks[index] @ columns.T / (rows.sum(axis=1)[:, None] * columns.sum(axis=1)[None])
        # The samples are interpolated bilinearly: the mask's edge is blurred by up to half a pixel either way.
        cell_width, cell_height = (box[2] - box[0]) / M, (box[3] - box[1]) / M
        assert np.abs(crop - expected).max() <= min(1.0, 0.5 / cell_width + 0.5 / cell_height)
        assert abs(crop.mean() - expected.mean()) <= 0.03


def overlap(start, end, size):
    """Length of the overlap of each of the M bins of [start, end) with each pixel [i, i + 1): (M, size)."""
    edges = np.linspace(start, end, M + 1)
    pixels = np.arange(size)
    return np.clip(np.minimum(edges[1:, None], pixels[None] + 1) - np.maximum(edges[:-1, None], pixels[None]), 0, None)


def test_crop_is_zero_outside_the_image():
    masks = torch.ones(1, H, W, dtype=torch.bool)
    # The left half of the box, two of four cells, lies outside; at less than a pixel RoIAlign repeats the border.
    crop = crop_masks(masks, torch.tensor([0]), torch.tensor([[-18.0, 8.0, 14.0, 24.0]]), M)
    assert torch.equal(crop[0, :, [0, 3]], torch.tensor([[0.0, 1.0]] * M))


def test_crop_takes_the_mask_of_each_index():
    masks = torch.zeros(3, H, W, dtype=torch.bool)
    masks[1] = True
    crop = crop_masks(masks, torch.tensor([2, 1, 0, 1]), torch.tensor([[4.0, 4.0, 20.0, 20.0]] * 4), M)
    assert crop.mean(dim=(1, 2)).tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(("num_masks", "num_boxes"), [(0, 2), (2, 0), (0, 0)])
def test_crop_without_masks_or_boxes(num_masks, num_boxes):
    masks = torch.ones(num_masks, H, W, dtype=torch.bool)
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]] * num_boxes).view(-1, 4)
    crop = crop_masks(masks, torch.zeros(num_boxes, dtype=torch.long), boxes, M)
    assert torch.equal(crop, torch.zeros(num_boxes, M, M))


# ---- loss


def test_loss_is_the_mean_over_images_of_the_mean_binary_cross_entropy_of_valid_rois():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, M, M, generator=generator)
    target = torch.rand(5, M, M, generator=generator)
    valid, image = [True, False, True, True, False], [0, 0, 1, 1, 2]
    terms = [[], [], []]
    for r in range(5):
        for t, x in zip(target[r].flatten().tolist(), logits[r].flatten().tolist()):
            p = 1 / (1 + math.exp(-x))
            if valid[r]:
                terms[image[r]].append(-t * math.log(p) - (1 - t) * math.log(1 - p))
    loss = mask_loss(logits, target, torch.tensor(valid), [2, 2, 1])
    assert loss.item() == pytest.approx(sum(sum(x) / len(x) if x else 0 for x in terms) / 3, rel=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_loss_without_a_valid_roi_is_zero_and_has_a_gradient(count):
    logits = torch.randn(count, M, M, requires_grad=True)
    loss = mask_loss(logits, torch.rand(count, M, M), torch.zeros(count, dtype=torch.bool), [count])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(count, M, M))


def test_loss_gives_no_gradient_to_rois_that_are_not_valid():
    logits = torch.randn(3, M, M, requires_grad=True)
    mask_loss(logits, torch.rand(3, M, M), torch.tensor([True, False, True]), [3]).backward()
    assert [(row != 0).all().item() for row in logits.grad] == [True, False, True]


# ---- targets that move


def make_labelled(boxes, indices):
    """A RoI for each box, matched to these instances."""
    index, count = torch.tensor(indices), len(indices)
    target = Instances((H, W), gt_masks=BitMasks(torch.from_numpy(make_masks())))
    rois = torch.cat((torch.zeros(count, 1).to(boxes), boxes), dim=1)
    return RoILabels(rois, [count], index, torch.zeros_like(index), index, boxes.detach(), [target])


def test_targets_that_move_are_the_mask_interpolated_at_the_centre_of_each_mask_cell():
    boxes = [[4.3, 3.1, 25.7, 20.9], [20.2, 14.8, 44.4, 33.3]]
    target = warp_mask_targets(make_labelled(torch.tensor(boxes), [0, 1]), M)
    masks = make_masks()
    for r, (x1, y1, x2, y2) in enumerate(boxes):
        for i in range(M):
            for j in range(M):
                y, x = y1 + (i + 0.5) * (y2 - y1) / M - 0.5, x1 + (j + 0.5) * (x2 - x1) / M - 0.5
                row, column = math.floor(y), math.floor(x)
                expected = sum(
                    (1 - abs(y - row - a)) * (1 - abs(x - column - b)) * masks[r, row + a, column + b]
                    for a in (0, 1)
                    for b in (0, 1)
                )
                assert target[r, i, j].item() == pytest.approx(expected, abs=1e-5)  # float32 positions up to 50


def test_targets_that_move_have_the_exact_derivative():
    boxes = torch.tensor([[4.3, 3.1, 25.7, 20.9], [20.2, 14.8, 44.4, 33.3]], dtype=torch.float64, requires_grad=True)

    def warp(boxes):
        return warp_mask_targets(make_labelled(boxes, [0, 1]), 9)

    assert torch.autograd.grad(warp(boxes).pow(2).sum(), boxes)[0].abs().min() > 0
    assert torch.autograd.gradcheck(warp, boxes)


def test_targets_that_move_without_an_instance_are_zero():
    labels = make_labelled(torch.tensor([[4.0, 4.0, 20.0, 20.0]]), [0])
    labels.targets = [labels.targets[0][[]]]
    assert torch.equal(warp_mask_targets(labels, M), torch.zeros(1, M, M))


# ---- IoU


@pytest.mark.parametrize(("x1", "y1", "w", "h"), WHOLE_PIXEL_BOXES.values(), ids=WHOLE_PIXEL_BOXES.keys())
@pytest.mark.parametrize("index", [0, 1])
def test_iou_counts_pixels_of_the_whole_instance(x1, y1, w, h, index):
    mask = make_masks()[index]
    predicted = np.random.default_rng(0).random((M, M)) < 0.6
    image = np.zeros((H, W), dtype=bool)
    image[y1 : y1 + M * h, x1 : x1 + M * w] = predicted.repeat(h, axis=0).repeat(w, axis=1)
    expected = (image & mask).sum() / (image | mask).sum()

    box = torch.tensor([[x1, y1, x1 + M * w, y1 + M * h]], dtype=torch.float32)
    coverage = crop_masks(torch.from_numpy(mask[None]), torch.tensor([0]), box, M)
    area = torch.tensor([float(mask.sum())])
    iou = instance_mask_iou(torch.from_numpy(predicted[None]), coverage, box, area)
    # Areas of up to 600 pixels in float32.
    assert iou.item() == pytest.approx(expected, abs=1e-5)


def test_iou_of_many_rois_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(6, M, M, generator=generator) < 0.5
    coverage = torch.rand(6, M, M, generator=generator)
    boxes = torch.tensor([[0, 0, 8, 12], [3, 2, 40, 9], [5, 5, 6, 6], [0, 0, 50, 40], [1, 2, 3, 4], [9, 9, 29, 19]])
    boxes, areas = boxes.float(), torch.tensor([90.0, 400.0, 3.0, 1500.0, 2.0, 200.0])
    together = instance_mask_iou(predicted, coverage, boxes, areas)
    alone = [
        instance_mask_iou(predicted[i : i + 1], coverage[i : i + 1], boxes[i : i + 1], areas[i : i + 1])
        for i in range(6)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert ((together >= 0) & (together <= 1)).all()


@pytest.mark.parametrize(
    ("predicted", "covered", "box", "area"),
    [
        (False, 0.0, [4.0, 4.0, 12.0, 12.0], 0.0),
        (False, 1.0, [4.0, 4.0, 12.0, 12.0], 64.0),
        (True, 0.0, [4.0, 4.0, 12.0, 12.0], 64.0),
        (True, 1.0, [4.0, 4.0, 4.0, 12.0], 64.0),
        (True, 1.0, [12.0, 4.0, 4.0, 12.0], 64.0),
    ],
    ids=["nothing at all", "nothing predicted", "disjoint", "box without width", "box of negative width"],
)
def test_iou_is_zero_where_nothing_overlaps(predicted, covered, box, area):
    iou = instance_mask_iou(
        torch.full((1, M, M), predicted), torch.full((1, M, M), covered), torch.tensor([box]), torch.tensor([area])
    )
    assert iou.item() == 0


def test_iou_of_no_rois():
    empty = torch.zeros(0, M, M)
    assert instance_mask_iou(empty.bool(), empty, torch.zeros(0, 4), torch.zeros(0)).shape == (0,)


# ---- head


@pytest.mark.parametrize("count", [0, 3])
def test_head_gives_float32_logits_of_the_mask_size(count):
    head = MaskRegressionHead(ShapeSpec(channels=2, height=6, width=6), hidden_dim=5, mask_size=9)
    assert head.layers(torch.rand(count, 2, 6, 6)).shape == (count, 1, 9, 9)
    assert head.bfloat16().layers(torch.rand(count, 2, 6, 6).bfloat16()).dtype == torch.float32


def test_head_does_not_depend_on_the_memory_format_of_the_features():
    head = MaskRegressionHead(ShapeSpec(channels=2, height=6, width=6), hidden_dim=5, mask_size=9)
    features = torch.rand(3, 2, 6, 6)
    assert torch.equal(head.layers(features), head.layers(features.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("count", [0, 3])
def test_fusion_head_is_the_sum_of_both_paths(count):
    head = MaskFusionHead(
        ShapeSpec(channels=2, height=3, width=3), num_conv=1, conv_dim=4, hidden_dim=5, mask_size=6, init_std=0.1
    )
    features = torch.rand(count, 2, 3, 3)
    expected = MaskRegressionHead.layers(head, features) + head.local(features)
    assert expected.shape == (count, 1, 6, 6)
    torch.testing.assert_close(head.layers(features), expected)
    # The last layer enlarges each bin to its own cells: one bin reaches no further than its neighbours' cells.
    moved = torch.zeros(1, 2, 3, 3)
    moved[..., 0, 0] = 1
    change = head.local(moved) - head.local(torch.zeros_like(moved))
    assert change[..., 4:, :].abs().max() == change[..., :, 4:].abs().max() == 0
    assert change.abs().max() > 0


def test_fusion_head_needs_a_multiple_of_the_pooled_size():
    with pytest.raises(ValueError, match="MODEL.MNC.MASK_SIZE is 7.*POOLER_RESOLUTION, 3"):
        MaskFusionHead(ShapeSpec(channels=2, height=3, width=3), num_conv=1, conv_dim=4, mask_size=7)


def test_fusion_head_is_built_from_the_config():
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskFusionHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 2, 8
    head = build_mask_head(cfg, ShapeSpec(channels=3, height=14, width=14))
    assert [x.weight.shape[:2] for x in head.local if hasattr(x, "weight")] == [(8, 3), (8, 8), (8, 1)]


def test_the_mask_head_of_detectron2_runs_in_the_cascade_by_its_name(small_config):
    cfg = small_config(**{"MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM": 8})
    model = build_model(cfg)
    head = model.roi_heads.get_pass(0).mask_head
    assert type(head) is MaskRCNNConvUpsampleHead and head.predictor.out_channels == 1
    with EventStorage():
        losses = model(make_inputs())
    (losses["loss_mask_s2"] + losses["loss_mask_s4"]).backward()
    assert head.predictor.weight.grad.abs().sum() > 0
    with torch.no_grad():
        (result, _) = model.eval()(make_inputs())
    assert result["instances"].pred_masks.dtype == torch.bool


def test_our_mask_head_runs_in_the_mask_rcnn_of_detectron2_by_its_name():
    cfg = get_config("quickstart/mask_rcnn_R_18_FPN.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_MASK_HEAD.NAME", "MaskRegressionHead"])
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"])
    model = build_model(cfg)
    with EventStorage():
        losses = model(make_inputs())
    losses["loss_mask"].backward()
    assert model.roi_heads.mask_head.fc1.weight.grad.abs().sum() > 0
