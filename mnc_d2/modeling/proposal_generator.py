"""Stage 1: a region proposal network whose boxes pass gradients."""

import torch
from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances

from ..layers import at_least_float32, clip_gradient, inside_image, pass_gradient


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
        proposal_gradient: bool = True,
        delta_gradient_clip: float = 1.0 / 512,
        border_gradient: bool = False,
        **kwargs,
    ) -> None:
        """
        Args:
            proposal_gradient: whether proposals pass gradients; if not, this is Detectron2's RPN.
            delta_gradient_clip: limit of each element of the gradient that the later stages send to the deltas; 0 for
                none. The RPN's own losses are not concerned.
            border_gradient: whether proposals that the image border clips, and those of anchors that cross it, pass
                gradients.
            kwargs: those of Detectron2's ``RPN``.
        """
        super().__init__(**kwargs)
        self.proposal_gradient = proposal_gradient
        self.delta_gradient_clip = delta_gradient_clip
        self.border_gradient = border_gradient

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "proposal_gradient": cfg.MODEL.MNC.PROPOSAL_GRADIENT,
            "delta_gradient_clip": cfg.MODEL.MNC.DELTA_GRADIENT_CLIP,
            "border_gradient": cfg.MODEL.MNC.BORDER_GRADIENT,
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
            one Instances per image with ``proposal_boxes`` and ``objectness_logits``, highest first.
        """
        # Scores are compared in float32, whatever autocast made of them.
        pred_objectness_logits = [at_least_float32(x) for x in pred_objectness_logits]
        if not (self.training and self.proposal_gradient):
            return super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)

        deltas = [clip_gradient(x, self.delta_gradient_clip) for x in pred_anchor_deltas]
        proposals = self._decode_proposals(anchors, deltas)
        if not self.border_gradient:
            proposals = [
                pass_gradient(
                    boxes,
                    torch.stack([inside_image(x, s) & inside_image(a.tensor, s) for x, s in zip(boxes, image_sizes)]),
                )
                for boxes, a in zip(proposals, anchors)
            ]
        # Unlike Detectron2's RPN, not under no_grad: it gathers and clips the boxes differentiably.
        return find_top_rpn_proposals(
            proposals,
            [x.detach() for x in pred_objectness_logits],
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[True],
            self.post_nms_topk[True],
            self.min_box_size,
            True,
        )
