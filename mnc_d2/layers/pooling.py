"""Max pooling of the features of RoIs, times their masks where there are any."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

# Elements of the features that are pooled at once: few enough for the cache of a CPU.
_MAX_ELEMENTS = 2**20


def max_pool(features: torch.Tensor, size: int, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``F.max_pool2d(features * masks[:, None], S // size)``, where no gradient is wanted in less time.

    PyTorch writes for each result the index that a backward pass needs, and products that are as large as the features.
    On a CPU both take longer than the maxima.

    Args:
        features: (R, C, S, S).
        size: s, a divisor of S.
        masks: (R, S, S), any dtype, converted to that of the features; None for features as they are.

    Returns:
        (R, C, s, s).
    """
    stride = features.shape[-1] // size
    of_features = None if masks is None else masks[:, None].to(features.dtype)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or traced or features.device.type != "cpu":
        return F.max_pool2d(features if masks is None else features * of_features, stride)
    pooled = features.new_empty(*features.shape[:2], size, size)
    rois = max(1, _MAX_ELEMENTS // max(1, features[:1].numel()))
    for part in (slice(first, first + rois) for first in range(0, len(features), rois)):
        x = features[part] if masks is None else features[part] * of_features[part]
        pooled[part] = reduce(
            torch.maximum, (x[..., i::stride, j::stride] for i in range(stride) for j in range(stride))
        )
    return pooled
