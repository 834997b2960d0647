"""Max pooling that, where there is no backward pass, does not prepare one.

PyTorch writes for each result the index that a backward pass needs, which on a CPU takes longer than the maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
import torch.nn.functional as F

from .device import is_exporting, wants_operator
from .gradient import channels_last_gradient

# Elements of the features that are pooled at once: few enough for the cache of a CPU.
_MAX_ELEMENTS = 2**20


def max_pool(features: torch.Tensor, size: int, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``F.max_pool2d(features * masks[:, None], S // size)``, where no gradient is wanted in less time.

    Args:
        features: (R, C, S, S), of RoIs.
        size: s, a divisor of S.
        masks: (R, S, S), any dtype, converted to that of the features; None for features as they are.

    Returns:
        (R, C, s, s).
    """
    stride = features.shape[-1] // size
    of_features = None if masks is None else masks[:, None].to(features.dtype)
    if wants_operator(features):
        masked = features if masks is None else features * of_features
        if is_exporting():
            return _pool_channel_by_channel(masked, stride)
        return channels_last_gradient(F.max_pool2d(masked, stride))
    return _pool_in_parts(features, stride, features.new_empty(*features.shape[:2], size, size), of_features)


def _pool_channel_by_channel(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Return ``F.max_pool2d(x, stride)`` of x (R, C, S, S), each channel as an image of its own.

    For many channels onnxruntime has another order in memory, and takes as long to bring them into it as to pool them.
    """
    return F.max_pool2d(x.flatten(0, 1)[:, None], stride).view(*x.shape[:2], *(size // stride for size in x.shape[2:]))


def max_pool_images(images: torch.Tensor, stride: int, ceil_mode: bool = False) -> torch.Tensor:
    """Return ``F.max_pool2d(images, stride, ceil_mode=ceil_mode)``, where no gradient is wanted in less time.

    Args:
        images: (N, C, H, W).
        stride: of windows of as many rows and columns.
        ceil_mode: whether what is left beyond the last whole window is pooled, too, or left out.

    Returns:
        (N, C, H / stride, W / stride), rounded up with ``ceil_mode``, else down.
    """
    if (
        wants_operator(images)
        or not images.is_contiguous(memory_format=torch.channels_last)
        or (ceil_mode and any(size % stride for size in images.shape[2:]))
    ):
        return F.max_pool2d(images, stride, ceil_mode=ceil_mode)
    images = images[..., : images.shape[2] // stride * stride, : images.shape[3] // stride * stride]
    shape = (*images.shape[:2], images.shape[2] // stride, images.shape[3] // stride)
    pooled = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    return _pool_in_parts(images, stride, pooled)


def _pool_in_parts(
    x: torch.Tensor, stride: int, pooled: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Write the maxima of windows of x (N, C, H, W), times the factors (N, 1, H, W), into ``pooled``; return it."""
    for items, rows in _parts(pooled.shape, stride):
        window_rows = slice(rows.start * stride, rows.stop * stride)
        part = x[items, :, window_rows]
        if factors is not None:
            part = part * factors[items, :, window_rows]
        # Along the rows first: their values lie together, whatever the stride.
        part = reduce(torch.maximum, (part[:, :, i::stride] for i in range(stride)))
        pooled[items, :, rows] = reduce(torch.maximum, (part[..., i::stride] for i in range(stride)))
    return pooled


def _parts(shape: torch.Size, stride: int) -> Iterator[tuple[slice, slice]]:
    """Cut a result of shape (N, C, h, w) into items and rows whose windows are few enough elements."""
    items, channels, height, width = shape
    row = max(1, channels * width * stride**2)  # elements of the windows of a row
    rows_at_once = max(1, min(height, _MAX_ELEMENTS // row))
    items_at_once = max(1, _MAX_ELEMENTS // (row * max(1, height)))
    for item in range(0, items, items_at_once):
        for top in range(0, height, rows_at_once):
            yield slice(item, item + items_at_once), slice(top, min(height, top + rows_at_once))
