"""Mask voting: overlapping candidates of all passes merge their masks into each detection (section 4, inference)."""

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou

from ..layers import roi_warp

# Pixels rendered at once, over all voters: bounds the memory to 4 bytes times this, some times over.
_MAX_RENDERED_PIXELS = 2**25


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
) -> Instances:
    """Reduce the candidates of one image to detections.

    Boxes that survive a class-wise NMS are the detections. The mask of each is the average of the masks of all
    candidates that overlap it, weighted by their score for its class and rendered in the image, where a pixel belongs
    to a box if its centre lies inside. The box of a detection is the tight box of the resulting mask; if no pixel
    reaches the threshold, it stays what it was. Candidates that are not finite are left out.

    Args:
        boxes: (K, 4), in image pixels; they may reach out of the image.
        scores: (K, C), probability of each foreground class.
        masks: (K, m, m), probabilities in the frame of the box.
        image_size: (height, width).
        score_threshold: candidates survive only with a higher score.
        nms_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        voting_iou_threshold: candidates whose box has at least this IoU to a survivor vote for its mask.
        mask_threshold: a pixel belongs to a detection from this averaged probability on.
        max_detections: over all classes.

    Returns:
        Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (D, 1, m, m), float32, the
        averaged probabilities in the frame of ``pred_boxes``; highest score first.
    """
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1) & masks.isfinite().all(dim=2).all(dim=1)
    boxes, scores, masks = (x[finite].float() for x in (boxes, scores, masks))
    candidate, cls = (scores > score_threshold).nonzero(as_tuple=True)
    kept = batched_nms(boxes[candidate], scores[candidate, cls], cls, nms_threshold)[:max_detections]
    survivor, cls = candidate[kept], cls[kept]

    result = Instances(image_size)
    result.scores = scores[survivor, cls]
    result.pred_classes = cls
    weights = _voting_weights(boxes, scores, survivor, cls, voting_iou_threshold)  # (D, K)
    voter = weights.any(dim=0).nonzero().squeeze(1)
    merged = _merge_masks(boxes[voter], masks[voter], weights[:, voter], image_size)  # (D, H, W)
    tight = _tight_boxes(merged >= mask_threshold)
    empty = (tight[:, 2] <= tight[:, 0])[:, None]
    result.pred_boxes = Boxes(torch.where(empty, boxes[survivor], tight))
    result.pred_boxes.clip(image_size)
    rois = torch.cat((torch.arange(len(tight), device=boxes.device)[:, None].to(boxes), result.pred_boxes.tensor), 1)
    result.pred_masks = roi_warp(merged[:, None], rois, masks.shape[-1])
    return result


def _voting_weights(
    boxes: torch.Tensor, scores: torch.Tensor, survivor: torch.Tensor, cls: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Weight of each candidate's mask in each detection: (D, K), each row adds up to 1."""
    votes = pairwise_iou(Boxes(boxes[survivor]), Boxes(boxes)) >= threshold
    # A box without area has no IoU, not even with itself.
    votes[torch.arange(len(survivor), device=boxes.device), survivor] = True
    weights = scores[:, cls].T * votes
    return weights / weights.sum(dim=1, keepdim=True)


def _merge_masks(
    boxes: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor, image_size: tuple[int, int]
) -> torch.Tensor:
    """Render masks (K, m, m) of boxes (K, 4) in the image and add them up with weights (D, K): (D, H, W)."""
    height, width = image_size
    rows = _rendering_weights(boxes[:, 1], boxes[:, 3], height, masks.shape[1])  # (K, H, m)
    columns = _rendering_weights(boxes[:, 0], boxes[:, 2], width, masks.shape[2])  # (K, W, m)
    strip = max(1, _MAX_RENDERED_PIXELS // max(1, len(boxes) * width))
    merged = []
    for strip_rows in rows.split(strip, dim=1):
        rendered = strip_rows @ masks @ columns.transpose(1, 2)  # (K, h, W)
        merged.append((weights @ rendered.flatten(1)).view(len(weights), strip_rows.shape[1], width))
    return torch.cat(merged, dim=1)


def _rendering_weights(start: torch.Tensor, end: torch.Tensor, size: int, bins: int) -> torch.Tensor:
    """Bilinear weight of each of the bins that divide [start, end) at each pixel centre: (K, size, bins).

    Texels are sampled at their centres; the outer half of the first and last bin repeats it. Pixels whose centre is
    outside [start, end) get no weight.
    """
    centre = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    extent = (end - start).clamp(min=torch.finfo(start.dtype).tiny)[:, None]
    inside = (centre >= start[:, None]) & (centre < end[:, None])
    position = ((centre - start[:, None]) / extent * bins - 0.5).clamp(0, bins - 1)
    bin_index = torch.arange(bins, dtype=start.dtype, device=start.device)
    weight = (1 - (position[:, :, None] - bin_index).abs()).clamp(min=0)
    return weight * inside[:, :, None]


def _tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Smallest boxes (D, 4), float32, around the pixels of masks (D, H, W), bool; without extent for an empty mask."""
    height, width = masks.shape[1:]
    bounds = []
    for occupied, size in ((masks.any(dim=1), width), (masks.any(dim=2), height)):
        index = torch.arange(size, device=masks.device)
        bounds.append((torch.where(occupied, index, size).amin(dim=1), torch.where(occupied, index + 1, 0).amax(dim=1)))
    (left, right), (top, bottom) = bounds
    return torch.stack((left, top, right, bottom), dim=1).float()
