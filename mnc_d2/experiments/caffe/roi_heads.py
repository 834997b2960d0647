"""Stages 2 to 5 as released."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances

from ...modeling.poolers import CascadePooler, RoIWarpPooler
from ...modeling.roi_heads import CascadePass, MNCROIHeads
from ...modeling.roi_heads.outputs import PassOutput
from .boxes import InclusiveBoxTransform, clip_to_pixels, pixel_extents
from .voting import vote_masks


class CaffeCascadePooler(CascadePooler):
    """A pooler whose later passes take one sample per element of the output, whatever the first does."""

    def __init__(self, pooler: RoIWarpPooler, in_features: list[str]) -> None:
        """
        Args:
            pooler: that of the first pass.
            in_features: names of the feature maps to pool from.
        """
        super().__init__(pooler, in_features)
        later = RoIWarpPooler(pooler.output_size, pooler.scales, sampling_ratio=1, sampling=pooler.sampling)
        self.later = CascadePooler(later, in_features)

    def forward(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], index: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`CascadePooler.forward`."""
        pool = super().forward if index == 0 else self.later
        return pool(features, boxes, index, *args, **kwargs)


@ROI_HEADS_REGISTRY.register()
class CaffeMNCROIHeads(MNCROIHeads):
    """The cascade with the released network's boxes of inclusive corners, at inference.

    Image sizes are :class:`NetworkInputSize`: detections are made in the frame of the image at its original scale.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        """
        Args:
            kwargs: those of :class:`~mnc_d2.modeling.MNCROIHeads`, with weights that all passes share.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        if not cfg.MODEL.MNC.SHARE_PASSES or cfg.MODEL.MNC.MASK_IN_FEATURES:
            raise ValueError(
                "MODEL.ROI_HEADS.NAME CaffeMNCROIHeads needs MODEL.MNC.SHARE_PASSES True and MASK_IN_FEATURES []"
            )
        if cfg.MODEL.MNC.DETECTION_BOX != "tight":
            raise ValueError("MODEL.ROI_HEADS.NAME CaffeMNCROIHeads needs MODEL.MNC.DETECTION_BOX tight")
        arguments = super().from_config(cfg, input_shape)
        pooler = arguments["pooler"]
        return {
            **arguments,
            "pooler": CaffeCascadePooler(pooler.pooler, pooler.in_features),
            "vote": partial(
                vote_masks,
                voting_iou_threshold=cfg.MODEL.MNC.VOTING_IOU_THRESHOLD,
                mask_threshold=cfg.MODEL.MNC.MASK_THRESHOLD,
            ),
        }

    @classmethod
    def build_passes(cls, cfg, channels: int) -> list[CascadePass]:
        """As :meth:`MNCROIHeads.build_passes`, with the box transform and the resizing of masks of the release."""
        passes = super().build_passes(cfg, channels)
        for cascade_pass in passes:
            cascade_pass.classifier.resize_masks = resize_masks
            transform = InclusiveBoxTransform(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
            cascade_pass.classifier.predictor.box2box_transform = transform
        return passes

    def _next_boxes(self, output: PassOutput) -> list[Boxes]:
        boxes = super()._next_boxes(output)
        return [Boxes(clip_to_pixels(x.tensor, size)) for x, size in zip(boxes, output.image_sizes)]

    def detect_instances(self, outputs: list[PassOutput]) -> list[Instances]:
        """As :meth:`MNCROIHeads.detect_instances`, with the rules of the released code.

        Returns:
            one Instances per image, in the frame of the image at its original scale, with exclusive far corners.
        """
        results = super().detect_instances(_at_original_scale(outputs))
        for result in results:
            result.pred_boxes = Boxes(pixel_extents(result.pred_boxes.tensor))
        return results

    def detect_boxes(self, outputs: list[PassOutput]) -> list[Instances]:
        """As :meth:`MNCROIHeads.detect_boxes`, in the frame and with the corners of :meth:`detect_instances`."""
        return super().detect_boxes(_at_original_scale(outputs))

    def _class_boxes(self, output: PassOutput) -> torch.Tensor:
        return pixel_extents(super()._class_boxes(output))


def _at_original_scale(outputs: list[PassOutput]) -> list[PassOutput]:
    """Scale the boxes of all passes to the original images, and clip them to these."""
    return [
        dataclasses.replace(
            output,
            boxes=[
                Boxes(clip_to_pixels(boxes.tensor / size.scale, size.original))
                for boxes, size in zip(output.boxes, output.image_sizes)
            ],
            image_sizes=[size.original for size in output.image_sizes],
        )
        for output in outputs
    ]


def resize_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Sample element i of (R, size, size) at i * m / size, bilinearly: without the shift that would align centres."""
    along_y = _top_left_weights(masks.shape[-2], size).to(masks)
    along_x = _top_left_weights(masks.shape[-1], size).to(masks)
    return along_y @ masks @ along_x.T


def _top_left_weights(length: int, size: int) -> torch.Tensor:
    """Weights (size, length) of ``length`` elements in each of ``size`` bilinear samples at i * length / size."""
    position = (torch.arange(size, dtype=torch.float64) * length / size).clamp(max=length - 1)
    distance = (position[:, None] - torch.arange(length)).abs()
    return (1 - distance).clamp(min=0)
