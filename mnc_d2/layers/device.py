"""Numbers of the host on another device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tensor_on(device: torch.device, values: Sequence, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``torch.tensor(values, dtype=dtype)`` on a device, without waiting for it.

    ``torch.tensor(values, device=device)`` waits until a GPU has done all that it was given before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def batch_indices(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The number of its image for each of R things that lie one image after another, ``counts`` of each: (R,), int64.

    A GPU is not waited for.
    """
    return torch.repeat_interleave(tensor_on(device, counts, torch.int64), output_size=sum(counts))


def wants_operator(x: torch.Tensor) -> bool:
    """Whether to leave the work on x to operators of PyTorch: for gradients, in a graph, or on a GPU."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() or traced or x.device.type != "cpu"


def is_exporting() -> bool:
    """Whether this is traced by torch.export, as far as PyTorch tells."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
