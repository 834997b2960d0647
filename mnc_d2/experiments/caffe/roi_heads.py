"""Stages 2 to 5 as released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes

from ...layers import roi_warp
from ...modeling import CascadePass, CascadePooler, RoIWarpPooler
from ...modeling.roi_heads.outputs import PassOutput
from ..paper_roi_heads import PaperMNCROIHeads
from .boxes import InclusiveBoxTransform, NetworkInputSize, clip_to_pixels, pixel_extents
from .voting import vote_masks


class CaffeCascadePooler(CascadePooler):
    """The released layer: the first pass takes the maximum of 2 x 2 samples, a later pass takes one sample."""

    def __init__(self, pooler: RoIWarpPooler, in_features: Sequence[str]) -> None:
        """As :class:`CascadePooler`; the pooler is that of the first pass."""
        super().__init__(pooler, in_features)
        self.later = RoIWarpPooler(pooler.output_size, pooler.scales, sampling_ratio=1, sampling=pooler.sampling)

    def forward(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, index: int, mask_coordinates: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`CascadePooler.forward`, for inference."""
        pooler = self.pooler if index == 0 else self.later
        pooled = pooler([features[name] for name in self.in_features], rois)
        return pooled, pooled


@ROI_HEADS_REGISTRY.register()
class CaffeMNCROIHeads(PaperMNCROIHeads):
    """The cascade with the released network's boxes of inclusive corners, at inference.

    Image sizes are :class:`NetworkInputSize`: detections are made in the frame of the image at its original scale, and
    have exclusive far corners.
    """

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        for key, value in {"SHARE_PASSES": True, "DETECTION_BOX": "tight"}.items():
            if cfg.MODEL.MNC[key] != value:
                raise ValueError(f"MODEL.ROI_HEADS.NAME CaffeMNCROIHeads needs MODEL.MNC.{key} {value}")
        return {
            **super().from_config(cfg, input_shape),
            "pooler": CaffeCascadePooler.from_config(cfg, input_shape, sampling="caffe"),
            "vote": partial(vote_masks, mask_threshold=cfg.MODEL.MNC.MASK_THRESHOLD),
        }

    @classmethod
    def build_passes(cls, cfg, input_shape: dict[str, ShapeSpec]) -> list[CascadePass]:
        """As :meth:`MNCROIHeads.build_passes`, with the box transform and the resizing of masks of the release."""
        passes = super().build_passes(cfg, input_shape)
        for cascade_pass in passes:
            classifier = cascade_pass.classifier
            classifier.resize_masks = resize_masks
            classifier.predictor.box2box_transform = InclusiveBoxTransform(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
        return passes

    def run_passes(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[PassOutput]:
        """As :meth:`MNCROIHeads.run_passes`; boxes are clipped to the pixels of the image."""
        return super().run_passes(features, rois, [(height - 1, width - 1) for height, width in image_sizes])

    def reduce(
        self, passes: list[PassOutput], image_sizes: Sequence[tuple[int, int]], outputs: Sequence[str]
    ) -> dict[str, list]:
        """As :meth:`MNCROIHeads.reduce`, for an image that is a batch of its own, of a :class:`NetworkInputSize`."""
        (size,) = image_sizes
        assert isinstance(size, NetworkInputSize)
        boxes = [clip_to_pixels(x.boxes / size.scale, size.original) for x in passes]
        scaled = [replace(x, rois=torch.cat((x.rois[:, :1], y), dim=1)) for x, y in zip(passes, boxes)]
        results = super().reduce(scaled, [size.original], outputs)
        inclusive = [*results.get("instances", []) * self.mask_on, *(x for y in results.get("passes", []) for x in y)]
        for result in inclusive:
            result.pred_boxes = Boxes(pixel_extents(result.pred_boxes.tensor))
        return results

    def predict_class_boxes(self, output: PassOutput) -> torch.Tensor:
        """As :meth:`MNCROIHeads.predict_class_boxes`, with exclusive far corners."""
        return pixel_extents(super().predict_class_boxes(output))


def resize_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Sample element i of (R, size, size) at i * m / size, bilinearly: without the shift that would align centres.

    The released RoI warp does this to a box of the whole mask, as long as ``size`` is at most 2 m.
    """
    rois = masks.new_tensor([0, 0, 0, masks.shape[2], masks.shape[1]]).repeat(len(masks), 1)
    rois[:, 0] = torch.arange(len(masks))
    return roi_warp(masks[:, None], rois, size, sampling="caffe")[:, 0]
