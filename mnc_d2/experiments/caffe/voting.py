"""Mask voting as the released code does it."""

from __future__ import annotations

from functools import partial

import torch

from ...modeling.roi_heads.mask_frame import Cells, MaskFrame
from ...modeling.roi_heads.mask_voting import vote_masks as vote_masks_in_frame
from .boxes import pixel_extents


class CaffeMaskFrame(MaskFrame):
    """The conventions of the released code.

    Corners of boxes are inclusive; they hold the coordinates of pixels. Pixels and mask cells are sampled at their
    top-left corners. In the last row there is no interpolation along it, and in the last column neither. A pixel must
    be above the threshold. A detection without any becomes the pixel in the middle of the image.
    """

    def extents(self, boxes: torch.Tensor) -> torch.Tensor:
        """As :meth:`MaskFrame.extents`."""
        return pixel_extents(boxes)

    def cell_positions(
        self, start: torch.Tensor, end: torch.Tensor, pixels: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`MaskFrame.cell_positions`."""
        return (pixels - start) * size / (end - start + 1), (pixels >= start) & (pixels <= end)

    def sample_positions(self, start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
        """As :meth:`MaskFrame.sample_positions`."""
        return start + torch.arange(size, dtype=start.dtype, device=start.device) * ((end - start + 1) / size)

    def separate(self, along_y: Cells, along_x: Cells, size: int) -> list[tuple[Cells, Cells]]:
        """As :meth:`MaskFrame.separate`: what is before the last row and column, the last row, the last column."""
        (y, in_rows), (x, in_columns) = along_y, along_x
        last_row, last_column = y == size - 1, x == size - 1
        return [
            (Cells(y, in_rows & ~last_row), Cells(x, in_columns & ~last_column)),
            (Cells(y, in_rows & last_row), Cells(x.floor(), in_columns)),
            (Cells(y.floor(), in_rows & ~last_row), Cells(x, in_columns & last_column)),
        ]

    def fractions(
        self, down: torch.Tensor, across: torch.Tensor, last_row: torch.Tensor, last_column: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`MaskFrame.fractions`."""
        return down[:, :, None] * ~last_column[:, None, :], across[:, None, :] * ~last_row[:, :, None]

    def is_foreground(self, values: torch.Tensor, threshold: float) -> torch.Tensor:
        """As :meth:`MaskFrame.is_foreground`."""
        return values > threshold

    def enclose(self, pixels: torch.Tensor) -> torch.Tensor:
        """As :meth:`MaskFrame.enclose`."""
        return pixels

    def replace_empty(self, boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """As :meth:`MaskFrame.replace_empty`."""
        return boxes.new_tensor([image_size[1] // 2, image_size[0] // 2] * 2).repeat(len(boxes), 1)


vote_masks = partial(vote_masks_in_frame, frame=CaffeMaskFrame())
