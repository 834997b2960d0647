"""What one pass of the cascade gives to the next and to the detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances


@dataclass
class PassOutput:
    """What one pass makes of the R boxes of all images."""

    index: int  # of the pass, from 0
    boxes: list[Boxes]  # one per image
    masks: torch.Tensor  # (R, m, m), probabilities
    scores: torch.Tensor  # (R, C + 1), box-level logits
    mask_scores: torch.Tensor  # (R, C + 1), mask-level logits
    deltas: torch.Tensor  # (R, 4 (C + 1))

    @property
    def foreground_scores(self) -> torch.Tensor:
        """Probability of any foreground class, at box or at mask level, whichever is larger: (R,)."""
        background = torch.minimum(self.scores.softmax(dim=1)[:, -1], self.mask_scores.softmax(dim=1)[:, -1])
        return 1 - background


def gather_by_image(tensors: Sequence[torch.Tensor], outputs: Sequence[PassOutput]) -> list[torch.Tensor]:
    """Regroup one tensor per pass, (R, ...) over all images, into one per image over all passes."""
    per_pass = [tensor.split([len(x) for x in output.boxes]) for tensor, output in zip(tensors, outputs)]
    return [torch.cat(per_image) for per_image in zip(*per_pass)]


def describe_pass(output: PassOutput, image_sizes: Sequence[tuple[int, int]]) -> list[Instances]:
    """What one pass says of each of its boxes, for analysis.

    Args:
        output: of the pass.
        image_sizes: (height, width) of each image.

    Returns:
        one Instances per image with ``pred_boxes`` (those that the pass was given), ``scores`` and ``pred_classes``
        (of the best foreground class at mask level), ``class_scores`` and ``mask_class_scores`` (R, C + 1),
        probabilities at box and at mask level with the background last, and ``mask_probabilities`` (R, m, m).
    """
    class_scores, mask_class_scores = output.scores.softmax(dim=1), output.mask_scores.softmax(dim=1)
    best = mask_class_scores[:, :-1].max(dim=1)
    fields = {
        "scores": best.values,
        "pred_classes": best.indices,
        "class_scores": class_scores,
        "mask_class_scores": mask_class_scores,
        "mask_probabilities": output.masks,
    }
    counts = [len(x) for x in output.boxes]
    per_image = zip(*(x.split(counts) for x in fields.values()))
    return [
        Instances(image_size, pred_boxes=boxes, **dict(zip(fields, values)))
        for image_size, boxes, values in zip(image_sizes, output.boxes, per_image)
    ]
