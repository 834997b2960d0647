"""Weighted averages of masks in the image: the arithmetic of mask voting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Pixels rendered at once, over all voters: few enough for a cache.
_MAX_RENDERED_PIXELS = 2**20
# Pixels of averaged maps that are held at once, 64 MiB; but one detection may have more.
_MAX_MAP_PIXELS = 2**24
# What is left out for being under the threshold must be so in whatever order, and with TF32, it would be summed.
_ROUNDING = 1e-3


class MaskMerger:
    """Averages masks that lie in the frames of boxes, pixel by pixel of the image.

    A rendered row of pixels is a weighted sum of rows of texels that have been stretched along x: an embedding bag, as
    stretching is. Only the two texels next to a pixel take part, not a whole row or column as in a product of matrices.
    """

    def __init__(self, boxes: torch.Tensor, masks: torch.Tensor, image_size: tuple[int, int]) -> None:
        """
        Args:
            boxes: (K, 4), float32, in image pixels.
            masks: (K, m, m), float32, probabilities in the frame of the box.
            image_size: (height, width).
        """
        height, width = image_size
        count, self.mask_size, _ = masks.shape
        x = _find_texels(boxes[:, 0], boxes[:, 2], width, self.mask_size)
        y = _find_texels(boxes[:, 1], boxes[:, 3], height, self.mask_size)
        self.image_size = image_size
        # The largest that a column or row of pixels can have of each mask.
        self.column_bounds = _texel_maxima(masks.amax(dim=1), x)
        self.row_bounds = _texel_maxima(masks.amax(dim=2), y)

        # Stretched rows, each element a sum of two columns of texels: (K, width, 2), into the columns of all masks.
        self.columns = masks.transpose(1, 2).reshape(count * self.mask_size, self.mask_size)
        first_column = self.mask_size * torch.arange(count, dtype=torch.int32, device=masks.device)[:, None]
        self.column_index = torch.stack((first_column + x.low, first_column + x.high), dim=-1)
        self.column_weight = x.weights
        # Rows of pixels, each a sum of two stretched rows: (K, height, 2), into those of the mask, which follow those
        # of the masks rendered before it.
        self.row_index = torch.stack((y.low, y.high), dim=-1)
        self.row_weight = y.weights
        self.first_row = first_column[:, None]

    def merge(
        self,
        weights: torch.Tensor,
        votes: torch.Tensor,
        group_of: torch.Tensor,
        threshold: float,
        boxes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up masks with weights (D, K), those of votes (D, K), and crop the sums.

        The detections of a group lie near one another: their voters are rendered once, where any detection of the group
        can reach the threshold, and added up by one matrix product. What the loop over groups has to know on the host
        is read before it starts.

        Args:
            weights: (D, K), the weight of each mask in each sum; those of a sum add up to 1.
            votes: (D, K), bool, where the weight is not 0.
            group_of: (D,), int64, from 0 on, without gaps.
            threshold: a pixel is foreground from this value on.
            boxes: (groups, 4), float32, in image pixels, where to render, and what to crop, instead; then a group is
                one detection.

        Returns:
            boxes (D, 4), float32, around the foreground pixels, without extent if there is none, or ``boxes``; and what
            of the sums lies in these boxes, sampled in their frames: (D, m, m), float32.
        """
        if len(votes) == 0:
            return weights.new_zeros(0, 4), weights.new_zeros(0, self.mask_size, self.mask_size)
        membership = F.one_hot(group_of).T  # (groups, D)
        group_votes = (membership.to(weights) @ votes.to(weights)) > 0  # (groups, K)
        if boxes is None:
            regions = self._find_regions(weights, membership.to(weights), threshold)
        else:
            regions = self._add_margin(boxes[:, :2].floor().long(), boxes[:, 2:].ceil().long())
        counts = torch.cat((membership.sum(dim=1, keepdim=True), group_votes.sum(dim=1, keepdim=True), regions), dim=1)
        counts = counts.tolist()
        voters_of = group_votes.nonzero()[:, 1].split([row[1] for row in counts])

        order = group_of.argsort(stable=True)  # the members of a group one after another
        weights, regions = weights[order], regions[group_of[order]]
        tight, masks = [], []
        for chunk in _divide([(count, region) for count, _, *region in counts]):
            members = slice(chunk[0].members.start, chunk[-1].members.stop)
            merged = self._merge_chunk(chunk, weights[members], regions[members], voters_of)
            tight.append(merged.tight_boxes(threshold) if boxes is None else boxes[group_of[order[members]]])
            masks.append(_sample(merged, tight[-1], self.mask_size))
        back = order.argsort()
        return torch.cat(tight)[back], torch.cat(masks)[back]

    def _merge_chunk(
        self, chunk: list[_Part], weights: torch.Tensor, regions: torch.Tensor, voters_of: tuple[torch.Tensor, ...]
    ) -> _MergedMasks:
        """Add up masks with the weights (d, K) of the detections of a chunk, whose regions (d, 4) are int64."""
        height, width = self.image_size
        values = weights.new_empty(sum(part.pixels for part in chunk))
        in_row, in_column = weights.new_zeros(len(weights), height), weights.new_zeros(len(weights), width)
        for part, part_values in zip(chunk, values.split([part.pixels for part in chunk])):
            x1, y1, x2, y2 = part.region
            members = slice(part.members.start - chunk[0].members.start, part.members.stop - chunk[0].members.start)
            voters = voters_of[part.group]
            merged = part_values.view(len(part.members), y2 - y1, x2 - x1)
            self._add_up(weights[members].index_select(1, voters), voters, part.region, out=merged)
            in_row[members, y1:y2] = merged.amax(dim=2)
            in_column[members, x1:x2] = merged.amax(dim=1)
        sizes = (regions[:, 2:] - regions[:, :2]).prod(dim=1)
        return _MergedMasks(values, sizes.cumsum(0) - sizes, regions, in_row, in_column)

    def _find_regions(self, weights: torch.Tensor, membership: torch.Tensor, threshold: float) -> torch.Tensor:
        """Where any detection of each group, membership (groups, D), can reach the threshold: (groups, 4), int64."""
        reached = [
            (membership @ (weights @ bounds >= threshold - _ROUNDING).to(weights)) > 0  # (groups, pixels of the axis)
            for bounds in (self.column_bounds, self.row_bounds)
        ]
        return self._add_margin(
            torch.stack([_first(x) for x in reached], dim=1), torch.stack([_last(x) + 1 for x in reached], dim=1)
        )

    def _add_margin(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Regions (n, 4) from start to end, both (n, 2), int64, and one pixel more on each side, in the image.

        Samples between the last pixel inside and the first outside need that. None is without extent.
        """
        height, width = self.image_size
        limit = start.new_tensor([width, height])
        start = (start - 1).clamp(min=0).minimum(limit - 1)
        return torch.cat((start, (end + 1).minimum(limit).maximum(start + 1)), dim=1)

    def _add_up(self, weights: torch.Tensor, voters: torch.Tensor, region: list[int], out: torch.Tensor) -> None:
        """Render the masks of voters (n,) in a region (x1, y1, x2, y2) and add them up with weights (d, n).

        The sums, (d, h, w), are written to ``out``, strip by strip of its columns, and block by block of its rows.
        """
        x1, y1, x2, y2 = region
        strip = max(1, _MAX_RENDERED_PIXELS // (len(voters) * self.mask_size))
        for left in range(x1, x2, strip):
            columns = slice(left, min(left + strip, x2))
            width = columns.stop - columns.start
            index = self.column_index[:, columns].index_select(0, voters)
            weight = self.column_weight[:, columns].index_select(0, voters)
            stretched = _bag(self.columns, index, weight).view(-1, width, self.mask_size)  # (n, w, m)
            table = stretched.transpose(1, 2).reshape(-1, width)  # (n * m, w)
            block = max(1, _MAX_RENDERED_PIXELS // (len(voters) * width))
            for top in range(y1, y2, block):
                rows = slice(top, min(top + block, y2))
                index = self.row_index[:, rows].index_select(0, voters) + self.first_row[: len(voters)]
                rendered = _bag(table, index, self.row_weight[:, rows].index_select(0, voters))  # (n * h, w)
                sums = weights @ rendered.view(len(voters), -1)
                out[:, rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1] = sums.view(
                    len(weights), -1, width
                )


class _Part(NamedTuple):
    """Detections of one group whose averaged maps are held at the same time."""

    group: int
    members: range  # of all detections, those of a group one after another
    region: list[int]  # x1, y1, x2, y2, far corner exclusive, of the image

    @property
    def pixels(self) -> int:
        x1, y1, x2, y2 = self.region
        return len(self.members) * (x2 - x1) * (y2 - y1)


def _divide(groups: list[tuple[int, list[int]]]) -> Iterator[list[_Part]]:
    """Divide groups, each a number of detections and a region, into chunks of at most _MAX_MAP_PIXELS."""
    chunk, pixels, first = [], 0, 0
    for group, (count, region) in enumerate(groups):
        at_once = max(1, _MAX_MAP_PIXELS // _Part(group, range(1), region).pixels)
        for start in range(first, first + count, at_once):
            part = _Part(group, range(start, min(start + at_once, first + count)), region)
            if chunk and pixels + part.pixels > _MAX_MAP_PIXELS:
                yield chunk
                chunk, pixels = [], 0
            chunk.append(part)
            pixels += part.pixels
        first += count
    yield chunk


class _MergedMasks(NamedTuple):
    """The averaged masks of d detections, each in a region of the image that has all pixels of the threshold."""

    values: torch.Tensor  # (sum of the regions' areas,), float32: the maps one after another, row by row
    start: torch.Tensor  # (d,), int64, of each map in `values`
    regions: torch.Tensor  # (d, 4), int64: x1, y1, x2, y2, far corner exclusive
    in_row: torch.Tensor  # (d, height), float32, the largest value in each row of the image
    in_column: torch.Tensor  # (d, width), float32

    def tight_boxes(self, threshold: float) -> torch.Tensor:
        """Boxes (d, 4), float32, around the pixels of a threshold; without extent if there is none."""
        occupied = [x >= threshold for x in (self.in_column, self.in_row)]
        return torch.stack([_first(x) for x in occupied] + [_last(x) + 1 for x in occupied], dim=1).float()


def _sample(merged: _MergedMasks, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Sample averaged masks in boxes (d, 4), float32, far corner exclusive, which their regions hold.

    Returns:
        (d, size, size), float32, in the frames of the boxes.
    """
    left, top, right, bottom = (merged.regions[:, i, None] for i in range(4))
    y_low, y_high, y_fraction = _sample_axis(boxes[:, 1], boxes[:, 3], size, top, bottom)  # each (d, size)
    x_low, x_high, x_fraction = _sample_axis(boxes[:, 0], boxes[:, 2], size, left, right)
    y_fraction, x_fraction = y_fraction[:, :, None], x_fraction[:, None, :]

    first_of_row = [(merged.start[:, None] + (y - top) * (right - left))[:, :, None] for y in (y_low, y_high)]
    columns = [(x - left)[:, None, :] for x in (x_low, x_high)]
    upper, lower = (
        torch.lerp(merged.values[first + columns[0]], merged.values[first + columns[1]], x_fraction)
        for first in first_of_row
    )
    return torch.lerp(upper, lower, y_fraction)


class _Texels(NamedTuple):
    """Where n pixels lie among m texels along one axis of K boxes."""

    low: torch.Tensor  # (K, n), int32, the texel at or before the pixel
    high: torch.Tensor  # (K, n), int32, the one after it
    weights: torch.Tensor  # (K, n, 2), of the two in the pixel; 0 where it does not belong to the box


def _find_texels(start: torch.Tensor, end: torch.Tensor, pixels: int, size: int) -> _Texels:
    """Find the pixels of an axis of the image among ``size`` texels of boxes from start (K,) to end (K,)."""
    pixel = torch.arange(pixels, dtype=start.dtype, device=start.device) + 0.5
    start, end = start[:, None], end[:, None]
    inside = (pixel >= start) & (pixel < end)
    position = (pixel - start) * size / (end - start).clamp(min=torch.finfo(start.dtype).tiny)
    position = (position - 0.5).clamp(0, size - 1)
    low = position.floor()
    fraction = position - low
    weights = torch.stack((1 - fraction, fraction), dim=-1) * inside[..., None]
    return _Texels(low.int(), (low + 1).clamp(max=size - 1).int(), weights)


def _texel_maxima(largest: torch.Tensor, texels: _Texels) -> torch.Tensor:
    """For the largest texels (K, m) of each column, what pixels in between cannot exceed: (K, n), 0 outside the box."""
    following = torch.cat((largest[:, 1:], largest[:, -1:]), dim=1)
    inside = texels.weights.sum(dim=-1)  # their sum is 1 or 0, but for rounding
    return largest.maximum(following).gather(1, texels.low.long()) * inside


def _first(occupied: torch.Tensor) -> torch.Tensor:
    """Index of the first that is true along the last axis; its size if none is."""
    index = torch.arange(occupied.shape[-1], device=occupied.device)
    return torch.where(occupied, index, occupied.shape[-1]).amin(dim=-1)


def _last(occupied: torch.Tensor) -> torch.Tensor:
    """Index of the last that is true along the last axis; -1 if none is."""
    index = torch.arange(occupied.shape[-1], device=occupied.device)
    return torch.where(occupied, index, -1).amax(dim=-1)


def _bag(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows of a table (rows, n) over the last axis of index and weight (..., T): (prod(...), n)."""
    count = index.shape[-1]
    return F.embedding_bag(index.reshape(-1, count), table, per_sample_weights=weight.reshape(-1, count), mode="sum")


def _sample_axis(
    start: torch.Tensor, end: torch.Tensor, size: int, first: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two pixels, of those from first to last (D, 1), last exclusive, that each of ``size`` samples of [start, end)
    is between, and how far it is to the second."""
    step = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    position = start[:, None] + step * ((end - start) / size)[:, None] - 0.5
    position = position.clamp(first, last - 1)
    low = position.floor()
    return low.long(), (low + 1).minimum(last - 1).long(), position - low
