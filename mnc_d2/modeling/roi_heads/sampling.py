"""What RoIs are labelled in training, and which of the first pass are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou


def label_boxes(
    boxes: Boxes,
    target: Instances,
    matcher: Matcher,
    num_classes: int,
    sampler: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> Instances:
    """Match the boxes of one image to its ground truth. Labels are constants; the boxes keep their gradient.

    Args:
        boxes: R, in image pixels.
        target: the ground truth, with ``gt_boxes`` and ``gt_classes``.
        matcher: from IoU to instances and labels.
        num_classes: label of the background.
        sampler: from the classes (R,) and largest IoUs (R,) of the boxes to the indices of those to keep; None to keep
            all but those labelled ignore.

    Returns:
        Instances with ``proposal_boxes``, ``proposal_index`` (of the box among those given), ``gt_classes``,
        ``gt_boxes`` and ``gt_index`` (of the matched instance; both mean nothing for background).
    """
    with torch.no_grad():
        ious = pairwise_iou(target.gt_boxes, boxes)
        matched, labels = matcher(ious)
        if len(target):
            classes = target.gt_classes[matched].masked_fill(labels == 0, num_classes).masked_fill(labels == -1, -1)
            best_iou = ious.max(dim=0).values
        else:
            classes = torch.full_like(matched, num_classes)
            best_iou = torch.zeros_like(matched, dtype=torch.float32)
        keep = (classes >= 0).nonzero().squeeze(1) if sampler is None else sampler(classes, best_iou)
    result = Instances(target.image_size)
    result.proposal_boxes = boxes[keep]
    result.proposal_index = keep
    result.gt_classes = classes[keep]
    result.gt_index = matched[keep]
    # Without ground truth, all is background and any box will do.
    has_gt = len(target) > 0
    result.gt_boxes = target.gt_boxes[matched[keep]] if has_gt else Boxes(result.proposal_boxes.tensor.detach())
    return result


@torch.no_grad()
def sample_rois(
    classes: torch.Tensor,
    ious: torch.Tensor,
    num_classes: int,
    batch_size: int,
    positive_fraction: float,
    bands: Sequence[tuple[float, float]] = ((0.1, 0.5), (0.0, 0.1)),
    band_fractions: Sequence[float] = (0.85, 0.15),
    refill: bool = True,
) -> torch.Tensor:
    """Draw RoIs of one image at random: some foreground, the rest background from bands of IoU.

    Where a band has fewer RoIs than its share, the others make up for it, as far as they can; not without ``refill``.

    Args:
        classes: (R,), int64, labels in [0, num_classes], the last for background; -1 is never drawn.
        ious: (R,), largest IoU of each RoI with a ground-truth box.
        num_classes: number of foreground classes.
        batch_size: number of RoIs to draw; with ``refill`` fewer are returned only if the image has fewer.
        positive_fraction: largest part of ``batch_size`` that is foreground.
        bands: (low, high) of each band; a background RoI with low <= IoU < high belongs to it.
        band_fractions: share of the background that each band gets.
        refill: whether bands make up for one another.

    Returns:
        indices of the drawn RoIs, int64, foreground first.
    """
    foreground = _shuffle((classes >= 0) & (classes < num_classes))[: int(batch_size * positive_fraction)]
    wanted = batch_size - len(foreground)
    candidates = [_shuffle((classes == num_classes) & (ious >= low) & (ious < high)) for low, high in bands]
    shares = [round(wanted * fraction) for fraction in band_fractions]
    drawn = [band[:share] for band, share in zip(candidates, shares)]
    spare = [band[share:] for band, share in zip(candidates, shares)] if refill else []
    background = torch.cat(drawn + spare)[:wanted]
    return torch.cat((foreground, background))


def _shuffle(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices where ``mask`` (R,) is true, in random order."""
    indices = mask.nonzero().squeeze(1)
    return indices[torch.randperm(len(indices), device=mask.device)]
