"""Convolutional feature masking (CFM): the classifier of the cascade on mask proposals that are given."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances

from ..modeling import CascadePass, MNCROIHeads
from ..modeling.roi_heads.mask_supervision import crop_masks, mask_targets
from ..modeling.roi_heads.metrics import log_metrics
from ..modeling.roi_heads.outputs import PassOutput


@ROI_HEADS_REGISTRY.register()
class CFMROIHeads(MNCROIHeads):
    """Stage 3 alone: one pass whose masks are not regressed but come with the proposals.

    Proposals also have ``proposal_masks`` (P, m, m), probabilities in the frames of their boxes.

    The second model of the authors' released code (Dai, He and Sun, CVPR 2015), there on MCG's proposals.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        """
        Args:
            kwargs: those of :class:`MNCROIHeads`, with one pass.
        """
        super().__init__(**{**kwargs, "num_passes_train": 1, "num_passes_test": 1})

    @classmethod
    def build_passes(cls, cfg, channels: int) -> list[CascadePass]:
        """One pass, without a mask head."""
        return [CascadePass.from_config(cfg, channels, with_mask_head=False)]

    def _train(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        boxes, masks = [x.proposal_boxes for x in proposals], _given_masks(proposals)
        if self.proposal_append_gt:
            with_mask = [x[x.gt_has_mask] if x.has("gt_has_mask") else x for x in targets]
            boxes = [Boxes.cat([x, target.gt_boxes]) for x, target in zip(boxes, with_mask)]
            masks = [torch.cat((x, _gt_proposals(target, x.shape[-1]))) for x, target in zip(masks, with_mask)]
        labelled = self.label_proposals(boxes, targets, sample=True)
        sampled = torch.cat([x[proposal.proposal_index] for x, proposal in zip(masks, labelled)])
        _, pooled = self.pooler(features, [x.proposal_boxes for x in labelled], 0)
        truth = mask_targets(labelled, targets, sampled.shape[-1])
        _, losses, metrics = self._train_classifier(0, pooled, sampled, labelled, truth)
        log_metrics(metrics)
        return labelled, losses

    def run_passes(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[PassOutput]:
        """Classify proposals at inference; one output. As :meth:`MNCROIHeads.run_passes`."""
        boxes, masks = [x.proposal_boxes for x in proposals], torch.cat(_given_masks(proposals))
        _, pooled = self.pooler(features, boxes, 0)
        sizes = [x.image_size for x in proposals]
        return [PassOutput(0, boxes, sizes, masks, *self.get_pass(0).classifier(pooled, masks))]

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Not possible: raises a TypeError, for nothing here makes masks for boxes."""
        raise TypeError("CFMROIHeads cannot predict masks for given boxes, as test-time augmentation asks for")


def _given_masks(proposals: list[Instances]) -> list[torch.Tensor]:
    if any(not x.has("proposal_masks") for x in proposals):
        raise ValueError("CFMROIHeads needs mask proposals: set DATASETS.MASK_PROPOSALS to their folder")
    return [x.proposal_masks for x in proposals]


def _gt_proposals(target: Instances, size: int) -> torch.Tensor:
    """The masks of the ground truth of one image as mask proposals in its boxes: (G, size, size), 0 or 1."""
    masks = target.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *target.image_size).to(target.gt_boxes.device)
    index = torch.arange(len(target), device=target.gt_boxes.device)
    return (crop_masks(masks.tensor, index, target.gt_boxes.tensor, size) >= 0.5).float()
