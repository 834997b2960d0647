"""Which gradients flow from a stage of the cascade to the stages before it (section 3), in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from ..layers import clip_gradient, inside_image, scale_gradient, stop_gradient_except


@dataclass
class CausalGradients:
    """The switches, as :func:`mnc_d2.add_mnc_config` explains them, and what they do.

    Nothing here changes a value: the methods return their arguments, with other gradients.
    """

    proposal_gradient: bool = True
    box_gradient: bool = True
    mask_gradient: str = "foreground"
    coordinate_gradient: str = "foreground"
    mask_coordinate_gradient: bool = False
    moving_targets: bool = True
    scale_feature_gradient: bool = True
    delta_gradient_clip: float = 1.0 / 512
    border_gradient: bool = False

    def __post_init__(self) -> None:
        for key in ("mask_gradient", "coordinate_gradient"):
            value = getattr(self, key)
            if value not in ("none", "foreground", "all"):
                raise ValueError(f'MODEL.MNC.{key.upper()} must be "none", "foreground" or "all", got {value!r}')

    @classmethod
    def from_config(cls, cfg: CfgNode) -> CausalGradients:
        mnc = cfg.MODEL.MNC
        return cls(
            proposal_gradient=mnc.PROPOSAL_GRADIENT,
            box_gradient=mnc.BOX_GRADIENT,
            mask_gradient=mnc.MASK_GRADIENT,
            coordinate_gradient=mnc.COORDINATE_GRADIENT,
            mask_coordinate_gradient=mnc.MASK_COORDINATE_GRADIENT,
            moving_targets=mnc.MOVING_TARGETS,
            scale_feature_gradient=mnc.SCALE_FEATURE_GRADIENT,
            delta_gradient_clip=mnc.DELTA_GRADIENT_CLIP,
            border_gradient=mnc.BORDER_GRADIENT,
        )

    def scale_features(self, features: dict[str, torch.Tensor], num_passes: int) -> dict[str, torch.Tensor]:
        """The features (N, C, H, W), by name, that ``num_passes`` passes share."""
        if not self.scale_feature_gradient:
            return features
        return {name: scale_gradient(x, 1 / num_passes) for name, x in features.items()}

    def detach_coordinates(self, proposals: Sequence[Instances], num_classes: int) -> list[Boxes]:
        """The boxes of labelled proposals; gradients stay with those RoIs that pass them on."""
        boxes = [x.proposal_boxes.tensor for x in proposals]
        if self.coordinate_gradient == "none":
            boxes = [x.detach() for x in boxes]
        elif self.coordinate_gradient == "foreground":
            boxes = [stop_gradient_except(x, (p.gt_classes < num_classes)[:, None]) for x, p in zip(boxes, proposals)]
        return [Boxes(x) for x in boxes]

    def of_masks(self, masks: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
        """Masks (R, m, m) as the classifier takes them; ``foreground`` (R,) is by mask-level label."""
        if self.mask_gradient == "none":
            return masks.detach()
        return masks if self.mask_gradient == "all" else stop_gradient_except(masks, foreground[:, None, None])

    def clip_deltas(self, deltas: torch.Tensor, num_images: int) -> torch.Tensor:
        """Box deltas of a batch of ``num_images``, as boxes are made of them for a later stage.

        The limit is meant for the loss of one image; the loss of a batch is the mean over its images.
        """
        return clip_gradient(deltas, self.delta_gradient_clip / max(num_images, 1))

    def at_border(
        self, boxes: torch.Tensor, corners: torch.Tensor, anchors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Boxes (R, 4), before they are clipped to their images.

        Args:
            boxes: (R, 4), in image pixels.
            corners: (R, 4), of their images, see :func:`~mnc_d2.layers.image_corners`.
            anchors: (R, 4), that the boxes come from, if any.
        """
        if self.border_gradient:
            return boxes
        inside = inside_image(boxes, corners)
        return stop_gradient_except(boxes, inside if anchors is None else inside & inside_image(anchors, corners))
