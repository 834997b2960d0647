"""Accuracies that training logs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage


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
        ``recall_50`` and ``recall_75``, by the IoU that it takes to cover an instance; NaN without instances.
    """
    best = [
        pairwise_iou(target.gt_boxes, x).amax(dim=1) if len(x) else x.tensor.new_zeros(len(target))
        for x, target in zip(boxes, targets)
    ]
    ious = torch.cat(best)
    return {name: masked_mean(ious > iou) for name, iou in (("recall_50", 0.5), ("recall_75", 0.75))}


def log_metrics(metrics: dict[str, torch.Tensor]) -> None:
    """Write scalars to Detectron2's event storage, with one transfer from the device; undefined ones are left out."""
    storage = get_event_storage()
    for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist()):
        if value == value:
            storage.put_scalar(name, value)
