"""The cascade in training: labels, losses, and what it accepts."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, PolygonMasks, pairwise_iou
from torch import nn

BACKGROUND = 2  # with two classes
GT = [[8.0, 8.0, 24.0, 24.0], [32.0, 28.0, 56.0, 44.0]]
PASS_LOSSES = ["loss_mask_s{}", "loss_cls_s{}", "loss_seg_cls_s{}", "loss_box_reg_s{}"]


def loss_names(num_passes):
    return {name.format(2 * k + (2 if "mask" in name else 3)) for k in range(num_passes) for name in PASS_LOSSES}


class FixedMasks(nn.Module):
    """A mask head that predicts the same mask (m, m) in every box."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.as_tensor(mask, dtype=torch.float32)

    def layers(self, features):
        return (self.mask * 20 - 10).expand(len(features), 1, -1, -1)


def train(heads, features, proposals, targets):
    return heads(None, features, proposals, targets)


# ---- labels


def test_rois_are_labelled_by_the_class_of_the_box_that_they_overlap_by_half(
    make_roi_heads, make_map, make_proposals, make_target, random_boxes
):
    boxes = torch.cat((random_boxes(200), torch.tensor(GT) + torch.tensor([3.0, -2.0, 2.0, 1.0])))
    heads = make_roi_heads(batch_size_per_image=500, positive_fraction=1.0)
    (labelled,), _ = train(heads, make_map(), [make_proposals(boxes)], [make_target(GT, [1, 0])])
    assert len(labelled) == 204  # ground truth is appended, and all were drawn
    ious = pairwise_iou(labelled.proposal_boxes, Boxes(torch.tensor(GT))).max(dim=1)
    expected = torch.where(ious.values >= 0.5, torch.tensor([1, 0])[ious.indices], BACKGROUND)
    assert torch.equal(labelled.gt_classes, expected)
    assert set(expected.tolist()) == {0, 1, 2}
    foreground = expected < BACKGROUND
    assert torch.equal(labelled.gt_index[foreground], ious.indices[foreground])
    assert torch.equal(labelled.gt_boxes.tensor[foreground], torch.tensor(GT)[ious.indices[foreground]])


@pytest.mark.parametrize("append", [True, False])
def test_ground_truth_is_appended_to_the_first_pass_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, append
):
    heads = make_roi_heads(proposal_append_gt=append)
    (labelled,), _ = train(heads, make_map(), [make_proposals([[0, 0, 9, 9]])], [make_target(GT, [1, 0])])
    assert len(labelled) == (3 if append else 1)


def test_first_pass_is_sampled_and_the_next_takes_all_boxes_and_ground_truth(
    make_roi_heads, make_map, make_proposals, make_target, random_boxes
):
    heads = make_roi_heads(batch_size_per_image=16)
    counts = []
    heads.passes[0].classifier.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    train(heads, make_map(), [make_proposals(random_boxes(100))], [make_target(GT, [1, 0])])
    assert counts == [16, 18]


def make_ellipses():
    y, x = np.mgrid[:64, :64] + 0.5
    return np.stack([((x - 16) / 8) ** 2 + ((y - 16) / 8) ** 2 <= 1, ((x - 44) / 12) ** 2 + ((y - 36) / 8) ** 2 <= 1])


# Boxes whose four by four mask cells are whole pixels.
WHOLE_PIXEL_BOXES = [
    [8, 8, 24, 24],
    [8, 8, 28, 24],
    [10, 7, 26, 23],
    [5, 6, 25, 26],
    [32, 28, 56, 44],
    [34, 28, 54, 44],
    [30, 26, 58, 46],
    [0, 40, 16, 60],
]


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((4, 4)),
        np.zeros((4, 4)),
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]],
    ],
    ids=["all", "nothing", "disc", "part", "right"],
)
def test_mask_level_labels_need_box_and_mask_to_overlap_by_half(
    make_roi_heads, make_map, make_proposals, make_target, mask
):
    gt_masks = make_ellipses()
    target = make_target(GT, [1, 0], masks=torch.from_numpy(gt_masks))
    heads = make_roi_heads(positive_fraction=1.0, mask_head=FixedMasks(mask))
    (labelled,), _ = train(heads, make_map(), [make_proposals(WHOLE_PIXEL_BOXES)], [target])
    assert len(labelled) == len(WHOLE_PIXEL_BOXES) + 2
    for box, cls, index, label in zip(
        labelled.proposal_boxes.tensor.int().tolist(), labelled.gt_classes, labelled.gt_index, labelled.gt_seg_classes
    ):
        x1, y1, x2, y2 = box
        image = np.zeros((64, 64), dtype=bool)
        image[y1:y2, x1:x2] = np.kron(mask, np.ones(((y2 - y1) // 4, (x2 - x1) // 4)))
        iou = (image & gt_masks[index]).sum() / max((image | gt_masks[index]).sum(), 1)
        assert label == (cls if iou >= 0.5 else BACKGROUND), (box, iou)


def test_instances_without_a_mask_have_no_mask_loss_and_box_level_labels(
    make_roi_heads, make_map, make_proposals, make_target
):
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:24, 8:24] = True
    nothing = FixedMasks(torch.zeros(4, 4))
    heads = make_roi_heads(mask_head=nothing, num_passes_train=1)
    target = make_target(GT, [1, 0], masks=masks, has_mask=[True, False])
    (labelled,), losses = train(heads, make_map(), [make_proposals([])], [target])
    # Only the two ground-truth boxes are there. The predicted masks are empty, so the first is background.
    by_class = dict(zip(labelled.gt_classes.tolist(), labelled.gt_seg_classes.tolist()))
    assert by_class == {1: BACKGROUND, 0: 0}
    # All 16 mask cells of the first are foreground, predicted with logit -10; the second does not count.
    assert losses["loss_mask_s2"].item() == pytest.approx(10.0, rel=1e-4)


def test_without_any_mask_the_mask_loss_is_zero(make_roi_heads, make_map, make_proposals, make_target):
    target = make_target(GT, [1, 0], masks=torch.zeros(2, 64, 64, dtype=torch.bool), has_mask=[False, False])
    _, losses = train(make_roi_heads(), make_map(), [make_proposals(GT)], [target])
    assert losses["loss_mask_s2"] == 0 and losses["loss_mask_s4"] == 0
    assert losses["loss_cls_s3"] > 0


def test_polygons_serve_as_masks(make_roi_heads, make_map, make_proposals, make_target):
    polygons = PolygonMasks([[np.array([x1, y1, x2, y1, x2, y2, x1, y2])] for x1, y1, x2, y2 in GT])
    losses = []
    for masks in (None, polygons):  # rectangles that fill the box, either way
        target = make_target(GT, [1, 0], masks=masks)
        torch.manual_seed(0)
        losses.append(train(make_roi_heads(), make_map(), [make_proposals(GT)], [target])[1])
    assert losses[0] == losses[1]


def test_mask_target_follows_the_threshold(make_roi_heads, make_map, make_proposals, make_target):
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 8:24, 8:13] = True  # one mask cell, of 4 x 4 pixels, and a quarter of the next
    losses = {}
    for threshold in (0.2, 0.3):
        heads = make_roi_heads(mask_head=FixedMasks([[1, 1, 0, 0]] * 4), target_threshold=threshold, num_passes_train=1)
        target = make_target([GT[0]], [1], masks=masks)
        losses[threshold] = train(heads, make_map(), [make_proposals([])], [target])[1]["loss_mask_s2"].item()
    # With 0.2 the prediction is the target; with 0.3 a quarter of the mask cells is wrong by a logit of 10.
    assert losses[0.2] == pytest.approx(0.0, abs=1e-4) and losses[0.3] == pytest.approx(2.5, rel=1e-3)


def test_mask_loss_weight(make_roi_heads, make_map, make_proposals, make_target):
    losses = []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        heads = make_roi_heads(loss_weight=weight)
        losses.append(train(heads, make_map(), [make_proposals(GT)], [make_target(GT, [1, 0])])[1])
    for name in losses[0]:
        assert losses[1][name].item() == pytest.approx(losses[0][name].item() * (2 if "mask" in name else 1))


# ---- passes


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_losses_are_named_by_stage(make_roi_heads, make_map, make_proposals, make_target, random_boxes, num_passes):
    heads = make_roi_heads(num_passes_train=num_passes, num_passes_test=1)
    _, losses = train(heads, make_map(), [make_proposals(random_boxes(20))], [make_target(GT, [1, 0])])
    assert set(losses) == loss_names(num_passes)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_losses_of_the_first_pass_do_not_depend_on_the_number_of_passes(
    make_roi_heads, make_map, make_proposals, make_target, random_boxes
):
    losses = []
    for num_passes in (1, 3):
        heads = make_roi_heads(num_passes_train=num_passes)
        torch.manual_seed(0)
        losses.append(train(heads, make_map(), [make_proposals(random_boxes(20))], [make_target(GT, [1, 0])])[1])
    assert losses[0].items() <= losses[1].items()


def test_accuracy_of_each_stage_is_logged(make_roi_heads, make_map, make_proposals, make_target, random_boxes, storage):
    heads = make_roi_heads(mask_head=FixedMasks(np.ones((4, 4))))
    train(
        heads, make_map(), [make_proposals(torch.cat((torch.tensor(GT), random_boxes(20))))], [make_target(GT, [1, 0])]
    )
    logged = {name: value for name, (value, _) in storage.latest().items()}
    for name in ("s2/mask_iou", "s3/cls_accuracy", "s3/seg_cls_accuracy", "s4/mask_iou", "s5/cls_accuracy"):
        assert 0 <= logged[name] <= 1


def test_recall_of_proposals_is_logged(make_roi_heads, make_map, make_proposals, make_target, storage):
    heads = make_roi_heads()
    gt = [[10.0, 10.0, 20.0, 20.0], [30.0, 30.0, 50.0, 50.0], [4.0, 40.0, 16.0, 60.0]]
    # IoU 1, 0.6 and 0 with these.
    boxes = [[10.0, 10.0, 20.0, 20.0], [30.0, 30.0, 50.0, 42.0]]
    heads(None, make_map(2), [make_proposals(boxes), make_proposals([])], [make_target(gt, [0, 1, 0])] * 2)
    latest = storage.latest()
    assert latest["s1/recall_50"][0] == pytest.approx(2 / 6) and latest["s1/recall_75"][0] == pytest.approx(1 / 6)


def test_mask_iou_is_logged_as_the_mean_over_foreground(make_roi_heads, make_map, make_proposals, make_target, storage):
    # Two ground-truth boxes with full masks, IoU 1, and one that covers 3 / 4 of the first.
    heads = make_roi_heads(mask_head=FixedMasks(np.ones((4, 4))), num_passes_train=1)
    train(heads, make_map(), [make_proposals([[8, 8, 24, 20], [0, 50, 8, 60]])], [make_target(GT, [1, 0])])
    assert storage.latest()["s2/mask_iou"][0] == pytest.approx(2.75 / 3)


# ---- what there may be little of


@pytest.mark.parametrize("num_boxes", [0, 12])
@pytest.mark.parametrize("num_instances", [0, 2])
def test_images_without_proposals_or_instances(
    make_roi_heads, make_map, make_proposals, make_target, random_boxes, num_boxes, num_instances
):
    heads = make_roi_heads()
    features = {"map": make_map()["map"].requires_grad_()}
    target = make_target(GT[:num_instances], [1, 0][:num_instances])
    _, losses = train(heads, features, [make_proposals(random_boxes(num_boxes))], [target])
    assert set(losses) == loss_names(2)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert features["map"].grad.isfinite().all()
    # Distributed training waits for a gradient of every parameter.
    assert all(p.grad is not None for p in heads.parameters())


def test_an_image_without_instances_trains_the_background_class(
    make_roi_heads, make_map, make_proposals, make_target, random_boxes
):
    (labelled,), losses = train(make_roi_heads(), make_map(), [make_proposals(random_boxes(12))], [make_target([], [])])
    assert labelled.gt_classes.tolist() == labelled.gt_seg_classes.tolist() == [BACKGROUND] * 12
    assert losses["loss_cls_s3"] > 0 and losses["loss_mask_s2"] == 0 and losses["loss_box_reg_s3"] == 0


def test_one_class(make_roi_heads, make_map, make_proposals, make_target, random_boxes):
    _, losses = train(
        make_roi_heads(num_classes=1), make_map(), [make_proposals(random_boxes(12))], [make_target(GT, [0, 0])]
    )
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_batch_of_three_images_of_different_size(make_roi_heads, make_map, make_proposals, make_target, random_boxes):
    sizes = [(64, 64), (48, 60), (30, 64)]
    proposals = [make_proposals(random_boxes(10, seed, (30, 48)), size) for seed, size in enumerate(sizes)]
    targets = [make_target(GT[:1], [1], size) for size in sizes[:2]] + [make_target([], [], sizes[2])]
    labelled, losses = train(make_roi_heads(), make_map(n=3), proposals, targets)
    assert [(x.image_size, len(x)) for x in labelled] == [((64, 64), 11), ((48, 60), 11), ((30, 64), 10)]
    assert all(loss.isfinite() for loss in losses.values())


def test_losses_of_a_batch_weigh_every_roi_alike(make_roi_heads, make_map, make_proposals, make_target, random_boxes):
    heads = make_roi_heads(num_passes_train=1)
    features = make_map(n=2)
    inputs = [(make_proposals(random_boxes(10, i)), make_target(GT, [1, 0])) for i in range(2)]
    single = [
        train(heads, {"map": features["map"][i : i + 1]}, [proposals], [target])[1]
        for i, (proposals, target) in enumerate(inputs)
    ]
    _, both = train(heads, features, *map(list, zip(*inputs)))
    # Both images have 12 RoIs, so that means over all are means of the means; float32 sums in another order.
    for name in ("loss_cls_s3", "loss_seg_cls_s3", "loss_box_reg_s3"):
        assert both[name].item() == pytest.approx((single[0][name] + single[1][name]).item() / 2, rel=1e-5)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": "some"}, "MODEL.MNC.GRADIENTS has masks=some. There are: none, foreground, all."),
        ({"num_passes_train": 0}, "NUM_PASSES_TRAIN"),
        ({"num_passes_test": 0}, "NUM_PASSES_TEST"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors_that_name_the_key(make_roi_heads, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_roi_heads(**arguments)


def test_training_without_targets_is_an_error(make_roi_heads, make_map, make_proposals):
    with pytest.raises(ValueError, match="targets"):
        make_roi_heads()(None, make_map(), [make_proposals(GT)])


def test_passes_with_weights_of_their_own_use_them(make_roi_heads, make_map, make_proposals, make_target, random_boxes):
    """Pass 1 of both cascades is the same; pass 2 has other weights, and passes beyond take the last."""
    (first,), (second,) = make_roi_heads(seed=0).passes, make_roi_heads(seed=1).passes
    separate = make_roi_heads(passes=[first, second])
    shared = make_roi_heads(seed=0)
    boxes = random_boxes(12)
    losses = []
    for heads in (separate, shared):
        torch.manual_seed(0)
        losses.append(heads(None, make_map(), [make_proposals(boxes)], [make_target(GT, [1, 0])])[1])
    assert all(torch.equal(losses[0][name], losses[1][name]) == (name[-1] in "23") for name in losses[0])
    # The gradient of the losses of pass 2 reaches its own weights.
    sum(loss for name, loss in losses[0].items() if name[-1] in "45").backward()
    assert all(x.grad is not None for x in second.parameters())
    separate.eval().num_passes_test = 3
    results, _ = separate(None, make_map(), [make_proposals(boxes)])
    assert len(results[0]) > 0
