"""Boxes with inclusive corners, and the scale between an image and the network's input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_MAX_GROWTH = 50.0  # exp of it is far beyond any image, and far from the end of float32


class NetworkInputSize(tuple):
    """The (height, width) of the network's input, which also knows the image that was scaled to it.

    It takes the place of the plain tuples in ``ImageList.image_sizes`` and in ``Instances.image_size``.

    Attributes:
        scale: factor from the image to the input; their sizes in whole pixels give it inexactly.
        original: (height, width) of the image.
    """

    scale: float
    original: tuple[int, int]

    def __new__(cls, size: Iterable[int], scale: float, original: tuple[int, int]) -> NetworkInputSize:
        self = super().__new__(cls, size)
        self.scale = scale
        self.original = original
        return self

    def __getnewargs__(self) -> tuple:
        """Return what a copy is made from."""
        return tuple(self), self.scale, self.original


class InclusiveBoxTransform:
    """Decoding of box deltas as py-faster-rcnn does, in place of Detectron2's ``Box2BoxTransform``.

    A box of inclusive corners is x2 - x1 + 1 wide, and its centre is half of that from x1. The decoded corners lie half
    of the new width to both sides of the new centre, without the 1 at the far corner, and sizes are not limited, but by
    what keeps them finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Args:
            weights: that dx, dy, dw and dh are divided by.
        """
        self.weights = tuple(weights)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            deltas: (R, 4 k), k boxes for each box; dx, dy, dw, dh.
            boxes: (R, 4), inclusive corners.

        Returns:
            (R, 4 k), at least float32.
        """
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        deltas, boxes = deltas.to(dtype), boxes.to(dtype)
        offsets, growth = (deltas.unflatten(1, (-1, 4)) / deltas.new_tensor(self.weights)).split(2, dim=2)
        sizes = boxes[:, None, 2:] - boxes[:, None, :2] + 1  # (R, 1, 2)
        centres = boxes[:, None, :2] + 0.5 * sizes + offsets * sizes
        half = 0.5 * growth.clamp(max=_MAX_GROWTH).exp() * sizes
        return torch.cat((centres - half, centres + half), dim=2).view_as(deltas)


def clip_to_pixels(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Clip boxes (..., 4) of inclusive corners to the pixels 0 to size - 1 of an image of (height, width)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width - 1, height - 1] * 2))


def pixel_extents(boxes: torch.Tensor) -> torch.Tensor:
    """Make the far corners of boxes (..., 4 k) exclusive: where the last pixel ends, not which it is."""
    corners = boxes.unflatten(-1, (-1, 4))
    return (corners + corners.new_tensor([0, 0, 1, 1])).flatten(-2)
