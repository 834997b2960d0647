"""A copy of a model that takes less time at inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from detectron2.layers import Conv2d
from torch import nn

from ..modeling.roi_heads.mask_head import MaskFusionHead, MaskRegressionHead
from .layers import ChannelsLastFlatten, ConstantLinear, FoldedConv2d, StridedMaxPool

_Model = TypeVar("_Model", bound=nn.Module)
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def accelerate(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Return a copy of a model with the same results in less time, without gradients.

    The copy is a snapshot: call this again after the weights have changed. In the copy, convolutions and linear layers
    have constant weights, see :mod:`.layers`; a layer that has hooks stays as it is. The copy shares all other
    parameters and buffers with the model, which does not change.

    Args:
        model: any module in ``eval()``, such as a Detectron2 model, on any device.
        dtype: of convolutions and matrix products: bfloat16 or float16; float32 or None for that of the weights. The
            rest runs as under ``torch.autocast``: what a model brings back to float32 stays float32.

    Returns:
        a module of the same class, in ``eval()``. Results differ from the model's by rounding.

    Raises:
        ValueError: the model is in training mode, or the dtype is none of these.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"A model can be accelerated in {', '.join(map(str, _DTYPES))}, not in {dtype}.")
    if any(x.training for x in model.modules()):
        raise ValueError("Only a model in eval() can be accelerated; this one, or a part of it, is in training mode.")
    half = None if dtype == torch.float32 else dtype
    # deepcopy takes for its copy of an object what the memo has: itself, or what is to be in its place.
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(x): x for x in tensors}
    for module in model.modules():
        if id(module) not in memo:
            _replace(module, half, memo)
    copied = copy.deepcopy(model, memo).eval()
    device = next((x.device.type for x in tensors if not x.is_meta), "cpu")
    for name in ("forward", "inference"):  # GeneralizedRCNNWithTTA calls the second
        if hasattr(copied, name):
            setattr(copied, name, partial(_call, getattr(copied, name), device, half))
    return copied


def _replace(module: nn.Module, dtype: torch.dtype | None, memo: dict[int, Any]) -> None:
    """Put into the memo what stands for a module or for its children, if anything does."""
    if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Conv2d):
        parts = getattr(module, "norm", None), getattr(module, "activation", None)
        pads_zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if pads_zeros and not any(map(_has_hooks, (module, *parts))):
            memo[id(module)] = FoldedConv2d(module, *copy.deepcopy(parts, memo), dtype)
    elif type(module) is nn.Linear and not _has_hooks(module):
        memo[id(module)] = ConstantLinear(module.weight, module.bias, dtype)
    elif type(module) in (MaskRegressionHead, MaskFusionHead) and type(module.fc1) is nn.Linear:
        flatten, fc1 = module.flatten, module.fc1
        if not (_has_hooks(flatten) or _has_hooks(fc1)):
            weight = fc1.weight.unflatten(1, (module.channels, -1)).transpose(1, 2).flatten(1)
            memo[id(flatten)], memo[id(fc1)] = ChannelsLastFlatten(), ConstantLinear(weight, fc1.bias, dtype)
    elif type(module) is nn.AdaptiveMaxPool2d and isinstance(module.output_size, int) and not _has_hooks(module):
        memo[id(module)] = StridedMaxPool(module.output_size)


def _has_hooks(part: Any) -> bool:
    return isinstance(part, nn.Module) and any(x._forward_hooks or x._forward_pre_hooks for x in part.modules())


def _call(method: Callable, device: str, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Call a method without gradients, which the operators of the layers do not have."""
    with torch.no_grad(), nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
        return method(*args, **kwargs)
