"""Weighted averages of masks in the image: the arithmetic of mask voting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...layers import tensor_on


class _Limits(NamedTuple):
    """How much is done at once. On a GPU each operator takes its time to start, however little it has to do."""

    group_pixels: int  # of averaged maps of one group that are held at once; but one detection may have more
    map_pixels: int  # of averaged maps of several groups that are held at once
    rendered_pixels: int  # rendered at once, over all voters
    small_group_pixels: int  # groups of up to so many, over their voters, are rendered several at once,
    pixels_of_small_groups: int  # up to so many, as if all of these groups were as large as the largest


_LIMITS = {
    # 2**21 are 8 MiB. More falls out of the cache, and is returned to the kernel and cleared by it.
    "cpu": _Limits(2**24, 2**21, 2**20, 2**16, 2**19),
    "cuda": _Limits(2**24, 2**24, 2**25, sys.maxsize, 2**25),
}
# Up to so many detections, adding up rows of texels for each of them takes less time than rendering the masks first.
_FEW_DETECTIONS = 4
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
        count, self.mask_size, _ = masks.shape
        self.image_size = image_size
        self.boxes = boxes
        self.limits = _LIMITS["cpu" if boxes.device.type == "cpu" else "cuda"]
        # Stretched rows, each element a sum of two columns of texels: of the columns of all masks.
        self.columns = masks.transpose(1, 2).reshape(count * self.mask_size, self.mask_size)

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
        can reach the threshold. What the loop over groups has to know on the host is read before it starts.

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
        if boxes is None and threshold <= 0:
            height, width = self.image_size
            regions = tensor_on(votes.device, [[0, 0, width, height]] * len(membership), torch.int64)
        elif boxes is None:
            regions = self._find_regions(weights, membership.bool(), threshold)
        else:
            regions = self._add_margin(boxes[:, :2].floor().long(), boxes[:, 2:].ceil().long())
        # Small groups first, and those of like size one after another: what is rendered at once is as large as the
        # largest of it.
        areas = (regions[:, 2:] - regions[:, :2]).prod(dim=1)
        is_large = areas * group_votes.sum(dim=1) > self.limits.small_group_pixels
        by_area = areas.argsort()
        by_area = by_area[is_large[by_area].int().argsort(stable=True)]
        regions, membership, group_votes = regions[by_area], membership[by_area], group_votes[by_area]
        group_of, boxes = by_area.argsort()[group_of], None if boxes is None else boxes[by_area]
        sizes = torch.stack((membership.sum(dim=1), group_votes.sum(dim=1)), dim=1)
        counts = torch.cat((sizes, regions), dim=1).tolist()
        group, voter = group_votes.nonzero(as_tuple=True)  # (P,), the voters of a group one after another
        voters = self._find_voters(regions, group, voter, counts)

        order = group_of.argsort(stable=True)  # the members of a group one after another, too
        weights, regions = weights[order], regions[group_of[order]]
        tight, masks = [], []
        groups = [(members, number, region) for members, number, *region in counts]
        for chunk in _divide(groups, self.limits):
            members = slice(chunk[0].members.start, chunk[-1].members.stop)
            at_once = len(chunk) > 1 and chunk[0].rendered_pixels <= self.limits.small_group_pixels
            merge = self._merge_at_once if at_once else self._merge_one_by_one
            merged = merge(chunk, weights[members], regions[members], voters)
            tight.append(merged.tight_boxes(threshold) if boxes is None else boxes[group_of[order[members]]])
            masks.append(_sample(merged, tight[-1], self.mask_size))
        back = order.argsort()
        return torch.cat(tight)[back], torch.cat(masks)[back]

    def _find_voters(
        self, regions: torch.Tensor, group: torch.Tensor, voter: torch.Tensor, counts: list[list[int]]
    ) -> _Voters:
        """Find the texels of P masks, ``voter``, in the regions (groups, 4) of the groups that they vote in."""
        size, boxes = self.mask_size, self.boxes[voter]
        # The columns of all masks lie one mask after another; the rows of those that are rendered, as these do.
        rank = torch.arange(len(voter), device=voter.device)
        width, height = (max(row[side + 2] - row[side] for row in counts) for side in (2, 3))
        return _Voters(
            voter,
            _find_texels(boxes[:, 0], boxes[:, 2], regions[group, 0], width, size, voter * size),
            _find_texels(boxes[:, 1], boxes[:, 3], regions[group, 1], height, size, rank * size),
            size,
        )

    def _merge_one_by_one(
        self, chunk: list[_Part], weights: torch.Tensor, regions: torch.Tensor, voters: _Voters
    ) -> _MergedMasks:
        """Add up masks with the weights (d, K) of the detections of a chunk, whose regions (d, 4) are int64."""
        width, height = (max(sizes) for sizes in zip(*(part.size for part in chunk)))
        values = weights.new_empty(sum(part.pixels for part in chunk))
        in_row, in_column = weights.new_zeros(len(weights), height), weights.new_zeros(len(weights), width)
        for part, part_values in zip(chunk, values.split([part.pixels for part in chunk])):
            width, height = part.size
            members = slice(part.members.start - chunk[0].members.start, part.members.stop - chunk[0].members.start)
            merged = part_values.view(len(part.members), height, width)
            self._add_up(weights[members], voters, part.voters, out=merged)
            in_row[members, :height] = merged.amax(dim=2)
            in_column[members, :width] = merged.amax(dim=1)
        widths, heights = (regions[:, 2:] - regions[:, :2]).unbind(dim=1)
        areas = widths * heights
        return _MergedMasks(values, areas.cumsum(0) - areas, widths, regions, in_row, in_column)

    def _merge_at_once(
        self, chunk: list[_Part], weights: torch.Tensor, regions: torch.Tensor, voters: _Voters
    ) -> _MergedMasks:
        """As :meth:`_merge_one_by_one`, with maps as large as the largest region, and 0 beyond their own."""
        device, size = weights.device, self.mask_size
        width, height = (max(sizes) for sizes in zip(*(part.size for part in chunk)))
        chosen = slice(chunk[0].voters.start, chunk[-1].voters.stop)
        index, x, y = voters.chosen(chosen)
        stretched = _bag(self.columns, x.pixels(slice(width))).view(len(index), width, size)
        table = stretched.transpose(1, 2).reshape(len(index) * size, width)
        rendered = _bag(table, y.pixels(slice(height)))  # (n * height, width)

        # A detection's bag: the voters of its group, one after another.
        numbers = [part.voters.stop - part.voters.start for part in chunk for _ in part.members]
        firsts = [part.voters.start - chosen.start for part in chunk for _ in part.members]
        number, first = tensor_on(device, [numbers, firsts], torch.int64)
        detection = torch.repeat_interleave(number, output_size=sum(numbers))
        start_of_bag = number.cumsum(0) - number
        voter = torch.arange(sum(numbers), device=device) + (first - start_of_bag)[detection]
        values = F.embedding_bag(
            voter,
            rendered.view(len(index), -1),
            start_of_bag,
            per_sample_weights=weights[detection, index[voter]],
            mode="sum",
        ).view(-1, height, width)
        inside = [
            torch.arange(extent, device=device) < (regions[:, end] - regions[:, end - 2])[:, None]
            for extent, end in ((height, 3), (width, 2))
        ]
        values = values * inside[0][:, :, None] * inside[1][:, None, :]
        starts = torch.arange(len(weights), device=device) * (height * width)
        row_lengths = torch.full_like(starts, width)
        return _MergedMasks(values.flatten(), starts, row_lengths, regions, values.amax(dim=2), values.amax(dim=1))

    def _find_regions(self, weights: torch.Tensor, membership: torch.Tensor, threshold: float) -> torch.Tensor:
        """Where any detection of each group, membership (groups, D), bool, can reach the threshold: (groups, 4), int64.

        Left of a pixel whose column reaches it, there begin boxes that have together a weight of the threshold, as no
        mask exceeds 1; and so on all four sides.
        """
        sides = []
        for side in range(4):
            coordinates, order = self.boxes[:, side].sort(descending=side >= 2)
            enough = weights[:, order].cumsum(dim=1) >= threshold - _ROUNDING
            sides.append(coordinates[_first(enough).clamp(max=len(coordinates) - 1)])
        start, end = torch.stack(sides[:2], dim=1), torch.stack(sides[2:], dim=1)  # (D, 2)
        outside = ~membership[..., None]
        start = start.masked_fill(outside, torch.inf).amin(dim=1)
        end = end.masked_fill(outside, -torch.inf).amax(dim=1)
        return self._add_margin(start.floor().long(), end.ceil().long())

    def _add_margin(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Regions (n, 4) from start to end, both (n, 2), int64, and one pixel more on each side, in the image.

        Samples between the last pixel inside and the first outside need that. None is without extent.
        """
        height, width = self.image_size
        limit = start.new_tensor([width, height])
        start = (start - 1).clamp(min=0).minimum(limit - 1)
        return torch.cat((start, (end + 1).minimum(limit).maximum(start + 1)), dim=1)

    def _add_up(self, weights: torch.Tensor, voters: _Voters, chosen: slice, out: torch.Tensor) -> None:
        """Render the masks of the n chosen voters of a group and add them up with weights (d, K).

        The sums, (d, h, w), are written to ``out``, strip by strip of its columns, and block by block of its rows.
        """
        _, height, width = out.shape
        index, x, y = voters.chosen(chosen)
        weights = weights.index_select(1, index)
        strip = max(1, self.limits.rendered_pixels // (len(index) * self.mask_size))
        for left in range(0, width, strip):
            columns = slice(left, min(left + strip, width))
            stretched = _bag(self.columns, x.pixels(columns)).view(len(index), -1, self.mask_size)  # (n, w, m)
            table = stretched.transpose(1, 2).reshape(len(index) * self.mask_size, -1)  # (n * m, w)
            block = max(1, self.limits.rendered_pixels // (len(index) * table.shape[1]))
            for top in range(0, height, block):
                rows = slice(top, min(top + block, height))
                if len(weights) <= _FEW_DETECTIONS:
                    sums = _bag_of_masks(table, y.pixels(rows), weights)
                else:
                    sums = weights @ _bag(table, y.pixels(rows)).view(len(index), -1)
                out[:, rows, columns] = sums.view(len(weights), -1, table.shape[1])


class _Part(NamedTuple):
    """Detections of one group whose averaged maps are held at the same time."""

    voters: slice  # of all voters, those of a group one after another
    members: range  # of all detections, likewise
    region: list[int]  # x1, y1, x2, y2, far corner exclusive, of the image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the region."""
        x1, y1, x2, y2 = self.region
        return x2 - x1, y2 - y1

    @property
    def pixels(self) -> int:
        """Of the averaged maps."""
        width, height = self.size
        return len(self.members) * width * height

    @property
    def rendered_pixels(self) -> int:
        """Of the voters."""
        width, height = self.size
        return (self.voters.stop - self.voters.start) * width * height


def _divide(groups: list[tuple[int, int, list[int]]], limits: _Limits) -> Iterator[list[_Part]]:
    """Divide groups, each so many detections and voters and a region, small ones first, into chunks within the limits.

    A chunk has either small groups, to be rendered at once, or others, to be rendered one by one.
    """
    chunk, pixels, first, first_voter = [], 0, 0, 0
    for count, number, region in groups:
        voters = slice(first_voter, first_voter + number)
        at_once = max(1, limits.group_pixels // _Part(voters, range(1), region).pixels)
        for start in range(first, first + count, at_once):
            part = _Part(voters, range(start, min(start + at_once, first + count)), region)
            if chunk:
                are_small = [x.rendered_pixels <= limits.small_group_pixels for x in (chunk[0], part)]
                too_many = pixels + part.pixels > limits.map_pixels or are_small[0] != are_small[1]
                if too_many or (are_small[0] and _padded_pixels([*chunk, part]) > limits.pixels_of_small_groups):
                    yield chunk
                    chunk, pixels = [], 0
            chunk.append(part)
            pixels += part.pixels
        first, first_voter = first + count, voters.stop
    yield chunk


def _padded_pixels(chunk: list[_Part]) -> int:
    """Pixels rendered, over all voters and detections, with regions as large as the largest."""
    width, height = (max(sizes) for sizes in zip(*(part.size for part in chunk)))
    return (chunk[-1].voters.stop - chunk[0].voters.start + sum(len(part.members) for part in chunk)) * width * height


class _MergedMasks(NamedTuple):
    """The averaged masks of d detections, each in a region of the image that has all pixels of the threshold."""

    values: torch.Tensor  # float32: the maps one after another, row by row
    start: torch.Tensor  # (d,), int64, of each map in `values`
    row_length: torch.Tensor  # (d,), int64, from one row of a map to the next, in `values`
    regions: torch.Tensor  # (d, 4), int64: x1, y1, x2, y2, far corner exclusive
    in_row: torch.Tensor  # (d, largest height), float32, the largest value in each row of the region; 0 beyond it
    in_column: torch.Tensor  # (d, largest width), float32

    def tight_boxes(self, threshold: float) -> torch.Tensor:
        """Boxes (d, 4), float32, around the pixels of a threshold; without extent if there is none."""
        occupied = [x >= threshold for x in (self.in_column, self.in_row)]
        inside = torch.stack([_first(x) for x in occupied] + [_last(x) + 1 for x in occupied], dim=1)
        return (inside + self.regions[:, :2].repeat(1, 2)).float()


def _sample(merged: _MergedMasks, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Sample averaged masks in boxes (d, 4), float32, far corner exclusive, which their regions hold.

    Returns:
        (d, size, size), float32, in the frames of the boxes.
    """
    left, top, right, bottom = (merged.regions[:, i, None] for i in range(4))
    y_low, y_high, y_fraction = _sample_axis(boxes[:, 1], boxes[:, 3], size, top, bottom)  # each (d, size)
    x_low, x_high, x_fraction = _sample_axis(boxes[:, 0], boxes[:, 2], size, left, right)
    y_fraction, x_fraction = y_fraction[:, :, None], x_fraction[:, None, :]

    first_of_row = [
        (merged.start[:, None] + (y - top) * merged.row_length[:, None])[:, :, None] for y in (y_low, y_high)
    ]
    columns = [(x - left)[:, None, :] for x in (x_low, x_high)]
    upper, lower = (
        torch.lerp(merged.values[first + columns[0]], merged.values[first + columns[1]], x_fraction)
        for first in first_of_row
    )
    return torch.lerp(upper, lower, y_fraction)


class _Texels(NamedTuple):
    """The two texels that each of p pixels along one axis of n boxes lies between."""

    index: torch.Tensor  # (n, p, 2), int32
    weight: torch.Tensor  # (n, p, 2); 0 where the pixel does not belong to the box

    def pixels(self, chosen: slice) -> _Texels:
        return _Texels(self.index[:, chosen], self.weight[:, chosen])


class _Voters(NamedTuple):
    """The masks that are rendered, P in all, those of a group one after another."""

    index: torch.Tensor  # (P,), int64
    x: _Texels  # of the columns of the group's region: the columns of all masks, one mask after another
    y: _Texels  # of its rows: the rows of these P masks, one mask after another
    mask_size: int

    def chosen(self, chosen: slice) -> tuple[torch.Tensor, _Texels, _Texels]:
        """The same of some of them: the rows are those of the chosen masks."""
        first_row = chosen.start * self.mask_size
        x = _Texels(self.x.index[chosen], self.x.weight[chosen])
        return self.index[chosen], x, _Texels(self.y.index[chosen] - first_row, self.y.weight[chosen])


def _find_texels(
    start: torch.Tensor, end: torch.Tensor, first_pixel: torch.Tensor, pixels: int, size: int, first_texel: torch.Tensor
) -> _Texels:
    """Find the texels of pixels of the image; beyond the centre of an outer texel they take the value of that one.

    Args:
        start, end: (n,), of boxes, each of ``size`` texels.
        first_pixel: (n,), int64, of so many pixels.
        first_texel: (n,), int64, the index of each box's first texel.
    """
    pixel = torch.arange(pixels, dtype=start.dtype, device=start.device) + 0.5 + first_pixel[:, None]
    start, end = start[:, None], end[:, None]
    inside = ((pixel >= start) & (pixel < end)).to(start)
    position = (pixel - start) * (size / (end - start).clamp(min=torch.finfo(start.dtype).tiny))
    position = (position - 0.5).clamp(0, size - 1)
    low = position.floor()
    fraction = (position - low) * inside
    index = first_texel.int()[:, None] + low.int()
    # The weight of the texel after the last one is 0, but it has to be there.
    following = torch.where(low < size - 1, index + 1, index)
    return _Texels(torch.stack((index, following), dim=-1), torch.stack((inside - fraction, fraction), dim=-1))


def _first(occupied: torch.Tensor) -> torch.Tensor:
    """Index of the first that is true along the last axis; its size if none is."""
    index = torch.arange(occupied.shape[-1], device=occupied.device)
    return torch.where(occupied, index, occupied.shape[-1]).amin(dim=-1)


def _last(occupied: torch.Tensor) -> torch.Tensor:
    """Index of the last that is true along the last axis; -1 if none is."""
    index = torch.arange(occupied.shape[-1], device=occupied.device)
    return torch.where(occupied, index, -1).amax(dim=-1)


def _bag(table: torch.Tensor, texels: _Texels) -> torch.Tensor:
    """Weighted sums of two rows each of a table (rows, c): (n * p, c)."""
    index, weight = texels.index.reshape(-1, 2), texels.weight.reshape(-1, 2)
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _bag_of_masks(table: torch.Tensor, texels: _Texels, weights: torch.Tensor) -> torch.Tensor:
    """Return ``weights @ _bag(table, texels)`` for weights (d, n), without those rows of the n masks: (d * p, c)."""
    rows = len(weights), texels.index.shape[1], 2 * len(texels.index)
    index = texels.index.transpose(0, 1).reshape(1, *rows[1:]).expand(rows).flatten(0, 1)
    weight = (texels.weight.transpose(0, 1) * weights[:, None, :, None]).reshape(index.shape)
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


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
