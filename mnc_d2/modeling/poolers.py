"""Pooling of RoI features from one or more feature maps, with gradients to the boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import nn

from ..layers import BagMaxMemory, roi_warp_pyramid, roi_warp_pyramid_twice


class RoIWarpPooler(nn.Module):
    """RoI warp with the interface of Detectron2's ``ROIPooler``.

    A box takes its features from the pyramid level that equation 1 of the FPN paper gives to its size, with the
    gradient of the samples with respect to its coordinates.

    Args:
        output_size: side S of the pooled features.
        scales: feature-map pixels per image pixel, per level; 1 / stride, each half of the one before.
        sampling_ratio: 1 for one bilinear sample per output element, 2 for the maximum of 2 x 2 samples (the paper).
        sampling: "center" or "caffe", see :func:`mnc_d2.layers.roi_warp`.
        canonical_box_size: square root of the area, in image pixels, of the boxes that level ``canonical_level`` takes.
        canonical_level: level, as log2 of the stride, of these boxes.
    """

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int = 2,
        sampling: str = "center",
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        if sampling_ratio not in (1, 2):
            raise ValueError(f"MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO must be 1 or 2, got {sampling_ratio}")
        levels = [-math.log2(scale) for scale in scales]
        if any(level != levels[0] + i for i, level in enumerate(levels)) or levels[0] != int(levels[0]):
            raise ValueError(f"scales must be halving powers of 2, got {list(scales)}")
        self.output_size = output_size
        self.scales = list(scales)
        self.sampling_ratio = sampling_ratio
        self.sampling = sampling
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(
        self, features: list[torch.Tensor], boxes: list[Boxes], memory: BagMaxMemory | None = None
    ) -> torch.Tensor:
        """
        Args:
            features: one (N, C, H_l, W_l) per level.
            boxes: one per image, in image pixels; R in all.
            memory: as in :func:`mnc_d2.layers.roi_warp_pyramid`.

        Returns:
            (R, C, S, S), the boxes of all images one after another.
        """
        return roi_warp_pyramid(features, *self._arguments(boxes), memory=memory)

    def without_and_with_box_gradient(
        self, features: list[torch.Tensor], boxes: list[Boxes]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`forward` does twice: without and with a gradient to the boxes."""
        return roi_warp_pyramid_twice(features, *self._arguments(boxes))

    def _arguments(self, boxes: list[Boxes]) -> tuple:
        """Those of the RoI warp after the features."""
        # Detectron2's convert_boxes_to_pooler_format waits for a GPU.
        rois = torch.cat([F.pad(x.tensor, (1, 0), value=image) for image, x in enumerate(boxes)])  # (R, 5)
        with torch.no_grad():
            levels = assign_boxes_to_levels(
                boxes, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
            )
        return rois, levels, self.output_size, self.scales, self.sampling, self.sampling_ratio == 2


class CascadePooler(nn.Module):
    """Pools the features of boxes for the mask head and for the classifier, from the same maps or from others."""

    def __init__(
        self, pooler: RoIWarpPooler, in_features: Sequence[str], mask_in_features: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            pooler: RoI warp to S x S.
            in_features: names of the feature maps that the classifier pools from.
            mask_in_features: those that the mask head pools from; by default the same.
        """
        super().__init__()
        self.pooler = pooler
        self.in_features = list(in_features)
        self.mask_in_features = list(mask_in_features or in_features)

    @property
    def output_size(self) -> int:
        """S."""
        return self.pooler.output_size

    def forward(
        self,
        features: dict[str, torch.Tensor],
        boxes: list[Boxes],
        index: int,
        mask_coordinate_gradient: bool = True,
        memory: BagMaxMemory | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: the feature maps (N, C, H, W) by name.
            boxes: one per image, in image pixels; R in all.
            index: of the pass, from 0; here it makes no difference.
            mask_coordinate_gradient: whether the features for the mask head have a gradient to the boxes.
            memory: of the passes of one inference; what one returns is valid until the next.

        Returns:
            (R, C, S, S) for the mask head, and the same for the classifier, which always has that gradient.
        """
        maps, mask_maps = ([features[x] for x in names] for names in (self.in_features, self.mask_in_features))
        if self.mask_in_features != self.in_features:
            mask_boxes = boxes if mask_coordinate_gradient else [Boxes(x.tensor.detach()) for x in boxes]
            return self.pooler(mask_maps, mask_boxes), self.pooler(maps, boxes)
        if not mask_coordinate_gradient:
            return self.pooler.without_and_with_box_gradient(maps, boxes)
        pooled = self.pooler(maps, boxes, memory)
        return pooled, pooled
