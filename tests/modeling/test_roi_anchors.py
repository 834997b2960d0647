"""The RPN's loss on the anchors behind sampled RoIs."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from modeling.inputs import make_inputs

from mnc_d2.modeling.roi_anchors import RoIAnchorLoss, attach_anchors

SIZE = (64, 64)
ANCHORS = torch.tensor([[8.0, 8.0, 24.0, 24.0], [30.0, 30.0, 50.0, 60.0], [-4.0, 10.0, 20.0, 30.0]])
DELTAS = torch.tensor([[0.1, 0.0, 0.0, 0.2], [0.0, 0.1, -0.1, 0.0], [0.2, 0.0, 0.0, 0.0]])
# Two are equal.
LOGITS = torch.tensor([0.5, -1.0, 0.5])


def make_proposals(order=(2, 0, 1)):
    """One image whose proposals are the decoded and clipped anchors, in another order; and the leaves behind them."""
    logits, deltas = LOGITS.clone()[None].requires_grad_(), DELTAS.clone()[None].requires_grad_()
    boxes = Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(deltas[0], ANCHORS)
    proposals = Instances(SIZE)
    proposals.proposal_boxes = Boxes(boxes[list(order)].clone())
    proposals.proposal_boxes.clip(SIZE)
    proposals.objectness_logits = logits[0, list(order)].detach()
    attach_anchors([proposals], ANCHORS[None], boxes[None], logits, deltas)
    return proposals, logits, deltas


def make_sampled(indices, classes, gt_boxes):
    sampled = Instances(SIZE)
    sampled.proposal_index = torch.tensor(indices)
    sampled.gt_classes = torch.tensor(classes)
    sampled.gt_boxes = Boxes(torch.tensor(gt_boxes))
    return sampled


def make_loss():
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    return RoIAnchorLoss(box2box_transform=transform, smooth_l1_beta=1 / 9, batch_size_per_image=10)


def test_each_proposal_finds_its_anchor_also_where_logits_are_equal():
    proposals, _, _ = make_proposals()
    assert torch.equal(proposals.anchor_boxes, ANCHORS[[2, 0, 1]])
    assert torch.equal(proposals.anchor_deltas, DELTAS[[2, 0, 1]])
    assert torch.equal(proposals.anchor_logits, LOGITS[[2, 0, 1]])


def test_loss_follows_the_slow_reference():
    proposals, _, _ = make_proposals()
    gt = [9.0, 7.0, 25.0, 27.0]
    # Anchor 0 is foreground, 1 background, 2 leaves the image; index 3 is an appended ground-truth box.
    sampled = make_sampled([1, 2, 0, 3], [1, 2, 0, 0], [gt, [0.0] * 4, gt, gt])
    losses = make_loss()([proposals], [sampled], num_classes=2)
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
    losses = make_loss()([proposals], [make_sampled([1, 2], [1, 2], [[9.0, 7.0, 25.0, 27.0]] * 2)], num_classes=2)
    sum(losses.values()).backward()
    assert (logits.grad[0] != 0).tolist() == [True, True, False]
    assert (deltas.grad[0] != 0).any(dim=1).tolist() == [True, False, False]


def test_loss_without_rois_is_zero():
    proposals, _, _ = make_proposals()
    nothing = make_sampled([3], [0], [[1.0, 1.0, 5.0, 5.0]])[[]]
    losses = make_loss()([proposals], [nothing], num_classes=2)
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


@pytest.mark.parametrize("proposal_gradient", [True, False])
def test_a_model_adds_the_loss_if_its_config_says_so(small_config, proposal_gradient):
    overrides = {"MODEL.MNC.ROI_ANCHOR_LOSS": True, "MODEL.MNC.PROPOSAL_GRADIENT": proposal_gradient}
    model = build_model(small_config(**overrides))
    with EventStorage():
        losses = model(make_inputs())
    (gradient,) = torch.autograd.grad(losses["loss_rpn_roi_cls"], model.proposal_generator.rpn_head.conv.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("overrides", [{"MODEL.MNC.ROI_ANCHOR_LOSS": False}, {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}])
def test_without_the_switch_or_without_anchors_to_tell_of_there_is_no_such_loss(small_config, overrides):
    with EventStorage():
        losses = build_model(small_config(**overrides))(make_inputs())
    assert not any("rpn_roi" in name for name in losses)
