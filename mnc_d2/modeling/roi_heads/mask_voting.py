"""Mask voting: overlapping candidates of all passes merge their masks into each detection (section 4, inference)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou

from ...layers import to_device
from .mask_frame import MaskFrame
from .selection import find_finite, group_detections, select_detections

# Pixels, over all detections, of averages that are held at once: 32 MiB. A single detection may have more.
_MAX_AVERAGED = 2**23
# Elements of stretched masks, and of sums of their columns, that are held at once: 4 MiB.
_MAX_ELEMENTS = 2**20
# Pixels this close under the threshold are averaged, as sums vary with their order and with TF32.
_ROUNDING = 1e-3
# Maps are padded to one size while this times their own pixels, or an eighth of the limit, suffices.
_MAX_PADDING = 1.25
_DETECTRON2 = MaskFrame()


@torch.no_grad()
def vote_masks(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    masks: torch.Tensor,
    image_size: tuple[int, int],
    *,
    score_threshold: float = 0.0,
    nms_threshold: float = 0.3,
    voting_iou_threshold: float = 0.5,
    mask_threshold: float = 0.4,
    max_detections: int = 100,
    class_boxes: torch.Tensor | None = None,
    detection_box: str = "tight",
    frame: MaskFrame = _DETECTRON2,
) -> Instances:
    """Reduce the candidates of one image to detections.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates that overlap it, weighted by their score for its class and rendered in the image. Candidates that are not
    finite, or whose area is not, are left out.

    Args:
        boxes: (K, 4), in image pixels; they may reach out of the image.
        scores: (K, C), probability of each foreground class.
        masks: (K, m, m), probabilities in the frame of the box.
        image_size: (height, width).
        score_threshold: candidates survive only with a higher score; at least 0.
        nms_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        voting_iou_threshold: candidates whose box has at least this IoU to a survivor vote for its mask.
        mask_threshold: a pixel belongs to a detection from this averaged probability on.
        max_detections: over all classes; negative for no limit.
        class_boxes: (K, 4 C), each candidate regressed for each class, in image pixels; only needed for "regressed".
        detection_box: the box of a detection, "tight": around the pixels of its mask, or the candidate itself if it has
            none; or "regressed": the average of ``class_boxes``, with the weights of the masks.
        frame: where pixels and mask cells lie.

    Returns:
        Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (D, 1, m, m), float32, the
        averaged probabilities in the frame of the tight box, highest score first; ``candidates`` (D,), int64, the
        index of the candidate that survived, and ``num_voters`` (D,), int64. With "regressed" the tight boxes are
        ``mask_boxes``, else they are ``pred_boxes``.
    """
    if detection_box not in ("tight", "regressed"):
        raise ValueError(f'detection_box must be "tight" or "regressed", got {detection_box!r}')
    if detection_box == "tight":
        class_boxes = None
    elif class_boxes is None:
        raise ValueError('detection_box "regressed" needs class_boxes')
    if score_threshold < 0:
        raise ValueError(f"score_threshold must be at least 0, got {score_threshold}")
    # Coordinates and sums of probabilities need float32, also where the network runs under autocast.
    with torch.autocast(boxes.device.type, enabled=False):
        finite = find_finite(boxes, scores, masks)
        if class_boxes is not None:
            finite &= class_boxes.isfinite().all(dim=1)
        given = finite.nonzero().squeeze(1)
        boxes, scores, masks = (x[given].float() for x in (boxes, scores, masks))
        extents = frame.extents(boxes)
        survivor, cls = select_detections(extents, scores, score_threshold, nms_threshold, max_detections)
        ious = pairwise_iou(Boxes(extents[survivor]), Boxes(extents))  # (D, K)
        votes = ious >= voting_iou_threshold
        # A box without area has no IoU, not even with itself.
        votes[torch.arange(len(survivor), device=boxes.device), survivor] = True
        weights = scores[:, cls].T * votes
        weights = weights / weights.sum(dim=1, keepdim=True)
        group_of = group_detections(extents[survivor], scores[survivor, cls], ious[:, survivor], voting_iou_threshold)
        tight, merged = _merge_masks(
            boxes, masks, weights, votes, group_of, boxes[survivor], image_size, mask_threshold, frame
        )

        result = Instances(image_size)
        result.pred_boxes = Boxes(tight)
        if class_boxes is not None:
            result.pred_boxes = Boxes(_average_boxes(weights, class_boxes[given].float(), cls, image_size))
            result.mask_boxes = Boxes(tight)
        result.scores = scores[survivor, cls]
        result.pred_classes = cls
        result.pred_masks = merged[:, None]
        result.candidates = given[survivor]
        result.num_voters = votes.sum(dim=1)
        return result


def _merge_masks(
    boxes: torch.Tensor,
    masks: torch.Tensor,
    weights: torch.Tensor,
    votes: torch.Tensor,
    group_of: torch.Tensor,
    survivors: torch.Tensor,
    image_size: tuple[int, int],
    threshold: float,
    frame: MaskFrame,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the masks of K candidates for each of D detections, and crop the averages to their foreground.

    Args:
        boxes: (K, 4), float32, in image pixels.
        masks: (K, m, m), float32, probabilities in the frame of the box.
        weights: (D, K), float32, of each mask in each average; they add up to 1 in each average.
        votes: (D, K), bool, which masks take part.
        group_of: (D,), int64, from 0 on. The masks of a group are rendered together.
        survivors: (D, 4), float32, the boxes of the detections' own candidates.
        image_size: (height, width).
        threshold: of the foreground.
        frame: where pixels and mask cells lie.

    Returns:
        the tight boxes (D, 4), and the averages in their frames (D, m, m); float32.
    """
    tight = frame.replace_empty(survivors, image_size)
    merged = masks.new_zeros(len(tight), *masks.shape[1:])
    if len(tight) == 0:
        return tight, merged
    height, width = image_size
    corner = to_device([width, height], boxes.device)
    groups = torch.arange(len(group_of), device=boxes.device)
    membership = groups[:, None] == group_of  # (groups, D)
    group_votes = membership.float() @ votes.float() > 0  # (groups, K)
    extents = frame.extents(boxes), weights, frame.extents(survivors)
    regions = _find_regions(*extents, membership, corner, threshold)
    if frame.is_foreground(torch.zeros(()), threshold):  # also where nobody votes
        regions = torch.cat((torch.zeros_like(corner), corner)).expand_as(regions)
    # Small regions first: maps of like size are made at once.
    by_area = (regions[:, 2:] - regions[:, :2]).prod(dim=1).argsort()
    regions, group_votes = regions[by_area], group_votes[by_area]
    group_of, order = by_area.argsort()[group_of].sort(stable=True)
    group, voter = group_votes.nonzero(as_tuple=True)  # the voters of a group one after another
    ends = group_votes.sum(dim=1).cumsum(0)[group_of, None]
    starts = ends - group_votes.sum(dim=1)[group_of, None]
    sizes = (regions[:, 2:] - regions[:, :2])[group_of]
    numbers = torch.cat((sizes, starts, ends), dim=1).tolist()  # with the nonzero, where the host waits
    for batch, size in batch_by_size([row[:2] for row in numbers], _MAX_AVERAGED):
        index, voters = order[batch], slice(numbers[batch.start][2], numbers[batch.stop - 1][3])
        # Within the image also where the batch has larger regions.
        origin = regions[:, :2].minimum(corner - corner.new_tensor(size))
        local = boxes[voter[voters]] - origin[group[voters]].repeat(1, 2)
        shares = weights[index][:, voter[voters]] * (group_of[batch, None] == group[voters])
        detection, chosen = shares.nonzero(as_tuple=True)
        first = torch.searchsorted(detection, torch.arange(len(index), device=index.device))
        ballots = _Ballots(chosen, shares[detection, chosen], first)
        averages = _average(local, masks[voter[voters]], ballots, size, frame)
        columns, rows = (frame.is_foreground(averages.amax(dim=i), threshold) for i in (2, 1))
        (x1, x2), (y1, y2) = _find_ends(columns), _find_ends(rows)
        origin = origin[group_of[batch]]
        pixels = torch.stack((x1, y1, x2, y2), dim=1) + origin.repeat(1, 2)
        enclosing = frame.enclose(pixels.to(tight))
        tight[index] = torch.where(rows.any(dim=1, keepdim=True), enclosing, tight[index])
        merged[index] = frame.sample(averages, tight[index], origin, masks.shape[1], image_size)
        del averages  # before the next are made
    return tight, merged


def _find_regions(
    boxes: torch.Tensor,
    weights: torch.Tensor,
    survivors: torch.Tensor,
    membership: torch.Tensor,
    corner: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Where any detection of each group can reach the threshold, and the boxes of its survivors: (groups, 4), int64.

    Left of a foreground pixel begin boxes that together have a weight of the threshold, as no mask exceeds 1. The same
    holds on all four sides. There is one more pixel on each side, in the image of this lower right corner (2,): samples
    at the border of a box lie between the last pixel inside and the first outside. No region is empty.

    Args:
        boxes, survivors: (K, 4) and (D, 4), float32, far corners exclusive.
        weights: (D, K), of each box for each detection.
        membership: (groups, D), bool.
    """
    ends = survivors.clone()
    for side, pick in enumerate((torch.minimum, torch.minimum, torch.maximum, torch.maximum)):
        coordinates, order = boxes[:, side].sort(descending=side >= 2)
        enough = weights[:, order].cumsum(dim=1) >= threshold - _ROUNDING
        ends[:, side] = pick(ends[:, side], coordinates[_find_ends(enough)[0]])
    outside = ~membership[..., None]
    start = ends[:, :2].masked_fill(outside, torch.inf).amin(dim=1)
    end = ends[:, 2:].masked_fill(outside, -torch.inf).amax(dim=1)
    start = (start.floor() - 1).clamp(min=0).minimum(corner - 1)
    return torch.cat((start, (end.ceil() + 1).minimum(corner).maximum(start + 1)), dim=1).long()


def _average(
    boxes: torch.Tensor, masks: torch.Tensor, ballots: _Ballots, size: tuple[int, int], frame: MaskFrame
) -> torch.Tensor:
    """Average masks (n, m, m) in boxes (n, 4) of a map of (width, height), for each of d detections.

    A column of an average is a weighted sum of columns of the masks, which have been stretched along y: two columns for
    each voter. No voter is rendered pixel by pixel.

    Returns:
        (d, width, height), float32.
    """
    (width, height), cells = size, masks.shape[1]
    averages = masks.new_zeros(len(ballots.first), width, height)
    pixels = torch.arange(max(size), device=masks.device)
    first_cell = cells * torch.arange(len(masks), device=masks.device)[:, None, None]
    rows_at_once = max(1, _MAX_ELEMENTS // masks[..., 0].numel())
    # Finding the columns takes some temporary tensors of two elements for each ballot.
    columns_at_once = max(1, _MAX_ELEMENTS // max(16 * len(ballots.voter), len(averages) * min(height, rows_at_once)))
    for rows in (slice(i, min(i + rows_at_once, height)) for i in range(0, height, rows_at_once)):
        for columns in (slice(i, min(i + columns_at_once, width)) for i in range(0, width, columns_at_once)):
            for along_y, along_x in frame.find_cells(boxes, pixels[columns], pixels[rows], cells):
                stretched = (masks.transpose(1, 2) @ along_y.weights(cells).transpose(1, 2)).flatten(
                    0, 1
                )  # (n * m, rows)
                index, weight = along_x.neighbours()
                index = (index + first_cell)[ballots.voter].transpose(0, 1)  # (columns, ballots, 2)
                weight = (weight[ballots.voter] * ballots.weight[:, None, None]).transpose(0, 1)
                starts = 2 * (torch.arange(len(index), device=masks.device)[:, None] * index.shape[1] + ballots.first)
                sums = F.embedding_bag(
                    index.flatten(), stretched, starts.flatten(), mode="sum", per_sample_weights=weight.flatten()
                )
                averages[:, columns, rows] += sums.unflatten(0, (len(index), -1)).transpose(0, 1)
    return averages


class _Ballots(NamedTuple):
    """Which of n masks d detections average: the ballots of a detection one after another."""

    voter: torch.Tensor  # (p,), int64
    weight: torch.Tensor  # (p,), float32
    first: torch.Tensor  # (d,), int64, the first ballot of each detection


def _find_ends(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the first and the last that is true in each row (n, c), bool: (n,) each, int64; any if none is."""
    occupied = occupied.byte()
    return occupied.argmax(dim=1), occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1)


def batch_by_size(sizes: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Divide maps, in order of their area, into batches padded to one size.

    Args:
        sizes: width and height of each.
        limit: pixels of a batch; a single map may have more.

    Yields:
        the maps of a batch, and their padded width and height.
    """
    start = 0
    while start < len(sizes):
        (width, height), end = sizes[start], start + 1
        area = width * height
        for w, h in sizes[end:]:
            area += w * h
            if (end + 1 - start) * max(width, w) * max(height, h) > min(limit, max(limit // 8, _MAX_PADDING * area)):
                break
            width, height, end = max(width, w), max(height, h), end + 1
        yield slice(start, end), (width, height)
        start = end


def _average_boxes(
    weights: torch.Tensor, class_boxes: torch.Tensor, classes: torch.Tensor, image_size: tuple[int, int]
) -> torch.Tensor:
    """Averages (D, 4) of the boxes that candidates (K, 4 C) have for the class of each of D detections, clipped.

    Args:
        weights: (D, K), of each candidate in each average.
        class_boxes: (K, 4 C).
        classes: (D,), int64.
        image_size: (height, width).
    """
    class_boxes = class_boxes.unflatten(1, (class_boxes.shape[1] // 4, 4)).transpose(0, 1)  # (C, K, 4)
    averages = torch.bmm(weights[:, None], class_boxes[classes])[:, 0]
    height, width = image_size
    return averages.clamp(min=0).minimum(averages.new_tensor([width, height, width, height]))
