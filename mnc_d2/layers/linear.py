"""Fully connected layers that take less time at inference on a CPU: their products are oneDNN's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .device import wants_operator
from .gradient import channels_last_gradient
from .onednn import CopyOfWeights, has_onednn


class Linear(nn.Linear):
    """``nn.Linear``, at inference on a CPU by oneDNN, which PyTorch itself uses for half precision only.

    In float32 PyTorch asks MKL, which on processors of AMD knows nothing of AVX-512. Sums are added in another order.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Make all of a module's ``nn.Linear`` layers of this kind, with the weights that they have."""
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = cls  # it has the same attributes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) of x (..., in_features)."""
        return _product(x, self.weight, self.bias)

    def packed_weight(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a copy of the weight in the order in which oneDNN reads it, or None where it cannot be used.

        Args:
            dtype: of the copy. Gradients do not go through it.

        Returns:
            a tensor of which nothing but this layer's ``forward`` makes sense, in the place of its weight.
        """
        if wants_operator(self.weight) or not has_onednn(dtype):
            return None
        return torch.ops.mkldnn._reorder_linear_weight(self._weight_as_used().to(dtype))

    def _weight_as_used(self) -> torch.Tensor:
        return self.weight


class LinearOfMaps(Linear):
    """``nn.Linear`` of flattened feature maps that lie in memory pixel after pixel, as the RoI warp gives them.

    Flattening channels_last features copies them all, which for large maps takes as long as half of the product. In
    ``eval()``, without gradients, the layer keeps a copy of its weight in the order of the features instead, made when
    it is first called and whenever the weight has changed; only of changes that PyTorch does not count, through
    ``weight.data`` or by fused optimisers, it has to be told by ``train()``.
    """

    def __init__(self, channels: int, height: int, width: int, out_features: int) -> None:
        """
        Args:
            channels, height, width: of the feature maps.
            out_features: units.
        """
        super().__init__(channels * height * width, out_features)
        self.channels = channels
        self._copy = CopyOfWeights()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (R, out_features) of features (R, channels, height, width)."""
        if self.weight.is_mkldnn:
            weight = self.weight
        elif self.training or wants_operator(features) or features.is_contiguous() or self.weight.is_inference():
            return super().forward(channels_last_gradient(features).flatten(1))
        else:
            weight = self._copy.get([self.weight], self._weight_as_used)
        return _product(features.permute(0, 2, 3, 1).flatten(1), weight, self.bias)

    def train(self, mode: bool = True) -> LinearOfMaps:
        """As ``nn.Module.train``. The copy is dropped."""
        self._copy.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> LinearOfMaps:
        self._copy.clear()
        return super()._apply(*args, **kwargs)

    def _weight_as_used(self) -> torch.Tensor:
        """The weight with its columns in the order of pixels, and of channels in each."""
        return self.weight.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``F.linear(x, weight, bias)``; the weight may be packed."""
    if not weight.is_mkldnn:
        autocasts = torch.is_autocast_enabled(x.device.type)
        if x.dtype != torch.float32 or autocasts or wants_operator(x) or not has_onednn(torch.float32):
            return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
