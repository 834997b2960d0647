"""Convolutions that take less time at inference on a CPU: with batch normalisation and ReLU in one operator."""

from __future__ import annotations

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
    reads it, and makes it anew when one of its tensors has changed; only of changes that PyTorch does not count,
    through ``weight.data`` or by fused optimisers, it has to be told by ``train()``. Modules ``norm`` and
    ``activation`` are not called then, nor are hooks that they have. Results differ from those of the operators one by
    one by rounding alone. The layer is not for ``torch.jit.script``.
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
        if wants_operator(x) or x.dim() != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)
        autocasts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocasts else x.dtype
        if not self.packs(dtype) or not (autocasts or x.dtype == self.weight.dtype):
            return super().forward(x)
        folded = self._folded_norm()
        fuses_relu = _is_relu(self.activation) and (self.norm is None or folded is not None)
        weight = self._packed_weight(dtype, x.shape, folded)
        bias = self.bias if folded is None else _folded_bias(self.bias, folded)
        x = torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype), weight, bias, *self._geometry, "relu" if fuses_relu else "none", [], ""
        )
        if self.norm is not None and folded is None:
            x = self.norm(x)
        return x if self.activation is None or fuses_relu else self.activation(x)

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether the layer keeps a copy of its weight of a dtype, in the order in which oneDNN reads it."""
        named_padding = isinstance(self.padding, str)  # as "same"
        return not (self.training or named_padding or wants_operator(self.weight)) and has_onednn(dtype)

    def _packed_weight(self, dtype: torch.dtype, input_shape: torch.Size, folded: nn.Module | None) -> torch.Tensor:
        """The weight, with the normalisation's factor. Which order is the best depends on the size of the images."""

        def pack() -> torch.Tensor:
            weight = self.weight if folded is None else self.weight * _factor(folded)[:, None, None, None]
            return torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype), *self._geometry, input_shape)

        factors = [] if folded is None else [folded.running_var, folded.weight]
        made_from = [self.weight, *(x for x in factors if x is not None)]
        return self._copy.get(made_from, pack, (dtype, None if folded is None else folded.eps))

    @property
    def _geometry(self) -> tuple:
        return self.padding, self.stride, self.dilation, self.groups

    def train(self, mode: bool = True) -> FusedConv2d:
        """As ``nn.Module.train``. The copy is dropped."""
        self._copy.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> FusedConv2d:
        self._copy.clear()
        return super()._apply(*args, **kwargs)

    def _folded_norm(self) -> nn.Module | None:
        """The normalisation, if it is one with fixed statistics, and nothing else."""
        if type(self.norm) is nn.BatchNorm2d:
            return None if self.norm.training or self.norm.running_var is None else self.norm
        return self.norm if type(self.norm) is FrozenBatchNorm2d else None


def _factor(norm: nn.Module) -> torch.Tensor:
    factor = (norm.running_var + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight


def _folded_bias(bias: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
    offset = -norm.running_mean if bias is None else bias - norm.running_mean
    offset = offset * _factor(norm)
    return offset if norm.bias is None else offset + norm.bias


def _is_relu(activation: object) -> bool:
    return type(activation) is nn.ReLU or activation in _RELUS
