"""Boxes at the border of their image, for the boxes of many images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .device import to_device


def image_corners(image_sizes: Sequence[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """Return the lower right corner of each image, twice, to compare boxes with.

    Args:
        image_sizes: (height, width) of each of N images.
        like: tensor with the device and dtype of the result.

    Returns:
        (N, 4), width, height, width, height.
    """
    corners = [[width, height, width, height] for height, width in image_sizes]
    return to_device(corners, like.device, like.dtype).view(-1, 4)


def inside_image(boxes: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Tell which boxes lie wholly in their image; a box that touches the border does.

    Args:
        boxes: (R, 4), x1, y1, x2, y2 in image pixels.
        corners: (R, 4), each box's row of :func:`image_corners`.

    Returns:
        (R, 1), bool, as :func:`~mnc_d2.layers.stop_gradient_except` takes it.
    """
    boxes = boxes.detach()
    return ((boxes >= 0) & (boxes <= corners)).all(dim=1, keepdim=True)


def clip_boxes(boxes: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Clip boxes to their image, as Detectron2's ``Boxes.clip``, whose check for finite numbers would wait for a GPU.

    Args:
        boxes: (R, 4), x1, y1, x2, y2 in image pixels.
        corners: (R, 4), each box's row of :func:`image_corners`.

    Returns:
        (R, 4); NaN stays NaN. A coordinate that is clipped has no gradient; one on the border has.
    """
    clipped = boxes.detach().clamp(min=0).minimum(corners)
    # Not the gradient of clamp(): on the border it is 1, 1/2 or 0, by the version of PyTorch and the kind of limit.
    return torch.where(clipped == boxes, boxes, clipped)
