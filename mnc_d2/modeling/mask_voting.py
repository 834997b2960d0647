"""Mask voting: overlapping candidates of all passes merge their masks into each detection (section 4, inference)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou
from torchvision.ops import nms

# Pixels rendered at once, over all voters: bounds the memory to 4 bytes times this, some times over.
_MAX_RENDERED_PIXELS = 2**23


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
    sampling: str = "center",
) -> Instances:
    """Reduce the candidates of one image to detections.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates that overlap it, weighted by their score for its class and rendered in the image. The box of a detection
    is the tight box of the resulting mask. Candidates that are not finite are left out.

    Args:
        boxes: (K, 4), in image pixels; they may reach out of the image.
        scores: (K, C), probability of each foreground class.
        masks: (K, m, m), probabilities in the frame of the box.
        image_size: (height, width).
        score_threshold: candidates survive only with a higher score.
        nms_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        voting_iou_threshold: candidates whose box has at least this IoU to a survivor vote for its mask.
        mask_threshold: a pixel belongs to a detection from this averaged probability on.
        max_detections: over all classes; negative for no limit.
        sampling: "center": boxes are continuous, a pixel belongs to a box if its centre lies inside and takes the value
            of the mask there, bilinearly between the centres of the texels; a detection without any pixel keeps its
            box. "caffe" reproduces the authors' released code: boxes hold the coordinates of the corner pixels, both
            inclusive, pixels and texels are sampled at their top-left corners, the last row and column of texels
            without interpolation, a pixel must be above ``mask_threshold``, and a detection without any pixel becomes
            the pixel in the middle of the image.

    Returns:
        Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (D, 1, m, m), float32, the
        averaged probabilities in the frame of ``pred_boxes``, highest score first; ``candidates`` (D,), int64, the
        index of the candidate that survived, and ``num_voters`` (D,), int64.
    """
    if sampling not in ("center", "caffe"):
        raise ValueError(f'sampling must be "center" or "caffe", got {sampling!r}')
    # Coordinates and sums of probabilities need float32, also where the network runs under autocast.
    with torch.autocast(boxes.device.type, enabled=False):
        return _vote_masks(
            boxes,
            scores,
            masks,
            image_size,
            score_threshold,
            nms_threshold,
            voting_iou_threshold,
            mask_threshold,
            max_detections,
            caffe=sampling == "caffe",
        )


def _vote_masks(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    masks: torch.Tensor,
    image_size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    voting_iou_threshold: float,
    mask_threshold: float,
    max_detections: int,
    caffe: bool,
) -> Instances:
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1) & masks.isfinite().all(dim=2).all(dim=1)
    given = finite.nonzero().squeeze(1)
    boxes, scores, masks = (x[given].float() for x in (boxes, scores, masks))
    # Areas of boxes with inclusive corners are those of boxes that end one pixel further.
    extents = Boxes(boxes + boxes.new_tensor([0, 0, 1, 1]) if caffe else boxes)
    survivor, cls = select_detections(extents.tensor, scores, score_threshold, nms_threshold, max_detections)
    votes = pairwise_iou(extents[survivor], extents) >= voting_iou_threshold  # (D, K)
    # A box without area has no IoU, not even with itself.
    votes[torch.arange(len(survivor), device=boxes.device), survivor] = True
    weights = scores[:, cls].T * votes
    weights = weights / weights.sum(dim=1, keepdim=True)

    seeds = nms(extents.tensor[survivor], scores[survivor, cls], voting_iou_threshold)
    group_of = _group_around(seeds, near=votes[:, survivor])
    maps = _merge_masks(boxes, masks, weights, votes, group_of, image_size, mask_threshold, caffe)
    tight = maps.tight_boxes
    empty = (tight[:, 2] <= tight[:, 0])[:, None]
    height, width = image_size
    if caffe:
        middle = tight.new_tensor([width // 2, height // 2, width // 2 + 1, height // 2 + 1])
        tight = torch.where(empty, middle, tight)
    else:
        tight = torch.where(empty, boxes[survivor], tight)
        tight = torch.minimum(tight.clamp(min=0), tight.new_tensor([width, height, width, height]))
    result = Instances(image_size)
    result.pred_boxes = Boxes(tight - tight.new_tensor([0, 0, 1, 1]) if caffe else tight)
    result.scores = scores[survivor, cls]
    result.pred_classes = cls
    result.pred_masks = _sample_maps(maps, tight, masks.shape[-1], image_size, caffe)[:, None]
    result.candidates = given[survivor]
    result.num_voters = votes.sum(dim=1)
    return result


def select_detections(
    boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, nms_threshold: float, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class-wise NMS of boxes that all classes share, for all classes at once.

    Args:
        boxes: (K, 4), float32.
        scores: (K, C).
        score_threshold: only higher scores take part.
        nms_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        limit: number of survivors that are wanted, over all classes; negative for all.

    Returns:
        the best survivors, highest score first: indices into ``boxes`` (D,), and classes (D,); int64.
    """
    candidate, cls = (scores > score_threshold).nonzero(as_tuple=True)
    candidate_scores, order = scores[candidate, cls].sort(descending=True, stable=True)
    candidate, cls = candidate[order], cls[order]
    limit = len(candidate) if limit < 0 else limit
    # Boxes of different classes are moved apart, in float64, which resolves them wherever they go. What is worse than
    # the last survivor wanted cannot suppress it: mostly, a small part of the candidates will do.
    extent = (boxes.max() - boxes.min()).double() + 1 if len(boxes) else 1
    count = 10 * limit
    while True:
        moved = boxes[candidate[:count]].double() + (cls[:count] * extent)[:, None]
        kept = nms(moved, candidate_scores[:count].double(), nms_threshold)[:limit]
        if len(kept) == limit or count >= len(candidate):
            return candidate[kept], cls[kept]
        count *= 4


class _MergedMaps(NamedTuple):
    """The averaged mask of each of D detections in a region of the image, outside which it is 0."""

    values: torch.Tensor  # (sum of the regions' areas,), float32: the maps one after another, row by row
    start: torch.Tensor  # (D,), int64, of each map in `values`
    regions: torch.Tensor  # (D, 4), int64: x1, y1, x2, y2, far corner exclusive
    tight_boxes: torch.Tensor  # (D, 4), float32, around the pixels of the threshold; without extent if there is none


def _merge_masks(
    boxes: torch.Tensor,
    masks: torch.Tensor,
    weights: torch.Tensor,
    votes: torch.Tensor,
    group_of: torch.Tensor,
    image_size: tuple[int, int],
    threshold: float,
    caffe: bool,
) -> _MergedMaps:
    """Render masks (K, m, m) of boxes (K, 4) in the image and add them up with weights (D, K), those of votes (D, K).

    The detections of a group, group_of (D,), lie near one another: their voters are rendered once, where any of them
    is, and added up by one matrix product. What the loop over groups has to know on the host is read before it starts.
    """
    if len(votes) == 0:
        none = boxes.new_zeros(0, 4)
        return _MergedMaps(boxes.new_zeros(0), none.long()[:, 0], none.long(), none)
    height, width = image_size
    membership = F.one_hot(group_of)  # (D, groups)
    group_votes = (membership.T.to(weights) @ votes.to(weights)) > 0  # (groups, K)
    order = group_of.argsort(stable=True)
    members_of = order.split(membership.sum(dim=0).tolist())
    voters_of = group_votes.nonzero()[:, 1].split(group_votes.sum(dim=1).tolist())
    # One pixel more on each side: samples between the last pixel inside and the first outside need that.
    low = boxes[:, :2].floor() - 1
    high = boxes[:, 2:].floor() + 3
    limit = boxes.new_tensor([width, height])
    low = torch.where(group_votes[..., None], low, torch.inf).amin(dim=1).clamp(min=0).minimum(limit - 1)
    high = torch.where(group_votes[..., None], high, -torch.inf).amax(dim=1).clamp(min=1).minimum(limit)
    group_regions = torch.cat((low, high.maximum(low + 1)), dim=1).long()  # (groups, 4)

    values, tight = [], []
    for members, voters, region in zip(members_of, voters_of, group_regions.tolist()):
        merged = _add_up(boxes[voters], masks[voters], weights[members][:, voters], region, caffe)
        tight.append(_tight_boxes(merged, threshold, caffe) + boxes.new_tensor(region[:2] * 2))
        values.append(merged.flatten())
    regions = group_regions[group_of]
    sizes = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1]))[order]
    back = order.argsort()
    return _MergedMaps(torch.cat(values), (sizes.cumsum(0) - sizes)[back], regions, torch.cat(tight)[back])


def _group_around(seeds: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Number each of D detections after the first of the seeds (S,) that it is near, (D, D) bool: (D,), int64.

    Detections of several classes that are near one another have mostly the same voters.
    """
    if len(seeds) == 0:
        return seeds
    group_of = near[seeds].to(torch.uint8).argmax(dim=0)
    group_of[seeds] = torch.arange(len(seeds), device=seeds.device)
    return group_of


def _add_up(
    boxes: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor, region: list[int], caffe: bool
) -> torch.Tensor:
    """Render the masks (K, m, m) of boxes (K, 4) in a region (x1, y1, x2, y2) and add them up: (D, h, w).

    A rendered row is a weighted sum of rows of texels that have been stretched along x: an embedding bag, as stretching
    is. Only the two texels next to a pixel take part, not a whole row or column as in a product of matrices.
    """
    x1, y1, x2, y2 = region
    x = _find_texels(boxes[:, 0], boxes[:, 2], x1, x2, masks.shape[2], caffe)
    y = _find_texels(boxes[:, 1], boxes[:, 3], y1, y2, masks.shape[1], caffe)
    if caffe:
        # Bilinear, unless either next texel would be beyond the last: then the nearest above and to the left.
        stretched = [
            _stretch(masks, x, (1 - x.fraction) * (x.inside - x.last), x.fraction * (x.inside - x.last)),
            _stretch(masks, x, x.inside, torch.zeros_like(x.inside)),
            _stretch(masks, x, x.last, torch.zeros_like(x.inside)),
        ]
        terms = [  # which of these, which of its rows of texels, and its weight
            (0, y.low, (1 - y.fraction) * (y.inside - y.last)),
            (0, y.high, y.fraction * (y.inside - y.last)),
            (1, y.low, y.last),
            (2, y.low, y.inside - y.last),
        ]
    else:
        stretched = [_stretch(masks, x, (1 - x.fraction) * x.inside, x.fraction * x.inside)]
        terms = [(0, y.low, (1 - y.fraction) * y.inside), (0, y.high, y.fraction * y.inside)]
    first_row = masks.shape[1] * torch.arange(len(masks), device=masks.device)[:, None]
    index = torch.stack([which * len(stretched[0]) + first_row + low for which, low, _ in terms], dim=2)  # (K, h, T)
    weight = torch.stack([weight for *_, weight in terms], dim=2)
    table = torch.cat(stretched) if caffe else stretched[0]

    strip = max(1, _MAX_RENDERED_PIXELS // (len(boxes) * (x2 - x1)))
    merged = []
    for start in range(0, y2 - y1, strip):
        some = slice(start, start + strip)
        rendered = _bag(table, index[:, some], weight[:, some])  # (K * strip, w)
        merged.append((weights @ rendered.view(len(boxes), -1)).view(len(weights), -1, x2 - x1))
    return torch.cat(merged, dim=1)


class _Texels(NamedTuple):
    """Where n pixels lie among m texels along one axis of K boxes; all (K, n)."""

    low: torch.Tensor  # int64, the texel at or before the pixel
    high: torch.Tensor  # int64, the one after it
    fraction: torch.Tensor  # how far the pixel is from the first to the second
    inside: torch.Tensor  # 1 where the pixel belongs to the box, else 0
    last: torch.Tensor  # 1 where, moreover, the first is the last of the texels


def _find_texels(start: torch.Tensor, end: torch.Tensor, first: int, last: int, size: int, caffe: bool) -> _Texels:
    """Find the pixels first to last - 1 among ``size`` texels of boxes from start (K,) to end (K,)."""
    pixel = torch.arange(first, last, dtype=start.dtype, device=start.device) + (0 if caffe else 0.5)
    start, end = start[:, None], end[:, None]
    inside = (pixel >= start) & ((pixel <= end) if caffe else (pixel < end))
    extent = (end - start + 1) if caffe else (end - start)
    position = (pixel - start) * size / extent.clamp(min=torch.finfo(start.dtype).tiny)
    position = (position if caffe else position - 0.5).clamp(0, size - 1)
    low = position.floor()
    high = (low + 1).clamp(max=size - 1)
    is_last = inside & (low == size - 1)
    return _Texels(low.long(), high.long(), position - low, inside.to(start), is_last.to(start))


def _stretch(masks: torch.Tensor, x: _Texels, low_weight: torch.Tensor, high_weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums of two columns of texels of masks (K, m, m) at each pixel, by row: (K * m, w)."""
    count, size, _ = masks.shape
    first_column = size * torch.arange(count, device=masks.device)[:, None]
    index = torch.stack((first_column + x.low, first_column + x.high), dim=2)
    columns = masks.transpose(1, 2).reshape(count * size, size)
    sums = _bag(columns, index, torch.stack((low_weight, high_weight), dim=2))  # (K * w, m)
    return sums.view(count, -1, size).transpose(1, 2).reshape(count * size, -1)


def _bag(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows of a table (rows, n) over the last axis of index and weight (K, p, T): (K * p, n)."""
    return F.embedding_bag(index.flatten(0, 1), table, per_sample_weights=weight.flatten(0, 1), mode="sum")


def _tight_boxes(maps: torch.Tensor, threshold: float, caffe: bool) -> torch.Tensor:
    """Smallest boxes (D, 4), float32, around the pixels of maps (D, H, W) that reach the threshold.

    A map without any has a box without extent.
    """
    bounds = []
    for largest in (maps.amax(dim=1), maps.amax(dim=2)):
        occupied, size = largest > threshold if caffe else largest >= threshold, largest.shape[1]
        index = torch.arange(size, device=maps.device)
        bounds.append((torch.where(occupied, index, size).amin(dim=1), torch.where(occupied, index + 1, 0).amax(dim=1)))
    (left, right), (top, bottom) = bounds
    return torch.stack((left, top, right, bottom), dim=1).float()


def _sample_maps(
    maps: _MergedMaps, boxes: torch.Tensor, size: int, image_size: tuple[int, int], caffe: bool
) -> torch.Tensor:
    """Sample each map (D of them) in its box (D, 4), far corner exclusive: (D, size, size)."""
    height, width = image_size
    y_low, y_high, y_fraction = _sample_axis(boxes[:, 1], boxes[:, 3], size, height, caffe)  # each (D, size)
    x_low, x_high, x_fraction = _sample_axis(boxes[:, 0], boxes[:, 2], size, width, caffe)
    y_fraction, x_fraction = y_fraction[:, :, None], x_fraction[:, None, :]
    if caffe:
        at_end = (y_low == height - 1)[:, :, None] | (x_low == width - 1)[:, None, :]
        y_fraction, x_fraction = y_fraction.masked_fill(at_end, 0), x_fraction.masked_fill(at_end, 0)

    left, top, right, bottom = (maps.regions[:, i, None, None] for i in range(4))

    def read(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, x = y[:, :, None], x[:, None, :]
        index = maps.start[:, None, None] + (y - top) * (right - left) + (x - left)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        return maps.values[torch.where(inside, index, 0)] * inside

    if len(boxes) == 0:
        return boxes.new_zeros(0, size, size)
    upper = read(y_low, x_low) * (1 - x_fraction) + read(y_low, x_high) * x_fraction
    lower = read(y_high, x_low) * (1 - x_fraction) + read(y_high, x_high) * x_fraction
    return upper * (1 - y_fraction) + lower * y_fraction


def _sample_axis(
    start: torch.Tensor, end: torch.Tensor, size: int, pixels: int, caffe: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two pixels that each of ``size`` samples of [start, end) is between, and how far it is to the second."""
    step = torch.arange(size, dtype=start.dtype, device=start.device) + (0 if caffe else 0.5)
    position = start[:, None] + step * ((end - start) / size)[:, None] - (0 if caffe else 0.5)
    position = position.clamp(0, pixels - 1)
    low = position.floor()
    return low.long(), (low + 1).clamp(max=pixels - 1).long(), position - low
