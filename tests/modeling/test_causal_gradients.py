"""Which earlier stages the losses of the cascade reach, and the switches that stop them."""

import pytest
import torch
from torch import nn

from mnc_d2.modeling import CausalGradients

GT = [[8.0, 8.0, 24.0, 24.0], [32.0, 28.0, 56.0, 44.0]]
# Foreground and background, well inside the image of 64 x 64.
BOXES = [
    [9.3, 8.2, 25.1, 23.3],
    [7.2, 7.1, 23.4, 26.2],
    [33.1, 27.3, 55.2, 43.1],
    [30.7, 30.2, 50.1, 44.9],
    [20.3, 40.2, 40.1, 60.7],
    [40.2, 5.3, 60.4, 20.2],
]


class LeafMasks(nn.Module):
    """A mask head whose logits are leaves: the gradient of each call is kept."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = value
        self.logits = []

    def layers(self, features):
        logits = torch.full((len(features), 1, 4, 4), self.value)
        logits[::2] *= -1  # every second mask is empty, so that it is background at mask level
        self.logits.append(logits.requires_grad_())
        return self.logits[-1]


def run(heads, make_map, make_proposals, make_target, boxes=BOXES):
    """Train on one image; return the losses, the leaf of the proposals, and the labelled proposals."""
    leaf = torch.tensor(boxes).requires_grad_()
    torch.manual_seed(0)
    (labelled,), losses = heads(None, make_map(), [make_proposals(leaf)], [make_target(GT, [1, 0])])
    return losses, leaf, labelled


def predictor_of(heads):
    return heads.passes[0].classifier.predictor


def gradient(loss, tensor):
    """Gradient of a loss, zero where it does not depend on the tensor."""
    (result,) = torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)
    return torch.zeros_like(tensor) if result is None else result


# ---- boxes


@pytest.mark.parametrize("name", ["loss_mask_s2", "loss_cls_s3", "loss_seg_cls_s3", "loss_mask_s4", "loss_cls_s5"])
def test_every_loss_reaches_the_proposals(make_roi_heads, make_map, make_proposals, make_target, name):
    losses, leaf, _ = run(make_roi_heads(border=True), make_map, make_proposals, make_target)
    assert gradient(losses[name], leaf).abs().sum() > 0


def test_mask_loss_reaches_the_boxes_of_foreground_only(make_roi_heads, make_map, make_proposals, make_target):
    losses, leaf, _ = run(make_roi_heads(), make_map, make_proposals, make_target)
    reached = (gradient(losses["loss_mask_s2"], leaf) != 0).any(dim=1)
    assert reached.tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("none", [False] * 6), ("foreground", [True] * 4 + [False] * 2), ("all", [True] * 6)],
)
def test_coordinate_gradient_says_which_boxes_losses_reach(
    make_roi_heads, make_map, make_proposals, make_target, setting, expected
):
    heads = make_roi_heads(coordinates=setting)
    losses, leaf, _ = run(heads, make_map, make_proposals, make_target)
    assert (gradient(losses["loss_cls_s3"], leaf) != 0).any(dim=1).tolist() == expected


@pytest.mark.parametrize("switch", [True, False])
def test_the_mask_head_passes_coordinate_gradients_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, switch
):
    heads = make_roi_heads(mask_coordinates=switch, moving_targets=True, masks="all")
    losses, leaf, _ = run(heads, make_map, make_proposals, make_target)
    assert bool(gradient(losses["loss_mask_s2"], leaf).any()) == switch
    # The classifier's gradient through the features under the mask is not concerned, that through the mask is.
    assert gradient(losses["loss_cls_s3"], leaf).any()


@pytest.mark.parametrize("switch", [True, False])
def test_box_regression_reaches_its_boxes_through_targets_that_move(
    make_roi_heads, make_map, make_proposals, make_target, switch
):
    heads = make_roi_heads(moving_targets=switch)
    torch.nn.init.zeros_(
        predictor_of(heads).bbox_pred.weight
    )  # what features say of the deltas does not depend on boxes
    losses, leaf, _ = run(heads, make_map, make_proposals, make_target)
    assert bool(gradient(losses["loss_box_reg_s3"], leaf).any()) == switch


def test_features_get_one_kth_of_the_gradient_of_k_passes_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target
):
    gradients = []
    for switch in (False, True):
        features = {name: x.requires_grad_() for name, x in make_map().items()}
        heads = make_roi_heads(average_features=switch, boxes=False)
        losses, leaf, _ = run(heads, lambda features=features: features, make_proposals, make_target)
        loss = sum(losses.values())
        gradients.append((gradient(loss, features["map"]), gradient(loss, leaf)))
    (full, of_boxes), (scaled, of_scaled_boxes) = gradients
    torch.testing.assert_close(scaled, full / 2)
    assert torch.equal(of_boxes, of_scaled_boxes)


@pytest.mark.parametrize("append", [True, False])
def test_ground_truth_is_appended_in_the_second_pass_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, append, storage
):
    heads = make_roi_heads(append_gt_to_later_passes=append, proposal_append_gt=False)
    calls = []
    heads.pooler.register_forward_pre_hook(lambda module, args: calls.append(len(args[1])))
    run(heads, make_map, make_proposals, make_target)
    assert calls == [len(BOXES), len(BOXES) + 2 * append]


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("name", ["loss_mask_s4", "loss_cls_s5", "loss_seg_cls_s5", "loss_box_reg_s5"])
def test_second_pass_reaches_the_proposals_through_its_boxes_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, name, switch
):
    losses, leaf, _ = run(make_roi_heads(boxes=switch), make_map, make_proposals, make_target)
    assert bool(gradient(losses[name], leaf).abs().sum() > 0) == switch


@pytest.mark.parametrize("switch", [True, False])
def test_mask_loss_of_the_second_pass_reaches_the_box_deltas_of_the_first_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, switch
):
    heads = make_roi_heads(boxes=switch)
    losses, _, _ = run(heads, make_map, make_proposals, make_target)
    assert bool(gradient(losses["loss_mask_s4"], predictor_of(heads).bbox_pred.weight).abs().sum() > 0) == switch


def capture_deltas(heads):
    """Return a list that will hold the predicted deltas of each pass."""
    deltas = []
    predictor_of(heads).register_forward_hook(lambda module, args, output: deltas.append(output[2]))
    return deltas


@pytest.mark.parametrize("limit", [1 / 512, 1e-3])
def test_each_element_of_the_delta_gradient_is_clipped(make_roi_heads, make_map, make_proposals, make_target, limit):
    gradients = []
    for clip in (0, limit):
        heads = make_roi_heads(delta_clip=clip)
        deltas = capture_deltas(heads)
        losses, _, _ = run(heads, make_map, make_proposals, make_target)
        gradients.append(gradient(1e3 * losses["loss_mask_s4"], deltas[0]))
    free, clipped = gradients
    assert free.abs().max() > limit
    assert torch.equal(clipped, free.clamp(-limit, limit))


def test_box_regression_loss_is_not_clipped(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(delta_clip=1e-9)
    deltas = capture_deltas(heads)
    losses, _, _ = run(heads, make_map, make_proposals, make_target)
    assert gradient(losses["loss_box_reg_s3"], deltas[0]).abs().max() > 1e-3


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize(
    "shift", [(-30.0, 0.0), (0.0, -30.0), (30.0, 0.0), (0.0, 30.0)], ids=["left", "top", "right", "bottom"]
)
def test_boxes_that_regression_pushes_over_the_border_pass_gradients_only_if_switched_on(
    make_roi_heads, make_map, make_proposals, make_target, border, shift
):
    heads = make_roi_heads(border=border, proposal_append_gt=False)
    nn.init.zeros_(predictor_of(heads).bbox_pred.weight)
    nn.init.zeros_(predictor_of(heads).bbox_pred.bias)
    box = [[20.3, 21.2, 44.1, 45.2]]
    # Shifts of the box by that many pixels, for the weights 10 of the box transform; all classes alike.
    with torch.no_grad():
        predictor_of(heads).bbox_pred.bias.view(-1, 4)[:, :2] = torch.tensor(shift) / 24 * 10
    losses, leaf, _ = run(heads, make_map, make_proposals, make_target, box)
    reached = gradient(losses["loss_cls_s5"], leaf).abs().sum() > 0
    assert bool(reached) == border


def test_boxes_inside_pass_gradients_without_border_gradient(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(border=False, proposal_append_gt=False)
    nn.init.zeros_(predictor_of(heads).bbox_pred.weight)
    losses, leaf, _ = run(heads, make_map, make_proposals, make_target, [[20.3, 21.2, 44.1, 45.2]])
    assert gradient(losses["loss_cls_s5"], leaf).abs().sum() > 0


# ---- masks


def reaches_masks(loss, heads):
    """Which RoIs' mask logits of the first pass a loss reaches, (R,), bool."""
    return gradient(loss, heads.passes[0].mask_head.logits[0]).abs().sum(dim=(1, 2, 3)) > 0


def classification_gradients(heads, make_map, make_proposals, make_target):
    """Which RoIs' mask logits of the first pass the classifier reaches, and which RoIs are mask-level foreground."""
    losses, _, labelled = run(heads, make_map, make_proposals, make_target)
    reached = reaches_masks(losses["loss_cls_s3"] + losses["loss_seg_cls_s3"], heads)
    return reached, labelled.gt_seg_classes < heads.num_classes


def test_mask_gradient_none_keeps_the_classifier_from_every_mask(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(masks="none", mask_head=LeafMasks())
    reached, _ = classification_gradients(heads, make_map, make_proposals, make_target)
    assert not reached.any()


def test_mask_gradient_foreground_reaches_the_masks_of_mask_level_foreground(
    make_roi_heads, make_map, make_proposals, make_target
):
    heads = make_roi_heads(masks="foreground", mask_head=LeafMasks())
    reached, foreground = classification_gradients(heads, make_map, make_proposals, make_target)
    assert torch.equal(reached, foreground)
    assert 0 < foreground.sum() < len(foreground)


def test_mask_gradient_all_reaches_every_mask(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(masks="all", mask_head=LeafMasks())
    reached, _ = classification_gradients(heads, make_map, make_proposals, make_target)
    assert reached.all()


@pytest.mark.parametrize("masks", ["none", "foreground", "all"])
def test_mask_gradient_does_not_change_values(make_roi_heads, make_map, make_proposals, make_target, masks):
    expected, _, _ = run(make_roi_heads(), make_map, make_proposals, make_target)
    losses, _, _ = run(make_roi_heads(masks=masks), make_map, make_proposals, make_target)
    assert losses == expected


@pytest.mark.parametrize("masks", ["none", "foreground", "all"])
def test_mask_loss_always_reaches_its_masks(make_roi_heads, make_map, make_proposals, make_target, masks):
    heads = make_roi_heads(masks=masks, mask_head=LeafMasks())
    losses, _, labelled = run(heads, make_map, make_proposals, make_target)
    reached = reaches_masks(losses["loss_mask_s2"], heads)
    assert torch.equal(reached, labelled.gt_classes < heads.num_classes)


# ---- as a text


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("default", "default"),
        ("released", "released"),
        ("stepwise", "stepwise"),
        ("coordinates=all", "default, coordinates=all"),
        ("default, proposals=False, boxes=false,masks = none", "stepwise"),
        ("released, coordinates=foreground, delta_clip=0", "released, coordinates=foreground, delta_clip=0.0"),
        ("stepwise, border=True, anchors=False", "stepwise, border=True, anchors=False"),
    ],
)
def test_the_text_of_gradients_is_the_shortest_that_means_the_same(text, shortest):
    gradients = CausalGradients.parse(text)
    assert str(gradients) == shortest
    assert CausalGradients.parse(shortest) == gradients


def test_presets_are_the_default_the_released_code_and_no_gradients():
    assert CausalGradients.parse("default") == CausalGradients()
    assert CausalGradients.parse("released") == CausalGradients(
        coordinates="all", mask_coordinates=True, moving_targets=False, average_features=False
    )
    assert CausalGradients.parse("stepwise") == CausalGradients(proposals=False, boxes=False, masks="none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has ''. There are: default, released, stepwise."),
        ("relesed", "has 'relesed'. Did you mean 'released'?"),
        ("released, coordinate=all", "has 'coordinate'. Did you mean 'coordinates'? There are: proposals, boxes,"),
        ("default, released", "has 'released' in the middle. One preset comes first."),
        ("masks=foregrond", "has masks=foregrond. Did you mean 'foreground'? There are: none, foreground, all."),
        ("border=perhaps", "has border=perhaps. There are: True, False."),
        ("delta_clip=x", "has delta_clip=x. It must be a number, 0 or more."),
        ("delta_clip=-1", "has delta_clip=-1.0. It must be a number, 0 or more."),
        ("delta_clip=nan", "has delta_clip=nan. It must be a number, 0 or more."),
    ],
)
def test_a_wrong_text_is_an_error_that_names_the_key_and_the_word(text, message):
    with pytest.raises(ValueError) as error:
        CausalGradients.parse(text)
    assert f"MODEL.MNC.GRADIENTS {message}" in str(error.value)


def test_the_loss_scale_multiplies_the_limit_of_deltas():
    deltas = torch.zeros(1, 4, requires_grad=True)
    gradients = CausalGradients(delta_clip=0.5)
    gradients.loss_scale = 8.0
    (100 * gradients.clip_deltas(deltas, num_images=2)).sum().backward()
    assert deltas.grad.tolist() == [[2.0] * 4]
