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


def stop_gradient_except(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the values of ``x``; only the elements where the mask is true have a gradient.

    Args:
        x: any tensor.
        where: bool, broadcastable to the shape of ``x``.
    """
    return torch.where(where, x, x.detach())
