"""Stage 1 as released: anchors of whole pixels, and proposals of inclusive corners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList, DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from ...modeling import CausalRPN
from .boxes import InclusiveBoxTransform, NetworkInputSize, clip_to_pixels, pixel_extents


@PROPOSAL_GENERATOR_REGISTRY.register()
class CaffeRPN(CausalRPN):
    """An RPN on one feature map that selects proposals as the released proposal layer does, at inference.

    Boxes are clipped to the pixels of the image. Those whose sides are shorter than MODEL.PROPOSAL_GENERATOR.MIN_SIZE
    pixels of the image at its original scale are left out, before anything is counted.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        if len(cfg.MODEL.RPN.IN_FEATURES) != 1:
            raise ValueError(f"CaffeRPN takes one feature map, MODEL.RPN.IN_FEATURES has {cfg.MODEL.RPN.IN_FEATURES}")
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "box2box_transform": InclusiveBoxTransform(cfg.MODEL.RPN.BBOX_REG_WEIGHTS)}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """As :meth:`CausalRPN.predict_proposals`, with inclusive corners; the sizes are :class:`NetworkInputSize`."""
        (decoded,) = self._decode_proposals(anchors, pred_anchor_deltas)
        (scores,) = pred_objectness_logits
        return [self._select_of_image(*of_image) for of_image in zip(decoded, scores.float(), image_sizes)]

    def _select_of_image(self, boxes: torch.Tensor, scores: torch.Tensor, size: tuple[int, int]) -> Instances:
        """Choose the proposals of one image among boxes (P, 4) with scores (P,)."""
        assert isinstance(size, NetworkInputSize)
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


@ANCHOR_GENERATOR_REGISTRY.register()
class CaffeAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of whole pixels with inclusive corners, all ratios of width to height before all sizes.

    MODEL.ANCHOR_GENERATOR.OFFSET must be 0: the anchors themselves are centred on the first cell.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        if offset != 0:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}; CaffeAnchorGenerator needs 0")
        return super().from_config(cfg, input_shape)

    def _calculate_anchors(self, sizes: list[list[float]], aspect_ratios: list[list[float]]) -> BufferList:
        return BufferList([_cell_anchors(*level) for level in zip(sizes, aspect_ratios, self.strides)])


def _cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int) -> torch.Tensor:
    """Anchors of the first cell of a feature map: (ratios * sizes, 4), float32, sizes fastest.

    A cell of stride x stride pixels, from 0 to stride - 1, is reshaped to each ratio (height / width), its sides are
    rounded (half to even), and only then it grows to size / stride times that around its centre.
    """
    widths = np.round(np.sqrt(stride**2 / np.asarray(aspect_ratios)))
    heights = np.round(widths * aspect_ratios)
    sides = np.stack((widths, heights), axis=1)[:, None] * (np.asarray(sizes) / stride)[:, None]  # (ratios, sizes, 2)
    centre, half = (stride - 1) / 2, (sides.reshape(-1, 2) - 1) / 2
    return torch.from_numpy(np.concatenate((centre - half, centre + half), axis=1)).float()
