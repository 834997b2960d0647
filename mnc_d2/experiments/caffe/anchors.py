"""The anchors of py-faster-rcnn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class CaffeAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of whole pixels with inclusive corners, all ratios of width to height before all sizes.

    MODEL.ANCHOR_GENERATOR.OFFSET must be 0: the anchors themselves are centred on the first cell.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        if cfg.MODEL.ANCHOR_GENERATOR.OFFSET != 0:
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.OFFSET is {cfg.MODEL.ANCHOR_GENERATOR.OFFSET}; CaffeAnchorGenerator needs 0"
            )
        return super().from_config(cfg, input_shape)

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        levels = zip(sizes, aspect_ratios, self.strides)
        return BufferList([_cell_anchors(size, ratio, stride) for size, ratio, stride in levels])


def _cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int) -> torch.Tensor:
    """Anchors of the first cell of a feature map: (ratios * sizes, 4), float32, sizes fastest.

    A cell of stride x stride pixels, from 0 to stride - 1, is reshaped to each ratio (height / width), its sides are
    rounded (half to even), and only then it grows to size / stride times that around its centre.
    """
    widths = np.round(np.sqrt(stride**2 / np.asarray(aspect_ratios, dtype=np.float64)))
    heights = np.round(widths * aspect_ratios)
    scales = np.asarray(sizes, dtype=np.float64) / stride
    sides = np.stack((np.outer(widths, scales), np.outer(heights, scales)), axis=-1).reshape(-1, 2)
    centre, half = (stride - 1) / 2, (sides - 1) / 2
    return torch.from_numpy(np.concatenate((centre - half, centre + half), axis=1)).float()
