"""The RPN's loss on the anchors behind sampled RoIs, by which the released code holds proposals on their objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from fvcore.nn import smooth_l1_loss
from torch import nn

from ...layers import image_corners, inside_image
from .labels import RoILabels


class RoIAnchorLoss(nn.Module):
    """Objectness and regression of the anchors behind sampled RoIs, as the RPN's own loss of its anchors.

    Foreground RoIs: objectness 1 and regression to their instance; background RoIs: objectness 0. Only anchors that lie
    wholly in the image take part. Normalised as Detectron2's RPN does: by RPN.BATCH_SIZE_PER_IMAGE times images.
    """

    @configurable
    def __init__(
        self, *, box2box_transform: Box2BoxTransform, smooth_l1_beta: float, batch_size_per_image: int
    ) -> None:
        """
        Args:
            box2box_transform, smooth_l1_beta, batch_size_per_image: as the RPN has them.
        """
        super().__init__()
        self.box2box_transform = box2box_transform
        self.smooth_l1_beta = smooth_l1_beta
        self.batch_size_per_image = batch_size_per_image

    @classmethod
    def from_config(cls, cfg):
        return {
            "box2box_transform": Box2BoxTransform(weights=cfg.MODEL.RPN.BBOX_REG_WEIGHTS),
            "smooth_l1_beta": cfg.MODEL.RPN.SMOOTH_L1_BETA,
            "batch_size_per_image": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
        }

    def forward(self, proposals: list[Instances], labels: RoILabels, num_classes: int) -> dict[str, torch.Tensor]:
        """
        Args:
            proposals: one per image, with ``anchor_boxes``, ``anchor_logits`` and ``anchor_deltas``, as
                :class:`~mnc_d2.modeling.CausalRPN` makes them.
            labels: of RoIs that were drawn from the proposals and from ground truth, whose anchor nobody knows.
            num_classes: label of the background.

        Returns:
            scalars ``loss_rpn_roi_cls`` and ``loss_rpn_roi_loc``.
        """
        known = (labels.proposal_index >= 0).nonzero().squeeze(1)
        index = labels.proposal_index[known]
        anchors, logits, deltas = (
            torch.cat([x.get(name) for x in proposals]).index_select(0, index)
            for name in ("anchor_boxes", "anchor_logits", "anchor_deltas")
        )
        corners = image_corners([x.image_size for x in proposals], anchors)
        inside = inside_image(anchors, corners[labels.rois[known, 0].long()]).squeeze(1)
        is_foreground = labels.classes[known] < num_classes
        classification = F.binary_cross_entropy_with_logits(logits, is_foreground.to(logits), reduction="none")
        chosen = (is_foreground & inside).nonzero().squeeze(1)
        targets = self.box2box_transform.get_deltas(anchors[chosen], labels.gt_boxes[known[chosen]])
        regression = smooth_l1_loss(deltas.index_select(0, chosen), targets, beta=self.smooth_l1_beta, reduction="sum")
        normalizer = self.batch_size_per_image * max(len(proposals), 1)
        return {
            "loss_rpn_roi_cls": (classification * inside).sum() / normalizer,
            "loss_rpn_roi_loc": regression / normalizer,
        }
