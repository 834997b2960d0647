"""Convolutional feature masking (CFM): the classifier of the cascade on mask proposals that are given."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances

from ..modeling import CascadePass
from ..modeling.roi_heads.labels import boxes_to_rois
from ..modeling.roi_heads.mask_supervision import bit_masks, crop_masks
from ..modeling.roi_heads.metrics import log_metrics
from ..modeling.roi_heads.outputs import PassOutput
from .paper_roi_heads import PaperMNCROIHeads


@ROI_HEADS_REGISTRY.register()
class CFMROIHeads(PaperMNCROIHeads):
    """Stage 3 alone: one pass whose masks are not regressed but come with the proposals.

    Proposals also have ``proposal_masks`` (P, m, m), probabilities in the frames of their boxes.

    The second model of the authors' released code (Dai, He and Sun, CVPR 2015), there on MCG's proposals.
    """

    @configurable
    def __init__(self, *, proposal_append_gt: bool = False, **kwargs) -> None:
        """
        Args:
            proposal_append_gt: whether ground truth that has a mask joins the proposals in training.
            kwargs: the arguments of :class:`~mnc_d2.modeling.MNCROIHeads`, with one pass.
        """
        # Ground truth joins here, where its masks are known, and not in label_boxes.
        super().__init__(**{**kwargs, "num_passes_train": 1, "num_passes_test": 1, "proposal_append_gt": False})
        self.append_gt_proposals = proposal_append_gt

    @classmethod
    def build_passes(cls, cfg, input_shape: dict[str, ShapeSpec]) -> list[CascadePass]:
        """Build one pass, without a mask head."""
        return [CascadePass.from_config(cfg, input_shape, with_mask_head=False)]

    def train_passes(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Run the pass in training; as :meth:`MNCROIHeads.forward`."""
        _check_masks(proposals)
        if self.append_gt_proposals:
            proposals = [_append_gt(*of_image) for of_image in zip(proposals, targets)]
        labels = self.label_boxes([x.proposal_boxes for x in proposals], targets, is_first=True)
        masks = torch.cat([x.proposal_masks for x in proposals])[labels.proposal_index]
        output = self.run_pass(0, features, labels.rois, labels, masks)
        log_metrics([x.proposal_boxes for x in proposals], [(output, labels)], self.num_classes)
        return labels.to_instances(gt_seg_classes=output.seg_classes), self.losses(output, labels)

    def predict(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[PassOutput]:
        """Classify proposals at inference; one output. As :meth:`MNCROIHeads.predict`."""
        _check_masks(proposals)
        rois = boxes_to_rois([x.proposal_boxes for x in proposals])
        return [self.run_pass(0, features, rois, masks=torch.cat([x.proposal_masks for x in proposals]))]


def _check_masks(proposals: list[Instances]) -> None:
    if not all(x.has("proposal_masks") for x in proposals):
        raise ValueError("CFMROIHeads needs mask proposals: set DATASETS.MASK_PROPOSALS to their folder")


def _append_gt(proposals: Instances, target: Instances) -> Instances:
    """Add the ground truth of an image that has a mask, as binary masks in its boxes."""
    if target.has("gt_has_mask"):
        target = target[target.gt_has_mask]
    boxes, index = target.gt_boxes, torch.arange(len(target), device=target.gt_boxes.device)
    masks = crop_masks(bit_masks(target), index, boxes.tensor, proposals.proposal_masks.shape[-1]) >= 0.5
    return Instances(
        target.image_size,
        proposal_boxes=Boxes.cat([proposals.proposal_boxes, boxes]),
        proposal_masks=torch.cat((proposals.proposal_masks, masks.float())),
    )
