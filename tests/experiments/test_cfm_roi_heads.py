"""Convolutional feature masking: stage 3 of the cascade on mask proposals that are given."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from modeling.inputs import SIZE, make_inputs
from torch import nn

from mnc_d2.experiments import CFMROIHeads

GT = [[8.0, 8.0, 24.0, 24.0], [32.0, 28.0, 56.0, 44.0]]
# On the first instance, on the second, on nothing.
BOXES = [[9.3, 8.2, 25.1, 23.3], [33.1, 27.3, 55.2, 43.1], [20.3, 40.2, 40.1, 60.7]]


class GivenMasks(nn.Module):
    """A mask head that knows the masks: probabilities (R, m, m), in the order of the RoIs."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks

    def layers(self, features):
        assert len(features) == len(self.masks)
        return self.masks.logit()[:, None]


@pytest.fixture
def make_mask_proposals(make_proposals):
    """A function that wraps boxes and masks (P, m, m) as the mask proposals of one image."""

    def make(boxes, masks):
        proposals = make_proposals(boxes)
        proposals.proposal_masks = masks
        return proposals

    return make


def random_masks(count, size=4):
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


def test_losses_are_those_of_stage_3_with_the_same_masks(
    make_roi_heads, make_map, make_proposals, make_mask_proposals, make_target
):
    masks, target = random_masks(3), make_target(GT, [1, 0])
    # All RoIs are taken, in an order that the seed fixes.
    losses = []
    for kind in ("cfm", "mnc"):
        if kind == "cfm":
            heads = make_roi_heads(roi_heads=CFMROIHeads, proposal_append_gt=False)
            proposals = make_mask_proposals(BOXES, masks)
        else:
            torch.manual_seed(1)
            order = make_roi_heads(proposal_append_gt=False).label_boxes(
                [Boxes(torch.tensor(BOXES))], [target], is_first=True
            )
            heads = make_roi_heads(
                proposal_append_gt=False,
                num_passes_train=1,
                mask_head=GivenMasks(masks[order.proposal_index]),
            )
            proposals = make_proposals(BOXES)
        reference = make_roi_heads().state_dict()
        heads.load_state_dict({k: v for k, v in reference.items() if "mask_head" not in k}, strict=False)
        torch.manual_seed(1)
        losses.append(heads(None, make_map(), [proposals], [target])[1])
    cfm, mnc = losses
    assert set(cfm) == {"loss_cls_s3", "loss_seg_cls_s3", "loss_box_reg_s3"}
    for name, loss in cfm.items():
        # logit and sigmoid undo each other up to rounding.
        torch.testing.assert_close(loss, mnc[name], rtol=1e-5, atol=1e-6)
    assert all(loss > 0 for loss in cfm.values())


def test_ground_truth_that_has_a_mask_is_appended(make_roi_heads, make_map, make_mask_proposals, make_target):
    heads = make_roi_heads(roi_heads=CFMROIHeads)
    proposals = make_mask_proposals(BOXES[2:], random_masks(1))
    targets = [make_target(GT, [1, 0], has_mask=[True, False])]
    (labelled,), _ = heads(None, make_map(), [proposals], targets)
    boxes = labelled.proposal_boxes.tensor.tolist()
    assert GT[0] in boxes and GT[1] not in boxes
    # Its mask is that of the instance, so that it is foreground at mask level too.
    index = boxes.index(GT[0])
    assert labelled.gt_seg_classes[index] == labelled.gt_classes[index] == 1


def test_a_mask_that_misses_the_instance_is_background_at_mask_level(
    make_roi_heads, make_map, make_mask_proposals, make_target
):
    heads = make_roi_heads(roi_heads=CFMROIHeads, proposal_append_gt=False)
    masks = torch.ones(2, 4, 4)
    masks[1, :, :2] = masks[1, :2] = 0  # a quarter of the second box, whose instance fills it
    (labelled,), _ = heads(None, make_map(), [make_mask_proposals(BOXES[:2], masks)], [make_target(GT, [1, 0])])
    index = [BOXES.index(pytest.approx(box)) for box in labelled.proposal_boxes.tensor.tolist()]
    assert dict(zip(index, labelled.gt_seg_classes.tolist())) == {0: 1, 1: heads.num_classes}
    assert sorted(labelled.gt_classes.tolist()) == [0, 1]


@pytest.mark.parametrize("count", [0, 3])
def test_images_without_proposals_or_instances(make_roi_heads, make_map, make_mask_proposals, make_target, count):
    heads = make_roi_heads(roi_heads=CFMROIHeads)
    proposals = [make_mask_proposals(BOXES[:count], random_masks(count)), make_mask_proposals(BOXES, random_masks(3))]
    _, losses = heads(None, make_map(n=2), proposals, [make_target([], []), make_target([], [])])
    assert all(loss.isfinite() for loss in losses.values())
    results, _ = heads.eval()(None, make_map(n=2), proposals)
    assert len(results) == 2 and (count or len(results[0]) == 0)


def test_proposals_without_masks_are_an_error_that_names_the_key(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(roi_heads=CFMROIHeads)
    with pytest.raises(ValueError, match="DATASETS.MASK_PROPOSALS"):
        heads(None, make_map(), [make_proposals(BOXES)], [make_target(GT, [1, 0])])


def test_masks_for_given_boxes_are_an_error(make_roi_heads, make_map):
    heads = make_roi_heads(roi_heads=CFMROIHeads)
    heads.passes[0].mask_head = None  # as build_passes has it
    with pytest.raises(TypeError, match="needs masks that are given"):
        heads.forward_with_given_boxes(make_map(), [Instances((64, 64), pred_boxes=Boxes(torch.tensor(BOXES)))])


def test_it_learns_to_tell_proposals_made_from_ground_truth(small_config):
    cfg = small_config(
        **{
            "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
            "MODEL.ROI_HEADS.NAME": "CFMROIHeads",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.5,
        }
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    # Of each instance its mask, and in the same box the rest.
    inputs = make_inputs(count=1)
    proposals = inputs[0]["proposals"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with EventStorage():
        for _ in range(40):
            optimizer.zero_grad()
            sum(model(inputs).values()).backward()
            optimizer.step()
    model.eval()
    (output,) = model([{"image": inputs[0]["image"], "proposals": proposals, "height": SIZE, "width": SIZE}])
    detections, target = output["instances"], inputs[0]["instances"]
    assert sorted(detections.pred_classes.tolist()) == target.gt_classes.tolist()
    for cls, mask in zip(detections.pred_classes, detections.pred_masks):
        expected = target.gt_masks.tensor[target.gt_classes == cls][0]
        assert (mask & expected).sum() / (mask | expected).sum() > 0.8
