"""Stages 2 to 5 as released."""

from __future__ import annotations

import dataclasses

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances

from ..poolers import RoIWarpPooler
from ..roi_heads import MNCROIHeads
from ..roi_heads.outputs import PassOutput
from .boxes import InclusiveBoxTransform, NetworkInputSize, clip_to_pixels, pixel_extents


@ROI_HEADS_REGISTRY.register()
class CaffeMNCROIHeads(MNCROIHeads):
    """The cascade with the released network's boxes of inclusive corners, at inference.

    Image sizes are :class:`NetworkInputSize`: detections are made in the frame of the image at its original scale.
    """

    voting_sampling = "caffe"

    @configurable
    def __init__(self, **kwargs) -> None:
        """
        Args:
            kwargs: those of :class:`~mnc_d2.modeling.MNCROIHeads`, with weights that all passes share. The pooler is
                that of the first pass; later ones take one sample per element of the output, whatever the first does.
        """
        super().__init__(**kwargs)
        self.later_pooler = RoIWarpPooler(
            self.pooler.output_size, self.pooler.scales, sampling_ratio=1, sampling=self.pooler.sampling
        )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        if not cfg.MODEL.MNC.SHARE_PASSES or cfg.MODEL.MNC.MASK_IN_FEATURES:
            raise ValueError(
                "MODEL.ROI_HEADS.NAME CaffeMNCROIHeads needs MODEL.MNC.SHARE_PASSES True and MASK_IN_FEATURES []"
            )
        if cfg.MODEL.MNC.DETECTION_BOX != "tight":
            raise ValueError("MODEL.ROI_HEADS.NAME CaffeMNCROIHeads needs MODEL.MNC.DETECTION_BOX tight")
        arguments = super().from_config(cfg, input_shape)
        arguments["predictor"].box2box_transform = InclusiveBoxTransform(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
        return arguments

    def _pool(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pooler = self.pooler if index == 0 else self.later_pooler
        pooled = pooler([features[name] for name in self.in_features], boxes)
        return pooled, pooled

    def _resize_masks(self, masks: torch.Tensor, size: int) -> torch.Tensor:
        """Sample element i at i * m / size, bilinearly: without the shift that would align centres, or the corners."""
        along_y = _top_left_weights(masks.shape[-2], size).to(masks)
        along_x = _top_left_weights(masks.shape[-1], size).to(masks)
        return along_y @ masks @ along_x.T

    def _next_boxes(self, output: PassOutput, image_sizes: list[NetworkInputSize]) -> list[Boxes]:
        boxes = super()._next_boxes(output, image_sizes)
        return [Boxes(clip_to_pixels(x.tensor, size)) for x, size in zip(boxes, image_sizes)]

    def detect_instances(self, outputs: list[PassOutput], image_sizes: list[NetworkInputSize]) -> list[Instances]:
        """As :meth:`MNCROIHeads.detect_instances`, with the rules of the released code.

        Returns:
            one Instances per image, in the frame of the image at its original scale, with exclusive far corners.
        """
        originals = [size.original for size in image_sizes]
        results = super().detect_instances(_at_original_scale(outputs, image_sizes), originals)
        for result in results:
            result.pred_boxes = Boxes(pixel_extents(result.pred_boxes.tensor))
        return results

    def detect_boxes(self, outputs: list[PassOutput], image_sizes: list[NetworkInputSize]) -> list[Instances]:
        """As :meth:`MNCROIHeads.detect_boxes`, in the frame and with the corners of :meth:`detect_instances`."""
        originals = [size.original for size in image_sizes]
        return super().detect_boxes(_at_original_scale(outputs, image_sizes), originals)

    def _class_boxes(self, output: PassOutput) -> torch.Tensor:
        return pixel_extents(super()._class_boxes(output))


def _at_original_scale(outputs: list[PassOutput], image_sizes: list[NetworkInputSize]) -> list[PassOutput]:
    """Scale the boxes of all passes to the original images, and clip them to these."""
    return [
        dataclasses.replace(
            output,
            boxes=[
                Boxes(clip_to_pixels(boxes.tensor / size.scale, size.original))
                for boxes, size in zip(output.boxes, image_sizes)
            ],
        )
        for output in outputs
    ]


def _top_left_weights(length: int, size: int) -> torch.Tensor:
    """Weights (size, length) of ``length`` elements in each of ``size`` bilinear samples at i * length / size."""
    position = (torch.arange(size, dtype=torch.float64) * length / size).clamp(max=length - 1)
    distance = (position[:, None] - torch.arange(length)).abs()
    return (1 - distance).clamp(min=0)
