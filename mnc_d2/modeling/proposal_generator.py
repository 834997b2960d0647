"""Stage 1: a region proposal network whose boxes pass gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances

from ..layers import at_least_float32, batch_indices, clip_boxes, image_corners
from .causal_gradients import CausalGradients


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
        min_score: float = 0.0,
        min_proposals: int = 100,
        **kwargs,
    ) -> None:
        """
        Args:
            gradients: whether and how proposals pass gradients; by default the defaults of :class:`CausalGradients`.
                Without ``proposals`` and ``anchors`` this is Detectron2's RPN.
            min_score: objectness, a probability, that proposals need at inference; 0 for none.
            min_proposals: so many, the best, stay whatever their objectness.
            kwargs: the arguments of Detectron2's ``RPN``.
        """
        super().__init__(**kwargs)
        self.gradients = gradients or CausalGradients()
        self.min_score = min_score
        self.min_proposals = min_proposals

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "gradients": CausalGradients.parse(cfg.MODEL.MNC.GRADIENTS),
            "min_score": cfg.MODEL.MNC.PROPOSAL_MIN_SCORE,
            "min_proposals": 2 * cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: one per level, in image pixels.
            pred_objectness_logits: one (N, Hi*Wi*A) per level.
            pred_anchor_deltas: one (N, Hi*Wi*A, 4) per level.
            image_sizes: (height, width) of each image.

        Returns:
            one Instances per image with ``proposal_boxes`` and ``objectness_logits``, highest first. In training,
            unless this is Detectron2's RPN, also the anchor that each proposal comes from, ``anchor_boxes`` (P, 4), and
            the predictions for it, ``anchor_logits`` (P,) and ``anchor_deltas`` (P, 4), which have gradients.

        Raises:
            FloatingPointError: in training, a predicted box or score is not finite.
        """
        # Scores are compared in float32, whatever autocast made of them.
        pred_objectness_logits = [at_least_float32(x) for x in pred_objectness_logits]
        if not self.training or not (self.gradients.proposals or self.gradients.anchors):
            proposals = super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
            if self.training or self.min_score == 0:
                return proposals
            return [x[self.is_promising(x.objectness_logits)] for x in proposals]

        # Only the best of each level can become proposals: no others are decoded.
        best = [x.topk(min(x.shape[1], self.pre_nms_topk[True]), dim=1).indices for x in pred_objectness_logits]
        logits = torch.cat([x.gather(1, i) for x, i in zip(pred_objectness_logits, best)], dim=1)
        deltas = torch.cat(
            [x.gather(1, i[..., None].expand(-1, -1, 4)) for x, i in zip(pred_anchor_deltas, best)], dim=1
        )
        anchor_boxes = torch.cat([x.tensor[i] for x, i in zip(anchors, best)], dim=1)
        levels = torch.cat([torch.full_like(x[0], level) for level, x in enumerate(best)])
        corners = image_corners(image_sizes, anchor_boxes)
        kept = self._select(anchor_boxes, logits.detach(), deltas.detach(), levels, corners)
        counts = [len(x) for x in kept]
        # From all images at once: on a GPU each operator takes its time to start.
        index = torch.cat([x + image * logits.shape[1] for image, x in enumerate(kept)])
        anchor_boxes, logits, deltas = (x.flatten(0, 1).index_select(0, index) for x in (anchor_boxes, logits, deltas))
        boxes = self._decode(anchor_boxes, deltas, corners[batch_indices(counts, index.device)], len(corners))
        return [
            Instances(
                size,
                proposal_boxes=Boxes(boxes),
                objectness_logits=logits.detach(),
                anchor_boxes=anchors,
                anchor_logits=logits,
                anchor_deltas=deltas,
            )
            for size, boxes, anchors, logits, deltas in zip(
                image_sizes, *(x.split(counts) for x in (boxes, anchor_boxes, logits, deltas))
            )
        ]

    @torch.no_grad()
    def _select(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        levels: torch.Tensor,
        corners: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Choose the proposals of each image, as Detectron2's ``find_top_rpn_proposals``, by their index.

        Args:
            anchors, logits, deltas: (N, A, 4), (N, A), (N, A, 4), the best of all levels.
            levels: (A,), the level of each.
            corners: (N, 4), of the images, see :func:`~mnc_d2.layers.image_corners`.

        Returns:
            one (P,) per image, int64, indices into its A anchors, highest score first.
        """
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(anchors)
        if not (boxes.isfinite().all() & logits.isfinite().all()):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        boxes = clip_boxes(boxes, corners[:, None])
        is_large = (boxes[..., 2:] - boxes[..., :2] > self.min_box_size).all(dim=2)
        kept = []
        for of_image, scores, large in zip(boxes, logits, is_large):
            candidates = large.nonzero().squeeze(1)
            chosen = batched_nms(of_image[candidates], scores[candidates], levels[candidates], self.nms_thresh)
            kept.append(candidates[chosen[: self.post_nms_topk[True]]])
        return kept

    def _decode(
        self, anchors: torch.Tensor, deltas: torch.Tensor, corners: torch.Tensor, num_images: int
    ) -> torch.Tensor:
        """Decode proposals (R, 4) from their anchors (R, 4) and deltas (R, 4), to which they pass gradients."""
        deltas = self.gradients.clip_deltas(deltas, num_images) if self.gradients.proposals else deltas.detach()
        boxes = self.box2box_transform.apply_deltas(deltas, anchors)
        return clip_boxes(self.gradients.detach_at_border(boxes, corners, anchors), corners)

    def is_promising(self, logits: torch.Tensor) -> torch.Tensor:
        """Tell which proposals go on to the cascade: (R,), bool.

        Args:
            logits: (R,), their objectness, highest first.
        """
        rank = torch.arange(logits.shape[0], device=logits.device)  # torch.export takes no len()
        return (logits.sigmoid() >= self.min_score) | (rank < self.min_proposals)
