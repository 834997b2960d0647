"""The RPN's loss on the anchors behind sampled RoIs."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from modeling.inputs import make_inputs

from mnc_d2.modeling.roi_heads.labels import RoILabels
from mnc_d2.modeling.roi_heads.roi_anchor_loss import RoIAnchorLoss

SIZE = (64, 64)
ANCHORS = torch.tensor([[8.0, 8.0, 24.0, 24.0], [30.0, 30.0, 50.0, 60.0], [-4.0, 10.0, 20.0, 30.0]])
DELTAS = torch.tensor([[0.1, 0.0, 0.0, 0.2], [0.0, 0.1, -0.1, 0.0], [0.2, 0.0, 0.0, 0.0]])
LOGITS = torch.tensor([0.5, -1.0, 0.7])


def make_proposals(order=(2, 0, 1)):
    """One image whose proposals come from the anchors in another order; and the leaves behind them."""
    logits, deltas = LOGITS.clone().requires_grad_(), DELTAS.clone().requires_grad_()
    order = list(order)
    proposals = Instances(SIZE, anchor_boxes=ANCHORS[order], anchor_logits=logits[order], anchor_deltas=deltas[order])
    return proposals, logits, deltas


def make_labels(indices, classes, gt_boxes):
    """RoIs of proposals, -1 for ground truth, that were appended."""
    count = len(indices)
    return RoILabels(
        rois=torch.zeros(count, 5),
        counts=[count],
        proposal_index=torch.tensor(indices, dtype=torch.int64),
        classes=torch.tensor(classes, dtype=torch.int64),
        gt_index=torch.zeros(count, dtype=torch.int64),
        gt_boxes=torch.tensor(gt_boxes).view(-1, 4),
        targets=[],
    )


def make_loss():
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    return RoIAnchorLoss(box2box_transform=transform, smooth_l1_beta=1 / 9, batch_size_per_image=10)


def test_loss_follows_the_slow_reference():
    proposals, _, _ = make_proposals()
    gt = [9.0, 7.0, 25.0, 27.0]
    # Anchor 0 is foreground, 1 background, 2 leaves the image; index -1 is an appended ground-truth box.
    labels = make_labels([1, 2, 0, -1], [1, 2, 0, 0], [gt, [0.0] * 4, gt, gt])
    losses = make_loss()([proposals], labels, num_classes=2)
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-1.0))
    assert losses["loss_rpn_roi_cls"].item() == pytest.approx(expected / 10, rel=1e-5)
    targets = [1 / 16, 1 / 16, math.log(16 / 16), math.log(20 / 16)]
    expected = 0.0
    for predicted, target in zip(DELTAS[0].tolist(), targets):
        d = abs(predicted - target)
        expected += 0.5 * d * d * 9 if d < 1 / 9 else d - 0.5 / 9
    assert losses["loss_rpn_roi_loc"].item() == pytest.approx(expected / 10, rel=1e-4)


def test_loss_reaches_the_predictions_of_its_anchors_only():
    proposals, logits, deltas = make_proposals()
    losses = make_loss()([proposals], make_labels([1, 2], [1, 2], [[9.0, 7.0, 25.0, 27.0]] * 2), num_classes=2)
    sum(losses.values()).backward()
    assert (logits.grad != 0).tolist() == [True, True, False]
    assert (deltas.grad != 0).any(dim=1).tolist() == [True, False, False]


def test_loss_without_rois_is_zero():
    proposals, _, _ = make_proposals()
    losses = make_loss()([proposals], make_labels([], [], []), num_classes=2)
    assert {name: float(loss) for name, loss in losses.items()} == {"loss_rpn_roi_cls": 0, "loss_rpn_roi_loc": 0}


def test_proposals_of_a_model_are_what_their_anchors_and_deltas_give(small_config):
    torch.manual_seed(0)
    # So few candidates a level that the best of them matter.
    rpn = build_model(small_config(**{"MODEL.RPN.PRE_NMS_TOPK_TRAIN": 40})).proposal_generator
    torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.2)
    features = {f"p{i}": torch.rand(2, 32, 96 // 2**i, 96 // 2**i) for i in range(2, 7)}
    images, targets = (
        ImageList(torch.zeros(2, 3, 96, 96), [(96, 96), (80, 90)]),
        [x["instances"] for x in make_inputs()],
    )
    with EventStorage():
        proposals, _ = rpn(images, features, targets)
    for proposal in proposals:
        boxes = Boxes(rpn.box2box_transform.apply_deltas(proposal.anchor_deltas, proposal.anchor_boxes))
        boxes.clip(proposal.image_size)
        assert len(boxes) > 10 and torch.equal(boxes.tensor, proposal.proposal_boxes.tensor)
        assert torch.equal(proposal.anchor_logits, proposal.objectness_logits)


@pytest.mark.parametrize("proposals", [True, False])
def test_a_model_adds_the_loss_if_its_config_says_so(small_config, proposals):
    gradients = f"anchors=True, proposals={proposals}"
    model = build_model(small_config(**{"MODEL.MNC.GRADIENTS": gradients}))
    with EventStorage():
        losses = model(make_inputs())
    (gradient,) = torch.autograd.grad(losses["loss_rpn_roi_cls"], model.proposal_generator.rpn_head.conv.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "overrides", [{"MODEL.MNC.GRADIENTS": "anchors=False"}, {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}]
)
def test_without_the_switch_or_without_anchors_to_tell_of_there_is_no_such_loss(small_config, overrides):
    with EventStorage():
        losses = build_model(small_config(**overrides))(make_inputs())
    assert not any("rpn_roi" in name for name in losses)
