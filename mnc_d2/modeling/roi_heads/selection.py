"""Which candidates become detections, and which of these are near one another."""

from __future__ import annotations

import torch
from torchvision.ops import nms


def find_finite(boxes: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Which candidates, boxes (K, 4), scores (K, C) and masks (K, m, m), are finite, and of finite area: (K,), bool."""
    areas = (boxes[:, 2:] - boxes[:, :2]).float().prod(dim=1)
    return (
        boxes.isfinite().all(dim=1)
        & areas.isfinite()
        & scores.isfinite().all(dim=1)
        & masks.isfinite().all(dim=2).all(dim=1)
    )


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


def group_detections(boxes: torch.Tensor, scores: torch.Tensor, ious: torch.Tensor, threshold: float) -> torch.Tensor:
    """Group detections (D,) of all classes around the best of those that are near one another: (D,), int64, from 0 on.

    Detections of several classes that are near one another have mostly the same voters.
    """
    if len(boxes) == 0:
        return ious.new_zeros(0, dtype=torch.int64)
    seeds = nms(boxes, scores, threshold)
    group_of = ious[:, seeds].argmax(dim=1)
    group_of[seeds] = torch.arange(len(seeds), device=seeds.device)
    return group_of
