"""The RPN's loss on the anchors behind sampled RoIs, by which the released code holds proposals on their objects."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from fvcore.nn import smooth_l1_loss
from torch import nn

from ..layers import clip_boxes, image_corners, inside_image


def attach_anchors(
    proposals: list[Instances],
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    logits: torch.Tensor,
    deltas: torch.Tensor,
) -> None:
    """Give each proposal the anchor that it comes from, and what the RPN predicts for it.

    Args:
        proposals: N, with ``proposal_boxes`` and ``objectness_logits``; they are given ``anchor_boxes`` (P, 4),
            ``anchor_logits`` (P,) and ``anchor_deltas`` (P, 4), the latter two with their gradients.
        anchors, boxes, logits, deltas: (N, A, 4), (N, A, 4), (N, A), (N, A, 4): the anchors that proposals were chosen
            from, their decoded boxes, and what is predicted for them.
    """
    count, counts = logits.shape[1], [len(x) for x in proposals]
    sizes = [x.image_size for x in proposals]
    corners = image_corners(sizes, [count] * len(sizes), boxes)
    clipped = clip_boxes(boxes.detach().flatten(0, 1), corners).view_as(boxes)
    # Chosen from those of all images at once: on a GPU each operator takes its time to start.
    index = torch.cat(
        [
            _find(proposal, *of_image) + number * count
            for number, (proposal, *of_image) in enumerate(zip(proposals, clipped, logits.detach()))
        ]
    )
    chosen = (x.flatten(0, 1).index_select(0, index).split(counts) for x in (anchors, logits, deltas))
    for proposal, *of_image in zip(proposals, *chosen):
        proposal.anchor_boxes, proposal.anchor_logits, proposal.anchor_deltas = of_image


def _find(proposal: Instances, boxes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Which of A boxes (A, 4) with their logits (A,) became each proposal of an image: (P,), int64."""
    # Equal logits alone may be a coincidence; of equal boxes with equal logits, NMS leaves one.
    same = proposal.objectness_logits[:, None] == logits  # (P, A)
    # Comparing is faster where values lie side by side.
    for coordinate, of_boxes in zip(proposal.proposal_boxes.tensor.T.contiguous(), boxes.T.contiguous()):
        same &= coordinate[:, None] == of_boxes
    return same.to(torch.uint8).argmax(dim=1)


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
            box2box_transform, smooth_l1_beta, batch_size_per_image: those of the RPN.
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

    def forward(
        self, proposals: list[Instances], sampled: list[Instances], num_classes: int
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            proposals: one per image, as :func:`attach_anchors` leaves them.
            sampled: one per image, as ``MNCROIHeads.label_proposals`` returns them; of the boxes that ``proposals`` do
                not have, the ground truth, no anchor is known.
            num_classes: label of the background.

        Returns:
            scalars ``loss_rpn_roi_cls`` and ``loss_rpn_roi_loc``.
        """
        counts = [len(x) for x in sampled]
        # Of proposals of all images at once: on a GPU each operator takes its time to start.
        firsts = accumulate((len(x) for x in proposals), initial=0)
        has_anchor = torch.cat([x.proposal_index < len(proposal) for x, proposal in zip(sampled, proposals)])
        known = has_anchor.nonzero().squeeze(1)
        index = torch.cat([x.proposal_index + first for x, first in zip(sampled, firsts)])[known]
        anchors, logits, deltas = (
            torch.cat([x.get(name) for x in proposals]).index_select(0, index)
            for name in ("anchor_boxes", "anchor_logits", "anchor_deltas")
        )
        corners = image_corners([x.image_size for x in proposals], counts, anchors)[known]
        inside = inside_image(anchors, corners).squeeze(1)
        is_foreground = torch.cat([x.gt_classes for x in sampled])[known] < num_classes
        classification = F.binary_cross_entropy_with_logits(logits, is_foreground.to(logits), reduction="none")
        chosen = (is_foreground & inside).nonzero().squeeze(1)
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in sampled])[known[chosen]]
        targets = self.box2box_transform.get_deltas(anchors[chosen], gt_boxes)
        regression = smooth_l1_loss(deltas.index_select(0, chosen), targets, beta=self.smooth_l1_beta, reduction="sum")
        normalizer = self.batch_size_per_image * max(len(proposals), 1)
        return {
            "loss_rpn_roi_cls": (classification * inside).sum() / normalizer,
            "loss_rpn_roi_loc": regression / normalizer,
        }
