"""Where the cells of a mask, its box and the pixels of an image lie."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cells(NamedTuple):
    """Where p points lie along one axis of the cells of each of n masks."""

    position: torch.Tensor  # (n, p), float32, between 0 and the last cell
    inside: torch.Tensor  # (n, p), bool, whether the point counts

    def weights(self, size: int) -> torch.Tensor:
        """Return the weights of all ``size`` cells in the interpolation at each point: (n, p, size)."""
        cells = torch.arange(size, dtype=torch.float32, device=self.position.device)
        distances = (self.position[..., None] - cells).abs_()
        return distances.neg_().add_(1).clamp_(min=0).mul_(self.inside[..., None])  # in the memory of the distances

    def neighbours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two cells around each point, int64, and their weights: (n, p, 2) each."""
        low = self.position.floor()
        fraction = self.position - low
        index = torch.stack((low, self.position.ceil()), dim=2).long()
        return index, torch.stack((1 - fraction, fraction), dim=2) * self.inside[..., None]


class MaskFrame:
    """The conventions of this project: Detectron2's.

    The far corners of boxes are exclusive, and pixel i reaches from i to i + 1. A pixel belongs to a box if its centre
    lies inside. Values are interpolated bilinearly between centres, and constant beyond the outer ones.
    """

    def extents(self, boxes: torch.Tensor) -> torch.Tensor:
        """Make the far corners of boxes (K, 4) exclusive."""
        return boxes

    def cell_positions(
        self, start: torch.Tensor, end: torch.Tensor, pixels: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find pixels among the cells of masks, along one axis.

        Args:
            start, end: (n, 1), float32, of boxes whose masks have ``size`` cells.
            pixels: (p,), int64.

        Returns:
            (n, p), float32, from 0 to ``size`` - 1; and (n, p), bool, whether the box has the pixel.
        """
        centres = pixels + 0.5
        return (centres - start) * (size / (end - start)) - 0.5, (centres >= start) & (centres < end)

    def sample_positions(self, start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
        """Return where ``size`` mask cells from start to end (d, 1) lie among the pixels: (d, size), float32."""
        cells = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
        return start + cells * ((end - start) / size) - 0.5

    def find_cells(self, boxes: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: int) -> list[tuple[Cells, Cells]]:
        """Find the mask cells between which the pixels of boxes lie.

        Args:
            boxes: (n, 4), float32, in image pixels.
            x, y: (w,) and (h,), int64, columns and rows of the image.
            size: m, cells along a side.

        Returns:
            pairs of cells along y (n, h) and along x (n, w). The products of their weights, added up over the pairs,
            are the interpolation; they are 0 outside the boxes.
        """
        axes = []
        for i, pixels in ((1, y), (0, x)):
            position, inside = self.cell_positions(boxes[:, i, None], boxes[:, i + 2, None], pixels, size)
            axes.append(Cells(position.where(inside, 0).clamp(0, size - 1), inside))
        return self.separate(axes[0], axes[1], size)

    def separate(self, along_y: Cells, along_x: Cells, size: int) -> list[tuple[Cells, Cells]]:
        """Write an interpolation in both directions as a sum of products, see :meth:`find_cells`."""
        return [(along_y, along_x)]

    def sample(
        self, maps: torch.Tensor, boxes: torch.Tensor, origin: torch.Tensor, size: int, image_size: tuple[int, int]
    ) -> torch.Tensor:
        """Sample regions of an image, which is 0 outside of each, at the cells of boxes.

        Args:
            maps: (d, w, h), float32, the regions.
            boxes: (d, 4), float32, in image pixels.
            origin: (d, 2), int64, x and y of the first pixel of each region.
            size: m, cells along a side.
            image_size: (height, width).

        Returns:
            (d, m, m), interpolated bilinearly between pixels.
        """
        count, width, height = maps.shape
        limits = image_size[1] - 1, image_size[0] - 1
        x, y = (
            self.sample_positions(boxes[:, i, None], boxes[:, i + 2, None], size).clamp(0, limit)
            for i, limit in enumerate(limits)
        )
        left, right = (p.long() - origin[:, :1] for p in (x.floor(), x.ceil()))
        top, bottom = (p.long() - origin[:, 1:] for p in (y.floor(), y.ceil()))
        down, across = self.fractions(y - y.floor(), x - x.floor(), y == limits[1], x == limits[0])
        number = torch.arange(count, device=maps.device)[:, None, None]

        def pixels(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
            return maps[number, columns.clamp(0, width - 1)[:, None], rows.clamp(0, height - 1)[:, :, None]] * inside

        upper = torch.lerp(pixels(top, left), pixels(top, right), across)
        lower = torch.lerp(pixels(bottom, left), pixels(bottom, right), across)
        return torch.lerp(upper, lower, down)

    def fractions(
        self, down: torch.Tensor, across: torch.Tensor, last_row: torch.Tensor, last_column: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how far samples lie from one pixel to the next, along y and along x, to be broadcast to (d, m, m).

        Args:
            down, across: (d, m), along each axis.
            last_row, last_column: (d, m), bool, whether samples lie on the last pixel of the image.
        """
        return down[:, :, None], across[:, None, :]

    def is_foreground(self, values: torch.Tensor, threshold: float) -> torch.Tensor:
        """Tell whether averaged probabilities belong to the foreground."""
        return values >= threshold

    def enclose(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the boxes (D, 4) around pixels (D, 4), float32: the first x and y, the last x and y."""
        return pixels + pixels.new_tensor([0, 0, 1, 1])

    def replace_empty(self, boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Return the boxes (D, 4) of detections without foreground, from the boxes (D, 4) of their candidates."""
        height, width = image_size
        return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
