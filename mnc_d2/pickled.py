"""Pickled files, such as the checkpoints of Detectron2's model zoo, read without running code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

_NUMERIC = re.compile(r"[biuf][1248]")


class _DType:
    """What a file says of a ``numpy.dtype``. NumPy's own would take a state from the file and trust it."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise pickle.UnpicklingError(f"it has an array of type {code!r}, where only numbers are admitted")
        self._code = code
        self._order: Literal["<", ">", "=", "|"] = "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it has an array of byte order {state[1]!r}")
        self._order = state[1]

    def decode(self, data: bytes | str) -> np.ndarray:
        """Return the numbers in bytes, which Python 2 pickled as text."""
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(self._code).newbyteorder(self._order)).astype(self._code)


class _Array:
    """An array whose content the file has after it; :func:`_finish` puts it in its place."""

    def __init__(self, *_: Any) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if by_columns else "C")


def _from_buffer(
    data: bytes | str, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"] = "C"
) -> np.ndarray:
    return dtype.decode(data).reshape(shape, order=order)


def _scalar(dtype: _DType, data: bytes | str) -> Any:
    return dtype.decode(data)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 wrote of bytes for a protocol of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# NumPy 1 has the modules of "numpy.core" that NumPy 2 has in "numpy._core".
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # of protocols that have no other way to write it
    ("collections", "OrderedDict"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


# The one in C grows its memo to whatever index the file names, as far as the memory goes.
class _Unpickler(pickle._Unpickler):
    """Knows arrays of numbers, and no other objects of Python than numbers, texts and containers of these."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not admitted as it could run code")
        admitted = _ADMITTED[module, name]
        # A function is wrapped for each time: a file may set attributes of what it names.
        return admitted if isinstance(admitted, type) else lambda *args: admitted(*args)


def read_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """Read a pickled dict of arrays of numbers, numbers, texts, and dicts, lists and tuples of these.

    Nothing that the file names is imported or called.

    Raises:
        ValueError: the file holds anything else, or is damaged; the message names it.
    """
    try:
        with open(path, "rb") as file:
            content = _finish(_Unpickler(file, encoding="latin1").load(), {})
    except Exception as error:  # a damaged file leads to errors of all kinds
        raise ValueError(
            f"{path} cannot be read: {str(error) or type(error).__name__}. Pickled files may hold arrays, numbers, "
            "texts and containers only."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a dict should be.")
    return content


def _finish(value: Any, done: dict[int, Any]) -> Any:
    """Return a value of the file with NumPy's arrays in it; ``done`` has the earlier ones, by their id."""
    if id(value) not in done:
        finished = value
        if isinstance(value, _Array):
            finished = value.array
        elif isinstance(value, dict):
            finished = {key: _finish(x, done) for key, x in value.items()}
        elif isinstance(value, (list, tuple)):
            finished = type(value)(_finish(x, done) for x in value)
        done[id(value)] = finished
    return done[id(value)]
