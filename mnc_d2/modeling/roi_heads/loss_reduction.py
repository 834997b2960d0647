"""How the losses of RoIs become the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...layers import batch_indices, to_device


def mean_over_images(losses: torch.Tensor, counts: Sequence[int], where: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the images of the mean over the RoIs of each image, 0 for an image without any.

    Each image counts the same, so that a batch gives the mean of the gradients that its images would give one by one,
    however they are divided into batches and processes. The authors' batches are single images.

    Args:
        losses: (..., R), of the RoIs of all images, one image after another.
        counts: number of RoIs of each image; R in all.
        where: (R,), bool, which RoIs to average over; all by default.

    Returns:
        (...), dtype of ``losses``; 0 for no image.
    """
    image = batch_indices(counts, losses.device)
    numbers = to_device(counts, losses.device, losses.dtype)
    if where is not None:
        where = where.to(losses)
        numbers = torch.zeros_like(numbers).index_add(0, image, where)
    shares = (1 / (numbers.clamp(min=1) * max(len(counts), 1)))[image]
    return (losses * (shares if where is None else shares * where)).sum(dim=-1)
