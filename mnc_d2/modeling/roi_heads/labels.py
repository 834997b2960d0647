"""What RoIs are labelled in training, and which of the first pass are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou

from ...layers import batch_indices


@dataclass
class RoILabels:
    """The RoIs of a pass, one image after another, and the instance that each is matched to.

    Labels are constants; the boxes keep their gradient. ``gt_boxes`` and ``gt_index`` mean nothing for background.
    """

    rois: torch.Tensor  # (R, 5), index of the image and box, in image pixels
    counts: list[int]  # RoIs of each image
    proposal_index: torch.Tensor  # (R,), int64, among the given boxes of all images; -1 for ground truth
    classes: torch.Tensor  # (R,), int64, by box IoU; num_classes for background
    gt_index: torch.Tensor  # (R,), int64, of the matched instance in its image
    gt_boxes: torch.Tensor  # (R, 4), in image pixels
    targets: list[Instances]  # the ground truth of each image

    @property
    def boxes(self) -> torch.Tensor:
        """The boxes of all images, (R, 4)."""
        return self.rois[:, 1:]

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a tensor (R, ...) into one per image."""
        return tensor.split(self.counts)

    def to_instances(self, **more: torch.Tensor) -> list[Instances]:
        """Return what Detectron2's ROIHeads return in training.

        Args:
            more: further fields, each (R, ...).

        Returns:
            one Instances per image with ``proposal_boxes``, ``gt_classes``, ``gt_index``, ``gt_boxes`` and ``more``.
        """
        fields = {"gt_classes": self.classes, "gt_index": self.gt_index, **more}
        boxes = zip(self.split(self.boxes), self.split(self.gt_boxes))
        return [
            Instances(
                target.image_size,
                proposal_boxes=Boxes(of_image),
                gt_boxes=Boxes(gt_boxes),
                **dict(zip(fields, values)),
            )
            for target, (of_image, gt_boxes), values in zip(self.targets, boxes, zip(*map(self.split, fields.values())))
        ]


def boxes_to_rois(boxes: Sequence[Boxes]) -> torch.Tensor:
    """Join the boxes of each image: (R, 5), index of the image and box. A GPU is not waited for."""
    coordinates = torch.cat([x.tensor for x in boxes])
    image = batch_indices([len(x) for x in boxes], coordinates.device)
    return torch.cat((image[:, None].to(coordinates), coordinates), dim=1)


def label_boxes(
    boxes: Sequence[Boxes],
    targets: list[Instances],
    matcher: Matcher,
    num_classes: int,
    sampler: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    append_gt: bool = False,
) -> RoILabels:
    """Match the boxes of each image to its ground truth.

    Args:
        boxes: one per image, in image pixels.
        targets: one per image, with ``gt_boxes`` and ``gt_classes``.
        matcher: from IoU to instances and labels.
        num_classes: label of the background.
        sampler: from the classes (B,) and largest IoUs (B,) of the boxes of an image to the indices of those to keep.
            None keeps all but the boxes with the label -1, ignore.
        append_gt: whether the ground-truth boxes of an image join its boxes.
    """
    parts = []
    for of_image, target, first in zip(boxes, targets, accumulate((len(x) for x in boxes), initial=0)):
        given = len(of_image)
        if append_gt:
            of_image = Boxes.cat([of_image, target.gt_boxes])
        labels, gt_index, ious = _match(of_image, target, matcher, num_classes)
        keep = (labels >= 0).nonzero().squeeze(1) if sampler is None else sampler(labels, ious)
        labels, gt_index, of_image = labels[keep], gt_index[keep], of_image[keep]
        # Without ground truth, all is background and any box will do.
        gt_boxes = target.gt_boxes.tensor[gt_index] if len(target) else of_image.tensor.detach()
        parts.append((of_image, torch.where(keep < given, keep + first, -1), labels, gt_index, gt_boxes))
    kept, *fields = zip(*parts)
    proposal_index, classes, gt_index, gt_boxes = (torch.cat(x) for x in fields)
    counts = [len(x) for x in kept]
    return RoILabels(boxes_to_rois(kept), counts, proposal_index, classes, gt_index, gt_boxes, targets)


@torch.no_grad()
def _match(
    boxes: Boxes, target: Instances, matcher: Matcher, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return class (-1 for ignore), index of the matched instance, and largest IoU of each box (B,) of an image."""
    ious = pairwise_iou(target.gt_boxes, boxes)
    index, labels = matcher(ious)
    if len(target) == 0:
        return torch.full_like(index, num_classes), index, torch.zeros_like(index, dtype=torch.float32)
    classes = target.gt_classes[index].masked_fill(labels == 0, num_classes).masked_fill(labels == -1, -1)
    return classes, index, ious.max(dim=0).values


@torch.no_grad()
def sample_rois(
    classes: torch.Tensor,
    ious: torch.Tensor,
    num_classes: int,
    batch_size: int,
    positive_fraction: float,
    bands: Sequence[tuple[float, float, float]] = ((0.1, 0.5, 0.85), (0.0, 0.1, 0.15)),
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
        bands: (low, high, share) of each band: a background RoI with low <= IoU < high belongs to it, and it gets this
            share of the background.
        refill: whether bands make up for one another.

    Returns:
        indices of the drawn RoIs, int64, foreground first.
    """
    foreground = _shuffle((classes >= 0) & (classes < num_classes))[: int(batch_size * positive_fraction)]
    wanted = batch_size - len(foreground)
    candidates = [_shuffle((classes == num_classes) & (ious >= low) & (ious < high)) for low, high, _ in bands]
    shares = [round(wanted * share) for _, _, share in bands]
    drawn = [band[:share] for band, share in zip(candidates, shares)]
    spare = [band[share:] for band, share in zip(candidates, shares)] if refill else []
    background = torch.cat(drawn + spare)[:wanted]
    return torch.cat((foreground, background))


def _shuffle(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices where ``mask`` (R,) is true, in random order."""
    indices = mask.nonzero().squeeze(1)
    return indices[torch.randperm(len(indices), device=mask.device)]
