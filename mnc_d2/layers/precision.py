"""The precision of coordinates, scores and losses; weights in half precision at inference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import nn

from .convolution import FusedConv2d
from .linear import Linear, LinearOfMaps

# By the names that configs have for them.
HALF_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# Layers that use their weights as they are. Those that standardise them first, as some of timm's, need them in full.
_PLAIN_LAYERS = nn.Linear, Linear, LinearOfMaps, nn.Conv2d, nn.ConvTranspose2d, Conv2d, FusedConv2d
_PLAIN_FORWARDS = {layer.forward for layer in _PLAIN_LAYERS}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HalfPrecisionWeights:
    """Copies in half precision of the weights of a module's convolutions and linear layers that keep none themselves.

    Autocast converts them in every call, which for large fully connected layers takes as long as their arithmetic. With
    these copies in their place it finds nothing to convert. The results are the same. Copies of this object and its
    pickles are empty.
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._made_from: list[tuple] = []
        # The weights of a module can be exchanged by one thread at a time.
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return HalfPrecisionWeights, ()

    def clear(self) -> None:
        """Forget the copies, and the memory they take."""
        self._copies, self._made_from = {}, []

    def call(self, module: nn.Module, dtype: torch.dtype, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that uses a module while the module has the copies in place of its weights.

        The copies are made in the first call, and again when the weights have changed; only of changes that
        PyTorch does not count, through ``weight.data`` or by fused optimisers, it has to be told by :meth:`clear`.

        Args:
            module: it has its own weights again on return.
            dtype: of the copies.
            function: it need not be a method of the module.
            args: of the function.

        Returns:
            what the function returns.
        """
        with self._lock:
            weights = dict(_plain_weights(module, dtype))
            # Packed weights are only for where no gradient is wanted.
            state = dtype, torch.is_grad_enabled()
            made_from = [(id(x), x.data_ptr(), _version(x), x.device, state) for _, x in weights.values()]
            if made_from != self._made_from:
                copies: dict[tuple, torch.Tensor] = {}  # layers that share a weight share its copy
                for layer, x in weights.values():
                    key = id(x), type(layer)
                    copies[key] = copies[key] if key in copies else _convert(layer, x, dtype)
                self._copies = {f"module.{name}": copies[id(x), type(layer)] for name, (layer, x) in weights.items()}
                self._made_from = made_from
            caller = _Caller(module)
            return torch.func.functional_call(caller, self._copies, (function, *args), tie_weights=False)


class _Caller(nn.Module):
    """Calls any function in the place of a forward pass of its submodule."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _plain_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, tuple[nn.Module, nn.Parameter]]]:
    """The layers that autocast runs in half precision, and that use their weights as they are; by parameter's name.

    Without the convolutions that keep a copy of this dtype themselves.
    """
    for layer_name, layer in module.named_modules():
        keeps_copy = isinstance(layer, FusedConv2d) and layer.packs(dtype)
        if type(layer).forward in _PLAIN_FORWARDS and not keeps_copy:
            for name, parameter in layer.named_parameters(prefix=layer_name, recurse=False):
                yield name, (layer, parameter)


def _version(weight: torch.Tensor) -> int:
    """How often a weight was changed in place; those made in inference mode are not counted."""
    return -1 if weight.is_inference() else weight._version


def _convert(layer: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(layer, Linear) and parameter is layer.weight:
        packed = layer.packed_weight(dtype)
        if packed is not None:
            return packed
    # Convolutions of channels_last images want weights in channels_last too.
    is_kernel = parameter.dim() == 4
    return parameter.detach().to(dtype, memory_format=torch.channels_last if is_kernel else torch.preserve_format)
