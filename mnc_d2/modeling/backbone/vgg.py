"""VGG-16 up to conv5_3, the backbone of the paper's experiments on PASCAL VOC."""

from __future__ import annotations

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

# (number of 3 x 3 convolutions, channels) of each stage.
_STAGES = {
    "conv1": (2, 64),
    "conv2": (2, 128),
    "conv3": (3, 256),
    "conv4": (3, 512),
    "conv5": (3, 512),
}


class VGG16(Backbone):
    """The convolutions of VGG-16 (Simonyan and Zisserman, 2015): conv1_1, conv1_2, ... conv5_3, each with a ReLU.

    A 2 x 2 max pooling halves the resolution between stages; there is none after conv5, so that its stride is 16.
    The attributes have the layers' names.
    """

    def __init__(
        self,
        out_features: Sequence[str] = ("conv5",),
        *,
        in_channels: int = 3,
        freeze_at: int = 0,
        ceil_mode: bool = False,
    ) -> None:
        """
        Args:
            out_features: the stages to return, of "conv1" (stride 1, 64 channels), "conv2" (2, 128), "conv3" (4, 256),
                "conv4" (8, 512) and "conv5" (16, 512). Stages after the last of them are not built.
            in_channels: channels of the images.
            freeze_at: the stages conv1 to conv<freeze_at> are not trained; 0 trains all.
            ceil_mode: whether pooling keeps the last row or column of an odd size (as Caffe does) or drops it, where
                it is not the only one.

        Raises:
            ValueError: an unknown output, none at all, or ``freeze_at`` outside 0 to 5.
        """
        super().__init__()
        unknown = [name for name in out_features if name not in _STAGES]
        if unknown or not out_features:
            raise ValueError(f"VGG16 has the features {', '.join(_STAGES)}, not {list(out_features)}")
        if not 0 <= freeze_at <= len(_STAGES):
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to {len(_STAGES)} for VGG-16, got {freeze_at}")
        self.ceil_mode = ceil_mode
        names = list(_STAGES)
        depth = 1 + max(names.index(name) for name in out_features)
        # Detectron2 reads these three in output_shape.
        self._out_features = list(out_features)
        self._out_feature_strides = {name: 2**i for i, name in enumerate(names[:depth])}
        self._out_feature_channels = {name: _STAGES[name][1] for name in names[:depth]}

        self._layers = {}
        for i, name in enumerate(names[:depth]):
            count, channels = _STAGES[name]
            self._layers[name] = [f"{name}_{j + 1}" for j in range(count)]
            for layer in self._layers[name]:
                conv = Conv2d(in_channels, channels, kernel_size=3, padding=1, activation=F.relu_)
                weight_init.c2_msra_fill(conv)
                conv.requires_grad_(i >= freeze_at)
                self.add_module(layer, conv)
                in_channels = channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: normalised images (N, in_channels, H, W).

        Returns:
            the output features by name, each (N, channels, H / stride, W / stride), where every halving rounds down,
            or up with ``ceil_mode``.
        """
        outputs = {}
        for i, (name, layers) in enumerate(self._layers.items()):
            if i > 0:
                # The last row of images lower than 16 pixels stays, whatever the mode.
                x = F.max_pool2d(x, 2, ceil_mode=self.ceil_mode or min(x.shape[2:]) == 1)
            for layer in layers:
                x = getattr(self, layer)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG16:
    """Build :class:`VGG16` up to "conv5", of which MODEL.BACKBONE.FREEZE_AT stages keep their weights."""
    return VGG16(("conv5",), in_channels=input_shape.channels, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
