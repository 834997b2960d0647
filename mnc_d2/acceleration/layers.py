"""Layers for inference. On a CPU they call the operators of oneDNN that torch.compile calls, elsewhere PyTorch's.

Measured, and no gain: weights in the order of oneDNN, which depends on the size of the images.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_RELUS = F.relu, F.relu_, torch.relu, torch.relu_


class _ConstantLayer(nn.Module):
    """A weight and a bias that have no gradient, and are no part of the state dict."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None) -> None:
        """
        Args:
            weight, bias: kept as views of the same memory where nothing changes.
            dtype: of the weight and of inputs; None for that of ``weight``. The bias stays as it is.
        """
        super().__init__()
        memory_format = torch.channels_last if weight.dim() == 4 else torch.preserve_format
        self.register_buffer("weight", weight.detach().to(dtype or weight.dtype, memory_format=memory_format), False)
        self.register_buffer("bias", None if bias is None else bias.detach(), False)

    def _uses_onednn(self, x: torch.Tensor) -> bool:
        on_cpu = x.device.type == self.weight.device.type == "cpu"
        return on_cpu and x.numel() > 0 and bool(torch.backends.mkldnn.enabled) and _has_operators(self.weight.dtype)

    def _bias_like_weight(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(self.weight.dtype)


class FoldedConv2d(_ConstantLayer):
    """A ``Conv2d`` of PyTorch or Detectron2 with its batch normalisation and ReLU in one operator.

    The factors of a normalisation with fixed statistics are multiplied into the weight, its offsets go into the bias.
    Another normalisation or activation runs after the convolution.
    """

    def __init__(self, layer: nn.Conv2d, norm: Any, activation: Any, dtype: torch.dtype | None) -> None:
        """Take the weights of a layer, and what follows it: a module, a function or None each."""
        weight, bias = layer.weight, layer.bias
        if type(norm) in (FrozenBatchNorm2d, nn.BatchNorm2d) and norm.running_var is not None:
            statistics = norm.running_mean, norm.running_var
            weight, bias = fuse_conv_bn_weights(weight, bias, *statistics, norm.eps, norm.weight, norm.bias)
            norm = None
        super().__init__(weight, bias, dtype)
        self.relu = norm is None and (type(activation) is nn.ReLU or activation in _RELUS)
        self.norm, self.activation = norm, None if self.relu else activation
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H', W') of x (N, in_channels, H, W), in the dtype of the weight."""
        x = x.to(self.weight.dtype)
        if self._uses_onednn(x) and x.dim() == 4:
            geometry, relu = (self.padding, self.stride, self.dilation, self.groups), "relu" if self.relu else "none"
            x = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *geometry, relu, [], "")
        else:
            bias = self._bias_like_weight()
            x = F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups)
            x = F.relu_(x) if self.relu else x
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class ConstantLinear(_ConstantLayer):
    """``nn.Linear`` whose weight is converted to half precision once, which autocast does in every call.

    Float32 shares the memory of the weight. PyTorch gives its product to MKL, which on processors of AMD is slower.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) of x (..., in_features), in the dtype of the weight."""
        x = x.to(self.weight.dtype)
        if self._uses_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self._bias_like_weight())


class ChannelsLastFlatten(nn.Module):
    """Flattens (R, C, H, W) to (R, H W C), which after the RoI warp is their order in memory: nothing is copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class StridedMaxPool(nn.Module):
    """``nn.AdaptiveMaxPool2d`` without the indices that a backward pass needs, to maxima that are flattened freely."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (R, C, size, size) of x (R, C, H, W)."""
        if x.device.type != "cpu" or x.numel() == 0 or x.shape[2] != x.shape[3] or x.shape[2] % self.size:
            return F.adaptive_max_pool2d(x, self.size)
        stride = x.shape[2] // self.size
        at_once = max(1, 2**20 // x[0].numel())  # few enough for the cache of a CPU
        pooled = x.new_empty(*x.shape[:2], self.size, self.size)
        for part, result in zip(x.split(at_once), pooled.split(at_once)):
            rows = functools.reduce(torch.maximum, (part[:, :, i::stride] for i in range(stride)))
            result.copy_(functools.reduce(torch.maximum, (rows[..., i::stride] for i in range(stride))))
        return pooled


@functools.cache
def _has_operators(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have the operators of oneDNN for a dtype."""
    try:
        x = torch.ones(1, 1, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
        x = x[..., None, None]
        torch.ops.mkldnn._convolution_pointwise(x, x, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True
