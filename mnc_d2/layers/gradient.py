"""Identities in the forward pass that shape what flows back."""

import torch


def clip_gradient(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Return a view of ``x`` whose gradient is clamped element by element to ``[-limit, limit]``.

    Only the gradient that arrives through the returned tensor is clamped, not that of other uses of ``x``.

    Args:
        x: any tensor.
        limit: in units of loss per unit of ``x``; 0 for no clamping.
    """
    if limit == 0 or not x.requires_grad:
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return view


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a view of ``x`` whose gradient is multiplied by a factor, that of other uses of ``x`` is not."""
    if not x.requires_grad:
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient * factor)
    return view


def channels_last_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return a view of ``x`` (N, C, H, W) whose gradient is in channels_last memory format if ``x`` is.

    What flattens ``x`` passes back a gradient in the order of channels. On a CPU, poolings and sums take several times
    as long where a tensor and its gradient differ in this.
    """
    if not x.requires_grad or not x.is_contiguous(memory_format=torch.channels_last):
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return view


def stop_gradient_except(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the values of ``x``, passing gradient only to the elements where the mask is true.

    Args:
        x: any tensor.
        where: bool, broadcastable to the shape of ``x``.
    """
    return torch.where(where, x, x.detach())
