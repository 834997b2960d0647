"""Convolutions that take less time at inference on a CPU: with batch normalisation and ReLU in one operator."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from .device import wants_operator
from .onednn import CopyOfWeights, has_onednn

_RELUS = F.relu, F.relu_, torch.relu


class FusedConv2d(Conv2d):
    """Detectron2's ``Conv2d``, at inference on a CPU one operator of oneDNN with what follows the convolution.

    In ``eval()``, without gradients, a batch normalisation is a factor and an offset of each channel: the factor is
    multiplied into the weight, the offset into the bias. The layer keeps that product, in the order in which oneDNN
    reads it, and makes it anew when one of its tensors has changed; only of a change through ``weight.data``, which
    PyTorch does not count, it has to be told by ``train()``. Modules ``norm`` and ``activation`` are not called then,
    nor are hooks that they have. Results differ from those of the operators one by one by rounding alone.
    """

    def __init__(self, *args, **kwargs) -> None:
        """
        Args:
            args, kwargs: those of Detectron2's ``Conv2d``, with ``norm`` and ``activation``.
        """
        super().__init__(*args, **kwargs)
        self._copy = CopyOfWeights()

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Make all of a module's Detectron2 ``Conv2d`` layers of this kind, with the weights that they have."""
        for layer in module.modules():
            if type(layer) is Conv2d:
                layer.__class__ = cls
                layer._copy = CopyOfWeights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H', W') of x (N, in_channels, H, W)."""
        if wants_operator(x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not self.packs(dtype):
            return super().forward(x)
        weight = self._copy.get(self._packed_from(), partial(self._pack, dtype, x.shape), dtype)
        folds = self._folds()
        fuses_relu = _is_relu(self.activation) and (folds or self.norm is None)
        x = torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype), weight, self._folded_bias(), *self._geometry, "relu" if fuses_relu else "none", [], ""
        )
        if self.norm is not None and not folds:
            x = self.norm(x)
        return x if self.activation is None or fuses_relu else self.activation(x)

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether the layer keeps a copy of its weight of a dtype, in the order in which oneDNN reads it."""
        named_padding = isinstance(self.padding, str)  # as "same"
        return not (self.training or named_padding or wants_operator(self.weight)) and has_onednn(dtype)

    def _packed_from(self) -> list[torch.Tensor]:
        factors = [self.norm.running_var, self.norm.weight] if self._folds() else []
        return [self.weight, *(x for x in factors if x is not None)]

    def _pack(self, dtype: torch.dtype, input_shape: torch.Size) -> torch.Tensor:
        """The weight, with the normalisation's factor. Which order is the best depends on the size of the images."""
        weight = self.weight
        if self._folds():
            weight = weight * self._factor()[:, None, None, None]
        return torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype), *self._geometry, input_shape)

    @property
    def _geometry(self) -> tuple:
        return self.padding, self.stride, self.dilation, self.groups

    def train(self, mode: bool = True) -> FusedConv2d:
        """As ``nn.Module.train``. The copy is dropped."""
        self._copy.clear()
        return super().train(mode)

    def _folds(self) -> bool:
        """Whether the normalisation is one with fixed statistics, and nothing else."""
        if type(self.norm) is nn.BatchNorm2d:
            return not self.norm.training and self.norm.running_var is not None
        return type(self.norm) is FrozenBatchNorm2d

    def _factor(self) -> torch.Tensor:
        factor = (self.norm.running_var + self.norm.eps).rsqrt()
        return factor if self.norm.weight is None else factor * self.norm.weight

    def _folded_bias(self) -> torch.Tensor | None:
        if not self._folds():
            return self.bias
        bias = -self.norm.running_mean if self.bias is None else self.bias - self.norm.running_mean
        bias = bias * self._factor()
        return bias if self.norm.bias is None else bias + self.norm.bias


def _is_relu(activation: object) -> bool:
    return isinstance(activation, nn.ReLU) or activation in _RELUS
