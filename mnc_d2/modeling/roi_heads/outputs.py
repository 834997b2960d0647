"""What one pass of the cascade gives to the next and to the detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes


@dataclass
class PassOutput:
    """What one pass makes of the R boxes of all images."""

    index: int  # of the pass, from 0
    boxes: list[Boxes]  # one per image
    masks: torch.Tensor  # (R, m, m), probabilities
    scores: torch.Tensor  # (R, C + 1), box-level logits
    mask_scores: torch.Tensor  # (R, C + 1), mask-level logits
    deltas: torch.Tensor  # (R, 4 (C + 1))


def gather_by_image(tensors: Sequence[torch.Tensor], outputs: Sequence[PassOutput]) -> list[torch.Tensor]:
    """Regroup one tensor per pass, (R, ...) over all images, into one per image over all passes."""
    per_pass = [tensor.split([len(x) for x in output.boxes]) for tensor, output in zip(tensors, outputs)]
    return [torch.cat(per_image) for per_image in zip(*per_pass)]
