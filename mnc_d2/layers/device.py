"""Numbers of the host on another device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``torch.tensor(values, dtype=dtype)`` on a device, without waiting for it.

    ``torch.tensor(values, device=device)`` waits until a GPU has finished its earlier work.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def batch_indices(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the index of its image for each of R boxes, which lie one image after another: (R,), int64.

    A GPU is not waited for.

    Args:
        counts: number of boxes of each image; R in all.
        device: of the result.
    """
    return torch.repeat_interleave(to_device(counts, device, torch.int64), output_size=sum(counts))
