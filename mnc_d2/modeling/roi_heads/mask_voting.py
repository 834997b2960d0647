"""Mask voting: overlapping candidates of all passes merge their masks into each detection (section 4, inference)."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torchvision.ops import nms

from .mask_merging import MaskMerger


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
) -> Instances:
    """Reduce the candidates of one image to detections.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates that overlap it, weighted by their score for its class and rendered in the image: a pixel belongs to a
    box if its centre lies inside, and takes the value of the mask there, bilinearly between the centres of the texels.
    Candidates that are not finite, or whose area is not, are left out.

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
            class_boxes,
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
    class_boxes: torch.Tensor | None,
) -> Instances:
    finite = find_finite(boxes, scores, masks)
    if class_boxes is not None:
        finite &= class_boxes.isfinite().all(dim=1)
    given = finite.nonzero().squeeze(1)
    boxes, scores, masks = (x[given].float() for x in (boxes, scores, masks))
    survivor, cls = select_detections(boxes, scores, score_threshold, nms_threshold, max_detections)
    ious = pairwise_iou(Boxes(boxes[survivor]), Boxes(boxes))  # (D, K)
    votes = ious >= voting_iou_threshold
    # A box without area has no IoU, not even with itself.
    votes[torch.arange(len(survivor), device=boxes.device), survivor] = True
    group_of = group_detections(boxes[survivor], scores[survivor, cls], ious[:, survivor], voting_iou_threshold)
    weights = scores[:, cls].T * votes
    weights = weights / weights.sum(dim=1, keepdim=True)
    regressed = None
    if class_boxes is not None:
        regressed = _average_boxes(weights, class_boxes[given].float(), cls, image_size)

    voters = votes.any(dim=0).nonzero().squeeze(1)
    merger = MaskMerger(boxes[voters], masks[voters], image_size)
    weights, voting = weights[:, voters], votes[:, voters]
    tight, soft_masks = merger.merge(weights, voting, group_of, mask_threshold)
    empty = (tight[:, 2] <= tight[:, 0]).nonzero().squeeze(1)
    if len(empty) > 0:
        tight[empty] = _clip(boxes[survivor[empty]], image_size)
        alone = torch.arange(len(empty), device=empty.device)
        _, soft_masks[empty] = merger.merge(weights[empty], voting[empty], alone, mask_threshold, tight[empty])

    result = Instances(image_size)
    result.pred_boxes = Boxes(tight if regressed is None else regressed)
    if regressed is not None:
        result.mask_boxes = Boxes(tight)
    result.scores = scores[survivor, cls]
    result.pred_classes = cls
    result.pred_masks = soft_masks[:, None]
    result.candidates = given[survivor]
    result.num_voters = votes.sum(dim=1)
    return result


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
    return _clip(averages, image_size)


def _clip(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Clip boxes (D, 4) to an image of (height, width)."""
    height, width = image_size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


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
