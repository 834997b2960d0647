"""Boxes with inclusive corners, and the scale between an image and the network's input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...layers import at_least_float32, clip_boxes, image_corners

_MAX_GROWTH = 50.0  # exp of it is far beyond any image, and far from the end of float32


class NetworkInputSize(tuple):
    """The (height, width) of the network's input, with the image that was scaled to it.

    It takes the place of the plain tuples in ``ImageList.image_sizes`` and in ``Instances.image_size``.

    Attributes:
        scale: factor from the image to the input; their sizes in whole pixels give it inexactly.
        original: (height, width) of the image.
    """

    scale: float
    original: tuple[int, int]

    def __new__(cls, size: Iterable[int], scale: float, original: tuple[int, int]) -> NetworkInputSize:
        self = super().__new__(cls, size)
        self.scale, self.original = scale, original
        return self

    def __getnewargs__(self) -> tuple:
        """Return what a copy is made from."""
        return tuple(self), self.scale, self.original


class InclusiveBoxTransform:
    """Decoding of box deltas as py-faster-rcnn does, in place of Detectron2's ``Box2BoxTransform``.

    A box of inclusive corners is x2 - x1 + 1 wide, and its centre is half of that from x1. The decoded corners lie half
    of the new width to both sides of the new centre, without the 1 at the far corner. Only what keeps sizes finite
    limits them.

    Args:
        weights: that dx, dy, dw and dh are divided by.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = tuple(weights)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return (R, 4 k), at least float32, for deltas (R, 4 k) and boxes (R, 4) of inclusive corners."""
        deltas, boxes = at_least_float32(deltas), at_least_float32(boxes)
        offsets, growth = (deltas.unflatten(1, (-1, 4)) / deltas.new_tensor(self.weights)).split(2, dim=2)
        sizes = boxes[:, None, 2:] - boxes[:, None, :2] + 1  # (R, 1, 2)
        centres = boxes[:, None, :2] + 0.5 * sizes + offsets * sizes
        half = 0.5 * growth.clamp(max=_MAX_GROWTH).exp() * sizes
        return torch.cat((centres - half, centres + half), dim=2).view_as(deltas)


def clip_to_pixels(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Clip boxes (R, 4) of inclusive corners to the pixels 0 to size - 1 of an image of (height, width)."""
    return clip_boxes(boxes, image_corners([(size[0] - 1, size[1] - 1)], boxes))


def pixel_extents(boxes: torch.Tensor) -> torch.Tensor:
    """Make the far corners of boxes (R, 4 k) exclusive: where the last pixel ends, not which it is."""
    return boxes + boxes.new_tensor([0, 0, 1, 1]).repeat(boxes.shape[1] // 4)
