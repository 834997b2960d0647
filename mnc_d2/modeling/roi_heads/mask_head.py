"""Stages 2, 4, ...: regression of a class-agnostic mask in each box (section 3.2)."""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, BaseMaskRCNNHead
from torch import nn

from ...layers import at_least_float32


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRegressionHead(BaseMaskRCNNHead):
    """Two fully connected layers from the pooled features of a box to the logits of an m x m mask."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, hidden_dim: int = 256, mask_size: int = 28, init_std: float = 0.001, **kwargs
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the pooled features.
            hidden_dim: units of the hidden layer.
            mask_size: m.
            init_std: standard deviation of the initial weights.
            kwargs: the arguments of Detectron2's ``BaseMaskRCNNHead``.
        """
        super().__init__(**kwargs)
        self.mask_size = mask_size
        self.channels = input_shape.channels
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(input_shape.channels * input_shape.height * input_shape.width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, mask_size**2)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "hidden_dim": cfg.MODEL.MNC.MASK_FC_DIM,
            "mask_size": cfg.MODEL.MNC.MASK_SIZE,
            "init_std": cfg.MODEL.MNC.MASK_INIT_STD,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Return mask logits (R, 1, m, m), at least float32, for pooled features (R, C, S, S)."""
        hidden = F.relu(self.fc1(self.flatten(x)))
        return at_least_float32(self.fc2(hidden)).view(-1, 1, self.mask_size, self.mask_size)


@ROI_MASK_HEAD_REGISTRY.register()
class MaskFusionHead(MaskRegressionHead):
    """The sum of two logits: of fully connected layers, which know the shape, and of convolutions, which know its edge.

    Fully-connected fusion of the Path Aggregation Network (Liu et al., CVPR 2018, section 3.4), class-agnostic.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_conv: int, conv_dim: int, **fc_options) -> None:
        """
        Args:
            input_shape: channels, height and width of the pooled features.
            num_conv: 3 x 3 convolutions before the one that enlarges to m x m.
            conv_dim: their channels.
            fc_options: of :class:`MaskRegressionHead`.

        Raises:
            ValueError: m is no multiple of the size of the pooled features.
        """
        super().__init__(input_shape, **fc_options)
        scale, remainder = divmod(self.mask_size, input_shape.height)
        if remainder:
            raise ValueError(
                f"MODEL.MNC.MASK_SIZE is {self.mask_size}. MaskFusionHead needs a multiple of "
                f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION, {input_shape.height}."
            )
        layers: list[nn.Module] = []
        channels = input_shape.channels
        for _ in range(num_conv):
            conv = nn.Conv2d(channels, conv_dim, 3, padding=1)
            weight_init.c2_msra_fill(conv)
            layers += [conv, nn.ReLU()]
            channels = conv_dim
        predictor = nn.ConvTranspose2d(channels, 1, scale, stride=scale)
        nn.init.normal_(predictor.weight, std=0.001)
        nn.init.zeros_(predictor.get_parameter("bias"))
        self.local = nn.Sequential(*layers, predictor)

    @classmethod
    def from_config(cls, cfg, input_shape):
        mask_head = cfg.MODEL.ROI_MASK_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "num_conv": mask_head.NUM_CONV,
            "conv_dim": mask_head.CONV_DIM,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Return mask logits (R, 1, m, m), at least float32, for pooled features (R, C, S, S)."""
        return super().layers(x) + at_least_float32(self.local(x))
