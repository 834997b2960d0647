"""Mask voting as the released code does it, plain rather than fast."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

from ...modeling.roi_heads.mask_voting import find_finite, group_detections, select_detections
from .boxes import pixel_extents


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
) -> Instances:
    """Reduce the candidates of one image to detections, with the conventions of the released code.

    As :func:`mnc_d2.modeling.vote_masks` with tight boxes, but: corners are inclusive, they hold the coordinates of
    pixels; pixels and texels are sampled at their top-left corners, the last row and column of texels without
    interpolation; a pixel must be above ``mask_threshold``; a detection without any becomes the pixel in the middle of
    the image.

    Args:
        boxes: (K, 4), in pixels of the image, inclusive corners.
        scores: (K, C), probability of each foreground class.
        masks: (K, m, m), probabilities in the frame of the box.
        image_size: (height, width).
        score_threshold, nms_threshold, voting_iou_threshold, mask_threshold, max_detections: as there.
        class_boxes: not used.

    Returns:
        Instances with the fields that are described there; ``pred_boxes`` have inclusive corners.
    """
    del class_boxes
    device = boxes.device
    given = find_finite(boxes, scores, masks).nonzero().squeeze(1)
    boxes, scores, masks = (x[given].float() for x in (boxes, scores, masks))
    extents = pixel_extents(boxes)
    survivor, cls = select_detections(extents, scores, score_threshold, nms_threshold, max_detections)
    ious = pairwise_iou(Boxes(extents[survivor]), Boxes(extents))  # (D, K)
    votes = ious >= voting_iou_threshold
    # A box without area has no IoU, not even with itself.
    votes[torch.arange(len(survivor), device=device), survivor] = True
    weights = scores[:, cls].T * votes
    weights = (weights / weights.sum(dim=1, keepdim=True)).cpu().numpy()
    group_of = group_detections(extents[survivor], scores[survivor, cls], ious[:, survivor], voting_iou_threshold)

    tight = np.zeros((len(survivor), 4), dtype=np.float32)
    soft_masks = np.zeros((len(survivor), *masks.shape[1:]), dtype=np.float32)
    image = np.zeros(image_size, dtype=np.float32)
    for group in range(int(group_of.max()) + 1 if len(survivor) else 0):
        members = (group_of == group).nonzero()[:, 0]
        voters = votes[members].any(dim=0).nonzero()[:, 0]
        rendered = _render_all(boxes[voters].cpu().numpy(), masks[voters].cpu().numpy(), image_size)
        members, voters = members.tolist(), voters.tolist()
        for member, average in zip(members, np.tensordot(weights[members][:, voters], rendered.values, axes=1)):
            image[rendered.region] = average
            tight[member] = _tight_box(average > mask_threshold, rendered.region, image_size)
            soft_masks[member] = _sample(image, tight[member], masks.shape[-1])
        image[rendered.region] = 0

    result = Instances(image_size)
    result.pred_boxes = Boxes(torch.from_numpy(tight).to(device))
    result.scores = scores[survivor, cls]
    result.pred_classes = cls
    result.pred_masks = torch.from_numpy(soft_masks[:, None]).to(device)
    result.candidates = given[survivor]
    result.num_voters = votes.sum(dim=1)
    return result


class _Rendered(NamedTuple):
    """The masks of n candidates in the part of the image that holds all of their boxes."""

    region: tuple[slice, slice]  # rows and columns
    values: np.ndarray  # (n, rows, columns), float32; 0 outside the box


def _render_all(boxes: np.ndarray, masks: np.ndarray, image_size: tuple[int, int]) -> _Rendered:
    """Render masks (n, m, m) in the pixels of boxes (n, 4)."""
    height, width = image_size
    rows = [_pixels(y1, y2, height) for _, y1, _, y2 in boxes]
    columns = [_pixels(x1, x2, width) for x1, _, x2, _ in boxes]
    region = _extent(rows), _extent(columns)
    top, left = region[0].start, region[1].start
    values = np.zeros((len(boxes), region[0].stop - top, region[1].stop - left), dtype=np.float32)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        size = masks.shape[1]
        y = ((rows[i] - y1) * size / (y2 - y1 + 1)).clip(0, size - 1)
        x = ((columns[i] - x1) * size / (x2 - x1 + 1)).clip(0, size - 1)
        if len(y) and len(x):
            start_row, start_column = int(rows[i][0]) - top, int(columns[i][0]) - left
            inside = slice(start_row, start_row + len(y)), slice(start_column, start_column + len(x))
            values[i][inside] = _bilinear(masks[i], y, x)
    return _Rendered(region, values)


def _extent(pixels: list[np.ndarray]) -> slice:
    """The part of an axis that holds all pixels."""
    ends = [(int(p[0]), int(p[-1]) + 1) for p in pixels if len(p)]
    return slice(min(start for start, _ in ends), max(end for _, end in ends)) if ends else slice(0, 0)


def _pixels(start: np.float32, end: np.float32, limit: int) -> np.ndarray:
    """The pixels of an axis of the image from start to end, both inclusive: float32."""
    return np.arange(max(np.ceil(start), 0), min(np.floor(end), limit - 1) + 1, dtype=np.float32)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample an image at rows y (h,) and columns x (w,): (h, w). In its last row and column, without interpolation."""
    height, width = image.shape
    row, column = y.astype(np.int64), x.astype(np.int64)
    last_row, last_column = row == height - 1, column == width - 1
    upper, lower = image[row], image[np.minimum(row + 1, height - 1)]
    between_rows = upper + (y - row)[:, None] * (lower - upper)
    weights = np.zeros((width, len(x)), dtype=np.float32)  # of the columns of the image in each sample
    samples = np.arange(len(x))
    weights[column, samples] = 1 - (x - column)
    weights[np.minimum(column + 1, width - 1), samples] += x - column
    values = between_rows @ weights
    values[:, last_column] = upper[:, -1:]
    if last_row.any():
        values[last_row] = image[-1, column]
    return values


def _tight_box(
    occupied: np.ndarray, region: tuple[slice, slice], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box, inclusive corners, of the pixels of a region that are true; if none is, the image's middle pixel."""
    rows, columns = occupied.any(axis=1).nonzero()[0], occupied.any(axis=0).nonzero()[0]
    if len(rows) == 0:
        middle_row, middle_column = image_size[0] // 2, image_size[1] // 2
        return middle_column, middle_row, middle_column, middle_row
    top, left = region[0].start, region[1].start
    return left + columns[0], top + rows[0], left + columns[-1], top + rows[-1]


def _sample(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Sample an image at the top-left corners of the size x size texels of a box of whole pixels."""
    x1, y1, x2, y2 = box
    steps = np.arange(size, dtype=np.float32)
    return _bilinear(image, y1 + steps * ((y2 - y1 + 1) / size), x1 + steps * ((x2 - x1 + 1) / size))
