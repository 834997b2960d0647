"""Accuracies that training logs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from .labels import RoILabels
from .outputs import PassOutput


def masked_mean(values: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the values (R,) where the mask (R,) is true; NaN if it is nowhere."""
    values = values.detach().float()
    return values.mean() if where is None else (values * where).sum() / where.sum()


@torch.no_grad()
def recall(boxes: Sequence[Boxes], targets: Sequence[Instances]) -> dict[str, torch.Tensor]:
    """Share of the instances that some box covers.

    Args:
        boxes: one per image, in image pixels.
        targets: one per image, with ``gt_boxes``.

    Returns:
        ``s1/recall_50`` and ``s1/recall_75``, by the IoU that it takes to cover an instance; NaN without instances.
    """
    best = [
        pairwise_iou(target.gt_boxes, x).amax(dim=1) if len(x) else x.tensor.new_zeros(len(target))
        for x, target in zip(boxes, targets)
    ]
    ious = torch.cat(best)
    return {f"s1/recall_{name}": masked_mean(ious > iou) for name, iou in (("50", 0.5), ("75", 0.75))}


@torch.no_grad()
def pass_metrics(output: PassOutput, labels: RoILabels, num_classes: int) -> dict[str, torch.Tensor]:
    """Accuracies of one pass, named by its stages.

    Args:
        output: of the pass, in training.
        labels: of its RoIs.
        num_classes: label of the background.

    Returns:
        scalars: mean IoU of the foreground's masks, accuracies at box and at mask level, and numbers of foreground RoIs
        an image.
    """
    mask_labels = output.mask_labels
    assert mask_labels is not None, "accuracies are measured in training"
    is_foreground, is_seg_foreground = labels.classes < num_classes, mask_labels.seg_classes < num_classes
    is_right = output.predictions.cls_logits.argmax(dim=1) == labels.classes
    mask_stage, classifier_stage, num_images = 2 * output.index + 2, 2 * output.index + 3, len(labels.counts)
    return {
        f"s{mask_stage}/mask_iou": masked_mean(mask_labels.ious, is_foreground & mask_labels.has_mask),
        f"s{classifier_stage}/cls_accuracy": masked_mean(is_right),
        f"s{classifier_stage}/fg_cls_accuracy": masked_mean(is_right, is_foreground),
        f"s{classifier_stage}/seg_cls_accuracy": masked_mean(
            output.predictions.seg_cls_logits.argmax(dim=1) == mask_labels.seg_classes
        ),
        f"s{classifier_stage}/num_fg": is_foreground.sum() / num_images,
        f"s{classifier_stage}/num_seg_fg": is_seg_foreground.sum() / num_images,
    }


def log_metrics(proposals: Sequence[Boxes], passes: Sequence[tuple[PassOutput, RoILabels]], num_classes: int) -> None:
    """Write the accuracies of a training step to Detectron2's event storage; undefined ones are left out.

    Args:
        proposals: one per image, in image pixels.
        passes: the output of each pass, and the labels of its RoIs.
        num_classes: label of the background.
    """
    metrics = recall(proposals, passes[0][1].targets)
    for output, labels in passes:
        metrics |= pass_metrics(output, labels, num_classes)
    storage = get_event_storage()
    # One transfer from the device.
    for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist()):
        if value == value:
            storage.put_scalar(name, value)
