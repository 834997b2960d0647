"""The RPN's loss on the anchors behind sampled RoIs, by which the released code holds proposals on their objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from fvcore.nn import smooth_l1_loss
from torch import nn

from ..layers import clip_boxes, inside_image


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
    for proposal, anchors_of_image, boxes_of_image, logits_of_image, deltas_of_image in zip(
        proposals, anchors, boxes.detach(), logits, deltas
    ):
        clipped = clip_boxes(boxes_of_image, proposal.image_size)
        # Equal logits alone may be a coincidence; of equal boxes with equal logits, NMS leaves one.
        same = proposal.objectness_logits[:, None] == logits_of_image.detach()  # (P, A)
        # Comparing is faster where values lie side by side.
        for corner, anchor_corner in zip(proposal.proposal_boxes.tensor.T.contiguous(), clipped.T.contiguous()):
            same &= corner[:, None] == anchor_corner
        index = same.to(torch.uint8).argmax(dim=1)
        proposal.anchor_boxes = anchors_of_image[index]
        proposal.anchor_logits = logits_of_image[index]
        proposal.anchor_deltas = deltas_of_image[index]


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
        classification, regression = [], []
        for proposal, rois in zip(proposals, sampled):
            # Indexing by positions, not by masks: where a mask is true has to be read back from a GPU every time.
            rois = rois[(rois.proposal_index < len(proposal)).nonzero().squeeze(1)]
            index = rois.proposal_index
            anchors = proposal.anchor_boxes[index]
            inside = inside_image(anchors, proposal.image_size).squeeze(1)
            foreground = rois.gt_classes < num_classes
            losses = F.binary_cross_entropy_with_logits(
                proposal.anchor_logits[index], foreground.to(anchors), reduction="none"
            )
            classification.append((losses * inside).sum())
            chosen = (foreground & inside).nonzero().squeeze(1)
            targets = self.box2box_transform.get_deltas(anchors[chosen], rois.gt_boxes.tensor[chosen])
            deltas = proposal.anchor_deltas[index[chosen]]
            regression.append(smooth_l1_loss(deltas, targets, beta=self.smooth_l1_beta, reduction="sum"))
        normalizer = self.batch_size_per_image * max(len(proposals), 1)
        return {
            "loss_rpn_roi_cls": sum(classification) / normalizer,
            "loss_rpn_roi_loc": sum(regression) / normalizer,
        }
