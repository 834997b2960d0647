"""The whole released model, from images that were resized by an exact factor, and its backbone."""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances

from ...data import exact_scale, scaled_size
from ...modeling import VGG16, MultitaskNetworkCascade
from .boxes import NetworkInputSize
from .pasting import paste_masks


@BACKBONE_REGISTRY.register()
def build_caffe_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG16:
    """Build the VGG-16 of ``build_vgg_backbone`` with Caffe's pooling, which rounds odd sizes up."""
    return VGG16(("conv5",), in_channels=input_shape.channels, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT, ceil_mode=True)


@META_ARCH_REGISTRY.register()
class CaffeMultitaskNetworkCascade(MultitaskNetworkCascade):
    """A cascade that takes one image at a time, resized by :class:`~mnc_d2.data.ResizeByExactScale`. Inference only."""

    @configurable
    def __init__(self, *, short_side: int, long_side: int, **kwargs) -> None:
        """
        Args:
            short_side, long_side: as of ``ResizeByExactScale``, in pixels.
            kwargs: arguments of :class:`~mnc_d2.modeling.MultitaskNetworkCascade`; ``pred_mask_format`` is "bitmask".
        """
        super().__init__(**kwargs)
        if self.pred_mask_format != "bitmask":
            raise ValueError(f'MODEL.MNC.PRED_MASK_FORMAT must be "bitmask" for {type(self).__name__}')
        self.short_side, self.long_side = short_side, long_side

    @classmethod
    def from_config(cls, cfg):
        sides = {"short_side": cfg.INPUT.MIN_SIZE_TEST, "long_side": cfg.INPUT.MAX_SIZE_TEST}
        return {**super().from_config(cfg), **sides}

    def forward(self, batched_inputs: list[dict], loss_scale: float = 1.0) -> list[dict] | dict[str, torch.Tensor]:
        """As :meth:`MultitaskNetworkCascade.forward` at inference; raises a RuntimeError in training."""
        if self.training:
            raise RuntimeError(
                "CaffeMultitaskNetworkCascade reproduces the released network at inference and cannot be trained. "
                "To train, take configs/PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage.yaml."
            )
        return super().forward(batched_inputs, loss_scale)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """As :meth:`MultitaskNetworkCascade.inference`, image by image: in a batch they would have to be padded."""
        results: list = []
        for index, inputs in enumerate(batched_inputs):
            detected = None if detected_instances is None else [detected_instances[index]]
            results += super().inference([inputs], detected, do_postprocess)
        return results

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As :meth:`MultitaskNetworkCascade.preprocess_image`; the image sizes are :class:`NetworkInputSize`."""
        images = super().preprocess_image(batched_inputs)
        images.image_sizes = [self._input_size(x, size) for x, size in zip(batched_inputs, images.image_sizes)]
        return images

    def _input_size(self, inputs: dict, size: tuple[int, int]) -> NetworkInputSize:
        """Find the scale of an image, which its size in whole pixels does not tell exactly.

        Raises:
            ValueError: the input has not the size that its original height and width lead to, lacks these, or is of
                whole grey levels.
        """
        name = inputs.get("file_name", "An image")
        if "height" not in inputs or "width" not in inputs:
            raise ValueError(f'{name} comes without the "height" and "width" of the original image.')
        original = inputs["height"], inputs["width"]
        scale = exact_scale(original, self.short_side, self.long_side)
        is_rounded = _is_rounded(inputs["image"], scale)
        if scaled_size(original, scale) != tuple(size) or is_rounded:
            raise ValueError(
                f"{name} of {original[1]} x {original[0]} pixels was resized to {size[1]} x {size[0]}, "
                f"{'in whole grey levels, ' if is_rounded else ''}but the model needs a factor of {scale:.6g}, and "
                "float32: set INPUT.EXACT_SCALE_TEST True, and take mnc_d2.predictor.MNCPredictor or "
                "mnc_d2.data.build_test_resize(cfg). Test-time augmentation resizes in another way."
            )
        return NetworkInputSize(size, scale, original)

    def postprocess(self, inputs: dict, output: Instances | list[Instances]) -> Instances | list[Instances]:
        """As :meth:`MultitaskNetworkCascade.postprocess`; detections lie in the frame of the original image already."""
        if isinstance(output, list) or not output.has("pred_masks"):
            return super().postprocess(inputs, output)
        masks = paste_masks(output.pred_masks[:, 0], output.pred_boxes.tensor, output.image_size, self.mask_threshold)
        return Instances(output.image_size, **{**output.get_fields(), "pred_masks": masks})


def _is_rounded(image: torch.Tensor, scale: float) -> bool:
    """Whether an image (C, H, W) that was resized by a factor was rounded to whole grey levels then."""
    if not image.is_floating_point():
        return True
    step = round(1 / scale)
    if step % 2 and math.isclose(step * scale, 1):
        return False  # samples lie on pixels and are whole: nobody can tell
    # Of an image that is not flat, bilinear samples are not all whole numbers.
    flat = image == image[:, :1, :1]
    return bool((image == image.round()).all() & ~flat.all())
