"""Boxes at the border of their image, for the boxes of many images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .device import batch_indices, tensor_on


def image_corners(image_sizes: Sequence[tuple[int, int]], counts: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The lower right corner of the image of each of R boxes, as :func:`clip_boxes` and :func:`inside_image` take it.

    Args:
        image_sizes: (height, width) of each image.
        counts: number of boxes of each image, one image after another; R in all.
        like: tensor with the device and dtype of the result.

    Returns:
        (R, 4), width, height, width, height.
    """
    if len(image_sizes) == 0:
        return like.new_zeros(0, 4)
    corners = tensor_on(like.device, [[width, height] * 2 for height, width in image_sizes], like.dtype)
    return corners[batch_indices(counts, like.device)]


def inside_image(boxes: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Tell which boxes lie wholly in their image; those that touch its border do.

    Args:
        boxes: (R, 4), x1, y1, x2, y2 in image pixels.
        corners: (R, 4), of their images, see :func:`image_corners`.

    Returns:
        (R, 1), bool, as :func:`~mnc_d2.layers.stop_gradient_except` takes it.
    """
    boxes = boxes.detach()
    return ((boxes >= 0) & (boxes <= corners)).all(dim=1, keepdim=True)


def clip_boxes(boxes: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Clip boxes to their image, as Detectron2's ``Boxes.clip``, which also checks them: a GPU would be waited for.

    Args:
        boxes: (R, 4), x1, y1, x2, y2 in image pixels.
        corners: (R, 4), of their images, see :func:`image_corners`.

    Returns:
        (R, 4); NaN stays NaN. A coordinate that is clipped has no gradient; one on the border has.
    """
    clipped = boxes.detach().clamp(min=0).minimum(corners)
    # Not the gradient of clamp(): on the border it is 1, 1/2 or 0, by the version of PyTorch and the kind of limit.
    return torch.where(clipped == boxes, boxes, clipped)
