"""Stage 1: a region proposal network whose boxes pass gradients."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances

from ..layers import at_least_float32, clip_boxes, image_corners
from .causal_gradients import CausalGradients
from .roi_anchors import attach_anchors


@PROPOSAL_GENERATOR_REGISTRY.register()
class CausalRPN(RPN):
    """Detectron2's RPN, but in training the proposals stay attached to the predicted deltas.

    Which anchors become proposals (top k, NMS) is a constant; where they lie is a function of the deltas, so that the
    losses of the later stages reach the RPN through box coordinates (section 3.2).
    """

    @configurable
    def __init__(
        self,
        *,
        gradients: CausalGradients | None = None,
        roi_anchor_loss: bool = False,
        min_score: float = 0.0,
        min_proposals: int = 100,
        **kwargs,
    ) -> None:
        """
        Args:
            gradients: whether and how proposals pass gradients; the defaults of :class:`CausalGradients` by default.
                Without ``proposal_gradient`` and ``roi_anchor_loss`` this is Detectron2's RPN.
            roi_anchor_loss: whether proposals carry their anchors, for
                :class:`~mnc_d2.modeling.roi_anchors.RoIAnchorLoss`, also without ``proposal_gradient``.
            min_score: objectness, a probability, under which proposals are left out at inference; 0 for none.
            min_proposals: so many, the best, stay whatever their objectness.
            kwargs: those of Detectron2's ``RPN``.
        """
        super().__init__(**kwargs)
        self.gradients = gradients or CausalGradients()
        self.roi_anchor_loss = roi_anchor_loss
        self.min_score = min_score
        self.min_proposals = min_proposals

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "gradients": CausalGradients.from_config(cfg),
            "roi_anchor_loss": cfg.MODEL.MNC.ROI_ANCHOR_LOSS,
            "min_score": cfg.MODEL.MNC.PROPOSAL_MIN_SCORE,
            "min_proposals": 2 * cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: one per level, in image pixels.
            pred_objectness_logits: one (N, Hi*Wi*A) per level.
            pred_anchor_deltas: one (N, Hi*Wi*A, 4) per level.
            image_sizes: (height, width) of each image.

        Returns:
            one Instances per image with ``proposal_boxes`` and ``objectness_logits``, highest first, and in training,
            unless this is Detectron2's RPN, what :func:`~mnc_d2.modeling.roi_anchors.attach_anchors` adds.
        """
        # Scores are compared in float32, whatever autocast made of them.
        pred_objectness_logits = [at_least_float32(x) for x in pred_objectness_logits]
        attached = self.gradients.proposal_gradient
        if not self.training or not (attached or self.roi_anchor_loss):
            proposals = super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
            if self.training or self.min_score == 0:
                return proposals
            return [x[self.is_promising(x.objectness_logits)] for x in proposals]

        # Only the best of each level can become proposals: no others are decoded.
        best = [x.topk(min(x.shape[1], self.pre_nms_topk[True]), dim=1).indices for x in pred_objectness_logits]
        logits = [x.gather(1, i) for x, i in zip(pred_objectness_logits, best)]
        deltas = torch.cat(
            [x.gather(1, i[..., None].expand(-1, -1, 4)) for x, i in zip(pred_anchor_deltas, best)], dim=1
        )
        anchors = torch.cat([x.tensor[i] for x, i in zip(anchors, best)], dim=1)
        boxes = self.box2box_transform.apply_deltas(deltas.detach().flatten(0, 1), anchors.flatten(0, 1))
        boxes = boxes.view_as(anchors)
        proposals = find_top_rpn_proposals(
            boxes.split([x.shape[1] for x in best], dim=1),
            [x.detach() for x in logits],
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[True],
            self.post_nms_topk[True],
            self.min_box_size,
            True,
        )
        attach_anchors(proposals, anchors, boxes, torch.cat(logits, dim=1), deltas)
        if attached:
            self._attach_boxes(proposals)
        return proposals

    def _attach_boxes(self, proposals: list[Instances]) -> None:
        """Compute the boxes of proposals again from their anchors and deltas, so that they pass gradients to these."""
        counts = [len(x) for x in proposals]
        anchors, deltas = (torch.cat([x.get(name) for x in proposals]) for name in ("anchor_boxes", "anchor_deltas"))
        corners = image_corners([x.image_size for x in proposals], counts, anchors)
        boxes = self.box2box_transform.apply_deltas(self.gradients.clip_deltas(deltas, len(proposals)), anchors)
        boxes = clip_boxes(self.gradients.at_border(boxes, corners, anchors), corners)
        for proposal, of_image in zip(proposals, boxes.split(counts)):
            proposal.proposal_boxes = Boxes(of_image)

    def is_promising(self, logits: torch.Tensor) -> torch.Tensor:
        """Which proposals, given their objectness (R,), highest first, go on to the cascade: (R,), bool."""
        rank = torch.arange(logits.shape[0], device=logits.device)  # torch.export takes no len()
        return (logits.sigmoid() >= self.min_score) | (rank < self.min_proposals)
