"""Stage 1 as released: proposals of inclusive corners."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from ...modeling.proposal_generator import CausalRPN
from .boxes import InclusiveBoxTransform, NetworkInputSize, clip_to_pixels, pixel_extents


@PROPOSAL_GENERATOR_REGISTRY.register()
class CaffeRPN(CausalRPN):
    """An RPN on one feature map that selects proposals as the released proposal layer does, at inference.

    Boxes are clipped to the pixels of the image. Those whose sides are shorter than MODEL.PROPOSAL_GENERATOR.MIN_SIZE
    pixels of the image at its original scale are left out, before anything is counted.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        """
        Args:
            kwargs: those of :class:`~mnc_d2.modeling.CausalRPN`.
        """
        super().__init__(**kwargs)
        if len(self.in_features) != 1:
            raise ValueError(f"CaffeRPN takes one feature map, MODEL.RPN.IN_FEATURES has {list(self.in_features)}")

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "box2box_transform": InclusiveBoxTransform(cfg.MODEL.RPN.BBOX_REG_WEIGHTS)}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[NetworkInputSize],
    ) -> list[Instances]:
        """As :meth:`CausalRPN.predict_proposals`, with inclusive corners."""
        (decoded,) = self._decode_proposals(anchors, pred_anchor_deltas)
        (scores,) = pred_objectness_logits
        return [self._select(*of_image) for of_image in zip(decoded, scores.float(), image_sizes)]

    def _select(self, boxes: torch.Tensor, scores: torch.Tensor, size: NetworkInputSize) -> Instances:
        """Choose the proposals of one image among boxes (P, 4) with scores (P,)."""
        boxes = clip_to_pixels(boxes, size)
        extents = pixel_extents(boxes)
        sides = extents[:, 2:] - extents[:, :2]
        # Comparisons with NaN are false: what is not finite is left out, too.
        valid = (sides >= self.min_box_size * size.scale).all(dim=1) & scores.isfinite()
        candidates = valid.nonzero().squeeze(1)
        order = scores[candidates].argsort(descending=True, stable=True)[: self.pre_nms_topk[False]]
        candidates = candidates[order]
        kept = candidates[nms(extents[candidates], scores[candidates], self.nms_thresh)[: self.post_nms_topk[False]]]
        return Instances(size, proposal_boxes=Boxes(boxes[kept]), objectness_logits=scores[kept])
