"""Outputs of the masked-feature classifier: losses, and the boxes of the next pass."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform

from mnc_d2.modeling import MNCOutputLayers
from mnc_d2.modeling.roi_heads.labels import RoILabels
from mnc_d2.modeling.roi_heads.output_layers import Predictions

CLASSES = 3
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def make_layers(**kwargs):
    torch.manual_seed(0)
    arguments = {"num_classes": CLASSES, "smooth_l1_beta": 1.0, **kwargs}
    return MNCOutputLayers(ShapeSpec(channels=6), box2box_transform=Box2BoxTransform(WEIGHTS), **arguments)


BOXES = torch.tensor([[10.0, 10.0, 30.0, 26.0], [5.0, 8.0, 45.0, 60.0], [0.0, 0.0, 16.0, 16.0], [2.0, 2.0, 9.0, 9.0]])
GT_BOXES = torch.tensor([[12.0, 9.0, 31.0, 30.0], [5.0, 8.0, 45.0, 60.0], [1.0, 1.0, 17.0, 15.0], [0.0, 0.0, 0.0, 0.0]])
GT_CLASSES, GT_MASK_CLASSES = [0, 2, 1, CLASSES], [0, CLASSES, 1, CLASSES]


def make_predictions():
    generator = torch.Generator().manual_seed(0)
    sizes = (CLASSES + 1, CLASSES + 1, 4 * (CLASSES + 1))
    return Predictions(*(torch.randn(len(BOXES), size, generator=generator).requires_grad_() for size in sizes))


def make_labels(counts=(1, 3), boxes=BOXES, part=slice(None)):
    """Labels of (part of) the four RoIs, as the RoIs of so many images; and labels at mask level."""
    index, classes = torch.zeros(len(boxes), dtype=torch.long), torch.tensor(GT_CLASSES)
    rois = torch.cat((torch.zeros(len(boxes), 1), boxes), dim=1)
    fields = (x[part] for x in (index, classes, index, GT_BOXES))
    return RoILabels(rois[part], list(counts), *fields, []), torch.tensor(GT_MASK_CLASSES)[part]


def slow_mean(terms):
    """The mean over the two images of the mean over the RoIs of each."""
    return (terms[0] + sum(terms[1:]) / 3) / 2


def slow_cross_entropy(logits, labels):
    return slow_mean(
        [math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits.detach().tolist(), labels)]
    )


def slow_box_loss(deltas):
    """Smooth L1, beta 1, over the deltas of the labelled class; 0 for background."""
    terms = [0.0] * len(BOXES)
    rows = zip(BOXES.tolist(), GT_BOXES.tolist(), GT_CLASSES, deltas.detach().tolist())
    for i, (box, gt, label, row) in enumerate(rows):
        if label == CLASSES:
            continue
        w, h, gw, gh = box[2] - box[0], box[3] - box[1], gt[2] - gt[0], gt[3] - gt[1]
        target = [
            WEIGHTS[0] * ((gt[0] + gt[2]) / 2 - (box[0] + box[2]) / 2) / w,
            WEIGHTS[1] * ((gt[1] + gt[3]) / 2 - (box[1] + box[3]) / 2) / h,
            WEIGHTS[2] * math.log(gw / w),
            WEIGHTS[3] * math.log(gh / h),
        ]
        for predicted, wanted in zip(row[4 * label : 4 * label + 4], target):
            d = abs(predicted - wanted)
            terms[i] += 0.5 * d * d if d < 1 else d - 0.5
    return slow_mean(terms)


def test_losses_follow_the_slow_reference():
    predictions = make_predictions()
    losses = make_layers().losses(predictions, *make_labels())
    # float32 logarithms and sums of some tens of terms.
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {
            "loss_cls": slow_cross_entropy(predictions[0], GT_CLASSES),
            "loss_seg_cls": slow_cross_entropy(predictions[1], GT_MASK_CLASSES),
            "loss_box_reg": slow_box_loss(predictions[2]),
        },
        rel=1e-5,
    )


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_images():
    predictions = make_predictions()
    together = make_layers().losses(predictions, *make_labels())
    alone = [
        make_layers().losses(Predictions(*(x[part] for x in predictions)), *make_labels([count], part=part))
        for count, part in ((1, slice(0, 1)), (3, slice(1, 4)))
    ]
    for name, loss in together.items():
        assert loss.item() == pytest.approx((alone[0][name] + alone[1][name]).item() / 2, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["giou", "diou", "ciou"])
def test_other_box_losses_are_those_of_detectron2_for_one_image(loss_type):
    layers, predictions = make_layers(box_reg_loss_type=loss_type), make_predictions()
    deltas = predictions[2][:, : 4 * CLASSES]
    expected = layers.box_reg_loss(BOXES, GT_BOXES, deltas, torch.tensor(GT_CLASSES))
    assert layers.losses(predictions, *make_labels([4]))["loss_box_reg"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_targets_move_with_boxes_exactly_if_asked_for():
    layers, foreground = make_layers(), 3
    predictions = make_predictions()[2][:foreground].detach().double()
    gt_boxes, classes = GT_BOXES[:foreground].double(), torch.tensor(GT_CLASSES[:foreground])

    def loss(boxes):
        return layers._box_losses(boxes, gt_boxes, predictions, classes)

    boxes = BOXES[:foreground].double().requires_grad_()
    assert torch.autograd.gradcheck(loss, boxes)
    # That is what the switch lets through.
    for moving in (True, False):
        moved = BOXES.clone().requires_grad_()
        losses = layers.losses(make_predictions(), *make_labels(boxes=moved), moving_targets=moving)
        (gradient,) = torch.autograd.grad(losses["loss_box_reg"], moved, allow_unused=True)
        assert (gradient is not None) == moving


def test_losses_are_weighted_by_name():
    predictions, weights = make_predictions(), {"loss_cls": 2.0, "loss_box_reg": 0.5}
    plain = make_layers().losses(predictions, *make_labels())
    weighted = make_layers(loss_weight=weights).losses(predictions, *make_labels())
    for name, loss in plain.items():
        assert weighted[name].item() == pytest.approx(weights.get(name, 1.0) * loss.item())


def test_boxes_and_labels_are_constants_of_the_losses():
    predictions, boxes = make_predictions(), BOXES.clone().requires_grad_()
    sum(make_layers().losses(predictions, *make_labels(boxes=boxes)).values()).backward()
    assert boxes.grad is None
    assert all(x.grad.abs().sum() > 0 for x in predictions)


def test_box_loss_reaches_only_the_deltas_of_the_labelled_class():
    predictions = make_predictions()
    make_layers().losses(predictions, *make_labels())["loss_box_reg"].backward()
    reached = predictions[2].grad.view(len(BOXES), CLASSES + 1, 4).abs().sum(dim=2) > 0
    expected = torch.nn.functional.one_hot(torch.tensor(GT_CLASSES), CLASSES + 1).bool()
    expected[:, CLASSES] = False
    assert torch.equal(reached, expected)


def test_losses_of_no_rois_are_zero():
    predictions = Predictions(*(x[:0] for x in make_predictions()))
    losses = make_layers().losses(predictions, *make_labels([0, 0], part=slice(0)))
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss_cls": 0.0,
        "loss_seg_cls": 0.0,
        "loss_box_reg": 0.0,
    }


def slow_regress(box, delta):
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + w / 2 + delta[0] / WEIGHTS[0] * w, box[1] + h / 2 + delta[1] / WEIGHTS[1] * h
    w, h = w * math.exp(delta[2] / WEIGHTS[2]), h * math.exp(delta[3] / WEIGHTS[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


@pytest.mark.parametrize("classes", [[0, 1, 2, 0], [CLASSES] * 4, [2, CLASSES, 0, 1]], ids=str)
def test_boxes_are_regressed_with_the_deltas_of_their_class(classes):
    deltas = make_predictions()[2]
    boxes = make_layers().regress_boxes(BOXES, deltas, torch.tensor(classes))
    expected = [
        slow_regress(box, row[4 * c : 4 * c + 4]) for box, row, c in zip(BOXES.tolist(), deltas.tolist(), classes)
    ]
    # Coordinates up to 64 in float32.
    torch.testing.assert_close(boxes.detach(), torch.tensor(expected), rtol=0, atol=1e-4)


def test_class_boxes_are_those_of_each_foreground_class():
    deltas = make_predictions()[2]
    layers = make_layers()
    expected = [layers.regress_boxes(BOXES, deltas, torch.full((4,), c)) for c in range(CLASSES)]
    assert torch.equal(layers.predict_class_boxes(BOXES, deltas), torch.cat(expected, dim=1))


def test_regressed_boxes_pass_gradients_to_boxes_and_deltas():
    boxes, deltas = BOXES.clone().requires_grad_(), make_predictions()[2]
    regressed = make_layers().regress_boxes(boxes, deltas, torch.tensor([0, 1, 2, 0]))
    (regressed * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert (boxes.grad != 0).all()
    assert (deltas.grad.view(len(BOXES), -1, 4) != 0).any(dim=2).sum(dim=1).tolist() == [1] * len(BOXES)


def test_forward_flattens_and_gives_float32():
    layers = make_layers().bfloat16()
    outputs = layers(torch.rand(5, 6, 1, 1).bfloat16())
    assert [tuple(x.shape) for x in outputs] == [(5, CLASSES + 1), (5, CLASSES + 1), (5, 4 * (CLASSES + 1))]
    assert all(x.dtype == torch.float32 for x in outputs)
