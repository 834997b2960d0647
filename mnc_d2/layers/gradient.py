"""Identities in the forward pass that shape what flows back, and what is done at the image border."""

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


def pass_gradient(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the values of ``x``, passing gradient only to the elements where the mask is true.

    Args:
        x: any tensor.
        where: bool, broadcastable to the shape of ``x``.
    """
    return torch.where(where, x, x.detach())


def inside_image(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Tell which boxes lie wholly in the image; those that touch its border do.

    Args:
        boxes: (..., 4), x1, y1, x2, y2 in image pixels.
        image_size: (height, width).

    Returns:
        (..., 1), bool, as :func:`pass_gradient` takes it.
    """
    height, width = image_size
    x1, y1, x2, y2 = boxes.detach().split(1, dim=-1)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


def clip_boxes(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Clip boxes to the image, as Detectron2's ``Boxes.clip``, which also checks them: a GPU would be waited for.

    Args:
        boxes: (R, 4), x1, y1, x2, y2 in image pixels.
        image_size: (height, width).

    Returns:
        (R, 4); NaN stays NaN. A coordinate that is clipped has no gradient.
    """
    height, width = image_size
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack((x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=1)
