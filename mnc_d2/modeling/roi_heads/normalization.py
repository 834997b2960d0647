"""How the losses of RoIs become the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...layers import tensor_on


def mean_over_images(losses: torch.Tensor, counts: Sequence[int], where: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the images of the mean over the RoIs of each image, 0 for an image without any.

    Each image counts the same, so that a batch gives the mean of the gradients that its images would give one by one,
    however they are divided into batches and processes. The authors' batches are single images.

    Args:
        losses: (R,), of the RoIs of all images, one image after another.
        counts: number of RoIs of each image; R in all.
        where: (R,), bool, which RoIs to average over; all by default.

    Returns:
        scalar, dtype of ``losses``; 0 for no image.
    """
    where = torch.ones_like(losses) if where is None else where.to(losses)
    image = torch.repeat_interleave(tensor_on(losses.device, counts, torch.int64), output_size=len(losses))
    zeros = losses.new_zeros(len(counts))
    sums, numbers = zeros.index_add(0, image, losses * where), zeros.index_add(0, image, where)
    return (sums / numbers.clamp(min=1)).sum() / max(len(counts), 1)
