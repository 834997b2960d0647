"""What one pass of the cascade gives to the next and to the detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances


@dataclass
class PassOutput:
    """What one pass makes of the R boxes of all images."""

    index: int  # of the pass, from 0
    boxes: list[Boxes]  # one per image, in image pixels
    image_sizes: list[tuple[int, int]]  # (height, width) of each image
    masks: torch.Tensor  # (R, m, m), probabilities
    cls_logits: torch.Tensor  # (R, C + 1), at box level
    seg_cls_logits: torch.Tensor  # (R, C + 1), at mask level
    deltas: torch.Tensor  # (R, 4 (C + 1))

    @property
    def box_tensor(self) -> torch.Tensor:
        """The boxes of all images, (R, 4)."""
        return torch.cat([x.tensor for x in self.boxes])

    @property
    def cls_probabilities(self) -> torch.Tensor:
        """(R, C + 1), at box level."""
        return self.cls_logits.softmax(dim=1)

    @property
    def seg_cls_probabilities(self) -> torch.Tensor:
        """(R, C + 1), at mask level."""
        return self.seg_cls_logits.softmax(dim=1)

    @property
    def foreground_probabilities(self) -> torch.Tensor:
        """Probability of any foreground class, at box or at mask level, whichever is larger: (R,)."""
        return 1 - torch.minimum(self.cls_probabilities[:, -1], self.seg_cls_probabilities[:, -1])

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a tensor (R, ...) into one per image."""
        return tensor.split([len(x) for x in self.boxes])

    def describe(self) -> list[Instances]:
        """What the pass says of each of its boxes, for analysis.

        Returns:
            one Instances per image with ``pred_boxes`` (those that the pass was given), ``scores`` and ``pred_classes``
            (of the best foreground class at mask level), ``cls_probabilities`` and ``seg_cls_probabilities``
            (R, C + 1), at box and at mask level with the background last, and ``mask_probabilities`` (R, m, m).
        """
        best = self.seg_cls_probabilities[:, :-1].max(dim=1)
        fields = {
            "scores": best.values,
            "pred_classes": best.indices,
            "cls_probabilities": self.cls_probabilities,
            "seg_cls_probabilities": self.seg_cls_probabilities,
            "mask_probabilities": self.masks,
        }
        per_image = zip(*map(self.split, fields.values()))
        return [
            Instances(image_size, pred_boxes=boxes, **dict(zip(fields, values)))
            for image_size, boxes, values in zip(self.image_sizes, self.boxes, per_image)
        ]


def gather_by_image(
    outputs: Sequence[PassOutput], quantity: Callable[[PassOutput], torch.Tensor]
) -> list[torch.Tensor]:
    """Regroup a quantity of every pass, (R, ...) over all images, into one tensor per image over all passes."""
    return [torch.cat(of_image) for of_image in zip(*(output.split(quantity(output)) for output in outputs))]
