"""Pooling of RoI features from one or more feature maps, with gradients to the boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import nn

from ..layers import roi_warp_pyramid, roi_warp_pyramid_twice


class RoIWarpPooler(nn.Module):
    """RoI warp in place of Detectron2's ``ROIPooler``.

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

    def forward(self, features: list[torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: one (N, C, H_l, W_l) per level.
            rois: (R, 5), index of the image and box, in image pixels.

        Returns:
            (R, C, S, S).
        """
        return roi_warp_pyramid(features, *self._arguments(rois))

    def without_and_with_box_gradient(
        self, features: list[torch.Tensor], rois: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`forward` does twice: without and with a gradient to the boxes."""
        return roi_warp_pyramid_twice(features, *self._arguments(rois))

    def _arguments(self, rois: torch.Tensor) -> tuple:
        """The arguments of the RoI warp after the features."""
        with torch.no_grad():
            levels = assign_boxes_to_levels(
                [Boxes(rois[:, 1:])], self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
            )
        return rois, levels, self.output_size, self.scales, self.sampling, self.sampling_ratio == 2


class CascadePooler(nn.Module):
    """Pools the features of boxes for the mask head and for the classifier, from the same maps."""

    def __init__(self, pooler: RoIWarpPooler, in_features: Sequence[str]) -> None:
        """
        Args:
            pooler: RoI warp to S x S.
            in_features: names of the feature maps to pool from.
        """
        super().__init__()
        self.pooler = pooler
        self.in_features = list(in_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], sampling: str = "center") -> CascadePooler:
        """Build the pooler that the config describes, for feature maps of these shapes."""
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        warp = RoIWarpPooler(
            output_size=cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
            scales=[1.0 / input_shape[name].stride for name in in_features],
            sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
            sampling=sampling,
        )
        return cls(warp, in_features)

    def forward(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, index: int, mask_coordinates: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: the feature maps (N, C, H, W) by name.
            rois: (R, 5), index of the image and box, in image pixels.
            index: of the pass, from 0; here it makes no difference.
            mask_coordinates: whether the features for the mask head have a gradient to the boxes.

        Returns:
            (R, C, S, S) for the mask head, and the same for the classifier, which always has that gradient.
        """
        maps = [features[name] for name in self.in_features]
        if not mask_coordinates:
            return self.pooler.without_and_with_box_gradient(maps, rois)
        pooled = self.pooler(maps, rois)
        return pooled, pooled
