"""Accuracies that training logs."""

from __future__ import annotations

import torch
from detectron2.utils.events import get_event_storage


def masked_mean(values: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the values (R,) where the mask (R,) is true; NaN if it is nowhere."""
    values = values.detach().float()
    return values.mean() if where is None else (values * where).sum() / where.sum()


def log_metrics(metrics: dict[str, torch.Tensor]) -> None:
    """Write scalars to Detectron2's event storage, with one transfer from the device; undefined ones are left out."""
    storage = get_event_storage()
    for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist()):
        if value == value:
            storage.put_scalar(name, value)
