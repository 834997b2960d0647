"""Stages 2, 4, ...: regression of a class-agnostic mask in each box (section 3.2)."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY
from torch import nn

from ...layers import at_least_float32


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRegressionHead(nn.Module):
    """Two fully connected layers from the pooled features of a box to the logits of an m x m mask."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, hidden_dim: int = 256, mask_size: int = 28, init_std: float = 0.001
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the pooled features.
            hidden_dim: units of the hidden layer.
            mask_size: m.
            init_std: standard deviation of the initial weights.
        """
        super().__init__()
        self.mask_size = mask_size
        self.fc1 = nn.Linear(input_shape.channels * input_shape.height * input_shape.width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, mask_size**2)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            "input_shape": input_shape,
            "hidden_dim": cfg.MODEL.MNC.MASK_FC_DIM,
            "mask_size": cfg.MODEL.MNC.MASK_SIZE,
            "init_std": cfg.MODEL.MNC.MASK_INIT_STD,
        }

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return mask logits (R, m, m), at least float32, for pooled features (R, C, S, S)."""
        hidden = F.relu(self.fc1(features.flatten(1)))
        return at_least_float32(self.fc2(hidden)).view(-1, self.mask_size, self.mask_size)
