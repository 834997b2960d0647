"""What one pass of the cascade gives to the next and to the detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances

from .mask_supervision import MaskLabels
from .output_layers import Predictions


@dataclass
class PassOutput:
    """What one pass makes of the R boxes of all images, which lie one image after another."""

    index: int  # of the pass, from 0
    rois: torch.Tensor  # (R, 5), index of the image and box, in image pixels
    masks: torch.Tensor  # (R, m, m), probabilities
    predictions: Predictions
    mask_labels: MaskLabels | None = None  # of the masks, in training

    @property
    def boxes(self) -> torch.Tensor:
        """The boxes of all images, (R, 4)."""
        return self.rois[:, 1:]

    @property
    def seg_classes(self) -> torch.Tensor:
        """Labels (R,) by box IoU and mask IoU, in training."""
        if self.mask_labels is None:
            raise RuntimeError("Masks are labelled in training only.")
        return self.mask_labels.seg_classes

    @property
    def cls_probabilities(self) -> torch.Tensor:
        """(R, C + 1), at box level."""
        return self.predictions.cls_logits.softmax(dim=1)

    @property
    def seg_cls_probabilities(self) -> torch.Tensor:
        """(R, C + 1), at mask level."""
        return self.predictions.seg_cls_logits.softmax(dim=1)

    @property
    def foreground_probabilities(self) -> torch.Tensor:
        """Probability of any foreground class, at box or at mask level, whichever is larger: (R,)."""
        return 1 - torch.minimum(self.cls_probabilities[:, -1], self.seg_cls_probabilities[:, -1])

    def to_instances(self, image_sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Return what the pass predicts for each of its boxes, for analysis.

        Args:
            image_sizes: (height, width) of each image.

        Returns:
            one Instances per image with ``pred_boxes`` (those that the pass was given), ``scores`` and ``pred_classes``
            (of the best foreground class at mask level), ``cls_probabilities`` and ``seg_cls_probabilities``
            (R, C + 1), at box and at mask level with the background last, and ``mask_probabilities`` (R, m, m).
        """
        best = self.seg_cls_probabilities[:, :-1].max(dim=1)
        fields = {
            "pred_boxes": self.boxes,
            "scores": best.values,
            "pred_classes": best.indices,
            "cls_probabilities": self.cls_probabilities,
            "seg_cls_probabilities": self.seg_cls_probabilities,
            "mask_probabilities": self.masks,
        }
        per_image = zip(*(split_by_image(self.rois, x, len(image_sizes)) for x in fields.values()))
        return [
            Instances(size, **{**dict(zip(fields, values)), "pred_boxes": Boxes(values[0])})
            for size, values in zip(image_sizes, per_image)
        ]


def split_by_image(rois: torch.Tensor, tensor: torch.Tensor, num_images: int) -> tuple[torch.Tensor, ...]:
    """Split a tensor (R, ...) into one per image, given the RoIs (R, 5) in the order of their images."""
    if num_images == 1:
        return (tensor,)
    counts = torch.bincount(rois[:, 0].long(), minlength=num_images)
    return tensor.split(counts.tolist())


def gather_by_image(
    outputs: Sequence[PassOutput], quantity: Callable[[PassOutput], torch.Tensor], num_images: int
) -> list[torch.Tensor]:
    """Regroup a quantity of every pass, (R, ...) over all images, into one tensor per image over all passes."""
    per_pass = (split_by_image(output.rois, quantity(output), num_images) for output in outputs)
    return [torch.cat(of_image) for of_image in zip(*per_pass)]
