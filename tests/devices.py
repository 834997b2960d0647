"""Tensors of the tests on another device: ``pytest --device cuda tests/layers tests/modeling``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

TESTS = str(Path(__file__).parent)
_MAKERS = {
    *(
        torch.arange,
        torch.as_tensor,
        torch.empty,
        torch.eye,
        torch.from_numpy,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
    ),
    *(torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros),
}
_TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnDevice(TorchFunctionMode):
    """Moves the tensors that tests make, where they name no device, and what they give to numpy.

    Tensors are made on the CPU first, so that random ones are those of the CPU. Not those that the library makes: where
    they belong is for the library to say, and for the tests to find out.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _TO_NUMPY:
            args = (args[0].cpu(), *args[1:])
        result = function(*args, **kwargs)
        if function in _MAKERS and "device" not in kwargs and sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return result.detach().to(self.device).requires_grad_(result.requires_grad)
        return result


def make_tensors_on(device: str) -> None:
    """Have all tensors that tests make, and the weights and buffers of all modules, on a device, to the end."""
    OnDevice(device).__enter__()
    register_module_parameter_registration_hook(lambda module, name, x: _parameter_on(device, x))
    register_module_buffer_registration_hook(lambda module, name, x: None if x is None else x.to(device))
    # Convolutions in TF32 would be far from what the tests expect.
    torch.backends.cudnn.allow_tf32 = False


def _parameter_on(device: str, x: torch.nn.Parameter) -> torch.nn.Parameter:
    if x.device.type == torch.device(device).type:
        return x  # which layers may share
    return torch.nn.Parameter(x.detach().to(device), requires_grad=x.requires_grad)
