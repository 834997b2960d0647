"""Where a call waits for its device: counted on a GPU, foreseen on a CPU."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import detectron2
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mnc_d2

PACKAGES = [Path(x.__file__).parent for x in (mnc_d2, detectron2)]

# Operators whose result, or its size, a GPU has to tell the host. ``item``, ``bool`` and ``int`` are the first.
_READING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
_TO_HOST = {"tolist", "cpu", "numpy"}
_FROM_HOST = {"tensor", "as_tensor", "new_tensor"}


@contextmanager
def count_synchronisations(device: str) -> Iterator[Counter]:
    """Count how often what runs in this context makes the host wait for the device.

    On a GPU these are the warnings of :func:`torch.cuda.set_sync_debug_mode`. On a CPU they are foreseen: operators
    that read values back, and tensors made of Python numbers for a named device. Without their kind on a CPU: copies
    of the inputs, what operators that are one call for PyTorch do inside, and what only runs on a GPU.

    Args:
        device: "cuda", or "cpu".

    Yields:
        how often, by place: the innermost line of mnc_d2 or Detectron2, as "mnc_d2/layers/roi_warp.py:92 roi_warp". It
        is filled when the context ends.
    """
    places = Counter()
    if torch.device(device).type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: _count_warning(places, message)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode("default")
    else:
        with _Functions(places), _Operators(places):
            yield places


def _count_warning(places: Counter, message: Warning | str) -> None:
    if "called a synchronizing" in str(message):
        places[_place()] += 1


class _Operators(TorchDispatchMode):
    """Counts operators that read values back, or that need to know how many elements of a mask are true."""

    def __init__(self, places: Counter) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in _READING or _indexes_by_mask(name, args) or _repeats_by_tensor(name, args, kwargs or {}):
            self.places[_place()] += 1
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Counts what is no operator on a CPU: copies to and from Python."""

    def __init__(self, places: Counter) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        from_host = name in _FROM_HOST and ((kwargs or {}).get("device") is not None or name == "new_tensor")
        if from_host or name in _TO_HOST:
            self.places[_place()] += 1
        return function(*args, **(kwargs or {}))


def _indexes_by_mask(name: str, args: tuple) -> bool:
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    # Where all elements get one value, PyTorch fills them without asking which they are.
    fills = name != "aten::index" and args[2].numel() == 1
    return not fills and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _repeats_by_tensor(name: str, args: tuple, kwargs: dict) -> bool:
    return name == "aten::repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None


def _place() -> str:
    """The innermost line of the packages that is being run; without one, the innermost outside PyTorch."""
    frame, outside = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in PACKAGES:
            if package in path.parents:
                return f"{path.relative_to(package.parent).as_posix()}:{frame.f_lineno} {frame.f_code.co_name}"
        if outside is None and "torch" not in path.parts and path.name not in (Path(__file__).name, "warnings.py"):
            outside = f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return outside or "unknown"
