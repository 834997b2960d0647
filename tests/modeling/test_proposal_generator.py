"""CausalRPN: Detectron2's proposals, attached to the predicted deltas."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances

from mnc_d2.modeling import CausalGradients, CausalRPN

SIZES = [(64, 64), (48, 60)]  # of two images in one batch


def make_rpn(cls=CausalRPN, **kwargs):
    torch.manual_seed(0)
    fields = CausalGradients.__dataclass_fields__
    gradients = CausalGradients(**{name: value for name, value in kwargs.items() if name in fields})
    kwargs = {name: value for name, value in kwargs.items() if name not in fields}
    if cls is not RPN:
        kwargs["gradients"] = gradients
    rpn = cls(
        in_features=["fine", "coarse"],
        head=StandardRPNHead(in_channels=4, num_anchors=3),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[12], [24]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16], offset=0.5
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(100, 60),
        post_nms_topk=(70, 50),
        min_box_size=2.0,
        **kwargs,
    )
    # Larger outputs than at the start of training: boxes move by some pixels, and scores have no ties.
    torch.nn.init.normal_(rpn.rpn_head.conv.weight, std=0.3)
    torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.1)
    return rpn


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    features = {
        "fine": torch.rand(2, 4, 8, 8, generator=generator),
        "coarse": torch.rand(2, 4, 4, 4, generator=generator),
    }
    targets = []
    for size in SIZES:
        target = Instances(size)
        target.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 20.0, 16.0], [20.0, 20.0, 44.0, 40.0]]))
        targets.append(target)
    return ImageList(torch.zeros(2, 3, 64, 64), SIZES), features, targets


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", [{}, {"border": True}, {"proposals": False}], ids=str)
def test_proposals_and_losses_have_the_values_of_the_stock_rpn(training, switches):
    images, features, targets = make_inputs()
    results = []
    for rpn in (make_rpn(RPN), make_rpn(**switches)):
        rpn.train(training)
        torch.manual_seed(1)  # the anchors that the losses take are drawn
        results.append(rpn(images, features, targets))
    (expected, expected_losses), (proposals, losses) = results
    assert losses == expected_losses
    for a, b in zip(proposals, expected):
        assert len(b) > 10
        assert a.image_size == b.image_size
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


@pytest.mark.parametrize(("switch", "attached"), [(True, True), (False, False)])
def test_proposals_are_attached_in_training_if_switched_on(switch, attached):
    images, features, targets = make_inputs()
    proposals, _ = make_rpn(proposals=switch)(images, features, targets)
    assert [x.proposal_boxes.tensor.requires_grad for x in proposals] == [attached] * 2


def test_proposals_are_constants_at_inference():
    images, features, _ = make_inputs()
    proposals, _ = make_rpn().eval()(images, features)
    assert not any(x.proposal_boxes.tensor.requires_grad for x in proposals)


def test_loss_on_proposals_reaches_the_delta_layer_and_the_features():
    images, features, targets = make_inputs()
    features = {name: x.requires_grad_() for name, x in features.items()}
    rpn = make_rpn(border=True, delta_clip=0)
    proposals, _ = rpn(images, features, targets)
    torch.cat([x.proposal_boxes.tensor for x in proposals]).square().mean().backward()
    assert rpn.rpn_head.anchor_deltas.weight.grad.abs().sum() > 0
    assert all(x.grad.abs().sum() > 0 for x in features.values())
    # Scores only choose the proposals.
    assert rpn.rpn_head.objectness_logits.weight.grad is None
    assert not any(x.objectness_logits.requires_grad for x in proposals)


# Below, the RPN gets deltas by hand. One level; one image of 64 x 64.


def propose(anchors, deltas, **switches):
    """Return the proposals (K, 4) of these anchors and deltas, all of them kept, in their order."""
    rpn = make_rpn(nms_thresh=1.0, **switches)
    scores = -torch.arange(len(anchors), dtype=torch.float32)[None]
    (proposals,) = rpn.predict_proposals([Boxes(torch.tensor(anchors))], [scores], [deltas[None]], [(64, 64)])
    assert len(proposals) == len(anchors)
    return proposals.proposal_boxes.tensor


INSIDE = [20.0, 20.0, 40.0, 36.0]


def gradient_to_deltas(anchor, delta, weight=1.0, **switches):
    """Gradient to the deltas of one anchor of weight * (x1 + 2 y1 + 3 x2 + 4 y2)."""
    deltas = torch.tensor([delta], requires_grad=True)
    boxes = propose([anchor], deltas, **switches)
    (boxes * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().mul(weight).backward()
    return deltas.grad[0]


def test_gradient_to_deltas_is_the_derivative_of_the_decoded_box():
    # With centre x_c + dx w and size w exp(dw): d/d dx = w (1 + 3), d/d dw = w exp(dw) (3 - 1) / 2; y alike.
    gradient = gradient_to_deltas(INSIDE, [0.1, -0.1, 0.0, 0.0], delta_clip=0)
    torch.testing.assert_close(gradient, torch.tensor([20.0 * 4, 16.0 * 6, 20.0, 16.0]))


@pytest.mark.parametrize("limit", [1 / 512, 20.0])
def test_each_element_of_the_delta_gradient_is_clipped(limit):
    # 80, 96, 20, 16 without clipping: the last is below the limit of 20.
    gradient = gradient_to_deltas(INSIDE, [0.0, 0.0, 0.0, 0.0], delta_clip=limit)
    torch.testing.assert_close(gradient, torch.tensor([80.0, 96.0, 20.0, 16.0]).clamp(max=limit))
    gradient = gradient_to_deltas(INSIDE, [0.0, 0.0, 0.0, 0.0], weight=-1.0, delta_clip=limit)
    torch.testing.assert_close(gradient, -torch.tensor([80.0, 96.0, 20.0, 16.0]).clamp(max=limit))


def test_default_limit_is_that_of_the_released_model():
    assert gradient_to_deltas(INSIDE, [0.0] * 4).tolist() == [1 / 512] * 4


def test_the_losses_of_the_rpn_itself_are_not_clipped():
    gradients = []
    for limit in (0, 1e-9):
        images, features, targets = make_inputs()
        rpn = make_rpn(delta_clip=limit)
        torch.manual_seed(1)
        _, losses = rpn(images, features, targets)
        losses["loss_rpn_loc"].backward()
        gradients.append(rpn.rpn_head.anchor_deltas.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


BORDER_CASES = {
    "box clipped at the left": (INSIDE, [-1.2, 0.0, 0.0, 0.0]),
    "box clipped at the top": (INSIDE, [0.0, -1.5, 0.0, 0.0]),
    "box clipped at the right": (INSIDE, [1.2, 0.0, 0.5, 0.0]),
    "box clipped at the bottom": (INSIDE, [0.0, 1.5, 0.0, 0.5]),
    "anchor over the left border": ([-4.0, 20.0, 16.0, 36.0], [0.5, 0.0, 0.0, 0.0]),
    "anchor over the top border": ([20.0, -4.0, 40.0, 12.0], [0.0, 0.5, 0.0, 0.0]),
    "anchor over the right border": ([50.0, 20.0, 70.0, 36.0], [-0.5, 0.0, 0.0, 0.0]),
    "anchor over the bottom border": ([20.0, 52.0, 40.0, 68.0], [0.0, -0.5, 0.0, 0.0]),
}


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize(("anchor", "delta"), BORDER_CASES.values(), ids=BORDER_CASES.keys())
def test_boxes_at_the_border_pass_gradients_only_if_switched_on(anchor, delta, border):
    gradient = gradient_to_deltas(anchor, delta, border=border)
    assert (gradient != 0).any().item() == border


@pytest.mark.parametrize(
    "anchor",
    [[0.0, 20.0, 20.0, 36.0], [20.0, 0.0, 40.0, 16.0], [44.0, 20.0, 64.0, 36.0], [20.0, 48.0, 40.0, 64.0]],
    ids=["left", "top", "right", "bottom"],
)
def test_anchor_that_touches_the_border_does_not_cross_it(anchor):
    # The box is smaller than the anchor, well inside the image.
    assert (gradient_to_deltas(anchor, [0.0, 0.0, -0.5, -0.5]) != 0).all()


def test_the_border_is_that_of_each_image():
    rpn = make_rpn(nms_thresh=1.0)
    deltas = torch.zeros(2, 1, 4, requires_grad=True)
    anchors = [Boxes(torch.tensor([[40.0, 20.0, 55.0, 40.0]]))]
    # The same anchor is inside the first image, of 64 x 64, and crosses the border of the second, of 48 x 50.
    proposals = rpn.predict_proposals(anchors, [torch.zeros(2, 1)], [deltas], [(64, 64), (48, 50)])
    torch.cat([x.proposal_boxes.tensor for x in proposals]).square().sum().backward()
    assert (deltas.grad[0] != 0).all() and (deltas.grad[1] == 0).all()


def test_a_suppressed_proposal_gets_no_gradient():
    rpn = make_rpn()  # NMS 0.7
    deltas = torch.zeros(1, 2, 4, requires_grad=True)
    anchors = [Boxes(torch.tensor([INSIDE, [20.0, 20.0, 40.0, 37.0]]))]
    (proposals,) = rpn.predict_proposals(anchors, [torch.tensor([[1.0, 2.0]])], [deltas], [(64, 64)])
    proposals.proposal_boxes.tensor.square().sum().backward()
    assert (deltas.grad[0, 0] == 0).all() and (deltas.grad[0, 1] != 0).all()


def test_from_config_reads_the_switches():
    from detectron2.config import get_cfg

    from mnc_d2 import add_mnc_config

    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "CausalRPN"
    cfg.MODEL.MNC.GRADIENTS = "proposals=False, delta_clip=0.125, border=True"
    rpn = CausalRPN(cfg, {"res4": ShapeSpec(channels=4, stride=16)})
    assert rpn.gradients == CausalGradients(proposals=False, delta_clip=0.125, border=True)


def test_proposals_that_are_surely_background_are_left_out_at_inference():
    images, features, targets = make_inputs()
    with torch.no_grad():
        everything, _ = make_rpn().eval()(images, features)
        probabilities = [x.objectness_logits.sigmoid() for x in everything]
        threshold = probabilities[0][20].item()
        for minimum, at_least in ((0, 0), (30, 30), (1000, 50)):
            some, _ = make_rpn(min_score=threshold, min_proposals=minimum).eval()(images, features)
            for result, whole, probability in zip(some, everything, probabilities):
                count = max(int((probability >= threshold).sum()), min(at_least, len(whole)))
                assert torch.equal(result.proposal_boxes.tensor, whole.proposal_boxes.tensor[:count])
                assert torch.equal(result.objectness_logits, whole.objectness_logits[:count])
        assert len(some[0]) == len(everything[0]) > 30
        trained, _ = make_rpn(min_score=threshold, min_proposals=0)(images, features, targets)
        assert len(trained[0]) == len(make_rpn()(images, features, targets)[0][0])
