"""Mask voting: overlapping candidates of all passes merge their masks into each detection (section 4, inference)."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torchvision.ops import nms

from .mask_merging import MaskMerger, sample_masks


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
    class_boxes: torch.Tensor | None = None,
) -> Instances:
    """Reduce the candidates of one image to detections.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates that overlap it, weighted by their score for its class and rendered in the image. The box of a detection
    is the tight box of the resulting mask or, with ``class_boxes``, the average of these with the same weights.
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
        sampling: "center": boxes are continuous, a pixel belongs to a box if its centre lies inside and takes the value
            of the mask there, bilinearly between the centres of the texels; a detection without any pixel keeps its
            box. "caffe" reproduces the authors' released code: boxes hold the coordinates of the corner pixels, both
            inclusive, pixels and texels are sampled at their top-left corners, the last row and column of texels
            without interpolation, a pixel must be above ``mask_threshold``, and a detection without any pixel becomes
            the pixel in the middle of the image.
        class_boxes: (K, 4 C), each candidate regressed for each class, in image pixels.

    Returns:
        Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (D, 1, m, m), float32, the
        averaged probabilities in the frame of the tight box, highest score first; ``candidates`` (D,), int64, the
        index of the candidate that survived, and ``num_voters`` (D,), int64. With ``class_boxes`` the tight boxes are
        ``mask_boxes``, else they are ``pred_boxes``.
    """
    if sampling not in ("center", "caffe"):
        raise ValueError(f'sampling must be "center" or "caffe", got {sampling!r}')
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
            sampling == "caffe",
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
    caffe: bool,
    class_boxes: torch.Tensor | None,
) -> Instances:
    areas = (boxes[:, 2:] - boxes[:, :2]).float().prod(dim=1)
    finite = (
        boxes.isfinite().all(dim=1)
        & areas.isfinite()
        & scores.isfinite().all(dim=1)
        & masks.isfinite().all(dim=2).all(dim=1)
    )
    if class_boxes is not None:
        finite &= class_boxes.isfinite().all(dim=1)
    given = finite.nonzero().squeeze(1)
    boxes, scores, masks = (x[given].float() for x in (boxes, scores, masks))
    # Areas of boxes with inclusive corners are those of boxes that end one pixel further.
    extents = Boxes(boxes + boxes.new_tensor([0, 0, 1, 1]) if caffe else boxes)
    survivor, cls = select_detections(extents.tensor, scores, score_threshold, nms_threshold, max_detections)
    ious = pairwise_iou(extents[survivor], extents)  # (D, K)
    votes = ious >= voting_iou_threshold
    # A box without area has no IoU, not even with itself.
    votes[torch.arange(len(survivor), device=boxes.device), survivor] = True
    group_of = _group(extents.tensor[survivor], scores[survivor, cls], ious[:, survivor], voting_iou_threshold)
    weights = scores[:, cls].T * votes
    weights = weights / weights.sum(dim=1, keepdim=True)
    regressed = None
    if class_boxes is not None:
        regressed = _average_boxes(weights, class_boxes[given].float(), cls, image_size)

    voters = votes.any(dim=0).nonzero().squeeze(1)
    merger = MaskMerger(boxes[voters], masks[voters], image_size, caffe)
    weights, voting = weights[:, voters], votes[:, voters]
    merged = merger.merge(weights, voting, group_of, mask_threshold)
    tight, size = merged.tight_boxes, masks.shape[-1]
    soft_masks = sample_masks(merged, tight, size, image_size, caffe)
    empty = (tight[:, 2] <= tight[:, 0]).nonzero().squeeze(1)
    if len(empty) > 0:
        tight[empty] = _boxes_without_pixels(boxes[survivor[empty]], image_size, caffe)
        merged = merger.merge(
            weights[empty], voting[empty], torch.arange(len(empty), device=empty.device), mask_threshold, tight[empty]
        )
        soft_masks[empty] = sample_masks(merged, tight[empty], size, image_size, caffe)

    result = Instances(image_size)
    tight = Boxes(tight - tight.new_tensor([0, 0, 1, 1]) if caffe else tight)
    if regressed is None:
        result.pred_boxes = tight
    else:
        result.pred_boxes, result.mask_boxes = Boxes(regressed), tight
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
    height, width = image_size
    class_boxes = class_boxes.unflatten(1, (class_boxes.shape[1] // 4, 4)).transpose(0, 1)  # (C, K, 4)
    averages = torch.bmm(weights[:, None], class_boxes[classes])[:, 0]
    return averages.clamp(min=0).minimum(averages.new_tensor([width, height, width, height]))


def _boxes_without_pixels(boxes: torch.Tensor, image_size: tuple[int, int], caffe: bool) -> torch.Tensor:
    """The boxes (D, 4), far corner exclusive, of detections with no pixel that reaches the threshold."""
    height, width = image_size
    if caffe:
        middle = boxes.new_tensor([width // 2, height // 2, width // 2 + 1, height // 2 + 1])
        return middle.expand(len(boxes), 4)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


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


def _group(boxes: torch.Tensor, scores: torch.Tensor, ious: torch.Tensor, threshold: float) -> torch.Tensor:
    """Group detections (D,) of all classes around the best of those that are near one another: (D,), int64, from 0 on.

    Detections of several classes that are near one another have mostly the same voters.
    """
    if len(boxes) == 0:
        return ious.new_zeros(0, dtype=torch.int64)
    seeds = nms(boxes, scores, threshold)
    group_of = ious[:, seeds].argmax(dim=1)
    group_of[seeds] = torch.arange(len(seeds), device=seeds.device)
    return group_of
