"""Stages 3, 5, ...: classification of boxes and of their masks by features under the masks (section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .output_layers import MNCOutputLayers, Predictions


def resize_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Resize masks (R, m, m) bilinearly to (R, size, size)."""
    return F.interpolate(masks[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


class MaskedFeatureClassifier(nn.Module):
    """Two paths of fully connected layers, one from masked and one from plain features, and layers on both."""

    def __init__(
        self,
        mask_path_head: nn.Module,
        box_path_head: nn.Module,
        predictor: MNCOutputLayers,
        *,
        resolution: int,
        resize_masks: Callable[[torch.Tensor, int], torch.Tensor] = resize_masks,
    ) -> None:
        """
        Args:
            mask_path_head, box_path_head: box heads for the masked and for the plain features, each from
                (R, C, s, s) to features that are concatenated, the mask path first.
            predictor: joint features -> predictions.
            resolution: s, a divisor of S; the features are max-pooled from S x S to s x s.
            resize_masks: from masks (R, m, m) and S to masks (R, S, S).
        """
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(resolution)
        self.mask_path_head = mask_path_head
        self.box_path_head = box_path_head
        self.predictor = predictor
        self.resize_masks = resize_masks

    def forward(self, features: torch.Tensor, masks: torch.Tensor) -> Predictions:
        """
        Args:
            features: (R, C, S, S), pooled from the boxes.
            masks: (R, m, m), probabilities in the frames of the boxes.
        """
        size = features.shape[-1]
        if masks.shape[-1] != size:
            masks = self.resize_masks(masks, size)
        mask_path = self.mask_path_head(self.pool(features * masks[:, None].to(features.dtype)))
        box_path = self.box_path_head(self.pool(features))
        return self.predictor(torch.cat((mask_path.flatten(1), box_path.flatten(1)), dim=1))
