"""The whole model: backbone, RPN and cascade."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation import inference_context
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer

from ..data import num_classes_from_datasets
from .mask_pasting import encode_masks, paste_masks
from .proposal_generator import CausalRPN
from .roi_heads import MNCROIHeads


@META_ARCH_REGISTRY.register()
class MultitaskNetworkCascade(GeneralizedRCNN):
    """A ``GeneralizedRCNN`` whose masks have a threshold of their own and whose training pictures show masks."""

    @configurable
    def __init__(
        self,
        *,
        mask_threshold: float = 0.4,
        outputs: Sequence[str] = ("instances",),
        pred_mask_format: str = "bitmask",
        **kwargs,
    ) -> None:
        """
        Args:
            mask_threshold: pixels of the results are foreground from this probability on.
            outputs: what inference returns for each image, of "instances", "box_instances" and "passes"; see
                :meth:`inference`.
            pred_mask_format: of the masks that inference returns, "bitmask" or "rle".
            kwargs: those of Detectron2's ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        unknown = set(outputs) - {"instances", "box_instances", "passes"}
        if unknown or "instances" not in outputs:
            raise ValueError(
                f'MODEL.MNC.OUTPUTS must be "instances" and possibly "box_instances" and "passes", got {list(outputs)}'
            )
        self.mask_threshold = mask_threshold
        self.outputs = list(outputs)
        self.pred_mask_format = pred_mask_format

    @classmethod
    def from_config(cls, cfg):
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
        return {
            **super().from_config(cfg),
            "mask_threshold": cfg.MODEL.MNC.MASK_THRESHOLD,
            "outputs": cfg.MODEL.MNC.OUTPUTS,
            "pred_mask_format": cfg.MODEL.MNC.PRED_MASK_FORMAT,
        }

    def forward(self, batched_inputs: list[dict], loss_scale: float = 1.0) -> list[dict] | dict[str, torch.Tensor]:
        """As ``GeneralizedRCNN.forward``.

        Args:
            batched_inputs: one dict per image, as Detectron2's data loaders give them.
            loss_scale: what mixed precision multiplies the losses by. Limits of the causal gradients follow it.
        """
        for part in (self.proposal_generator, self.roi_heads):
            if isinstance(part, (CausalRPN, MNCROIHeads)):
                part.gradients.loss_scale = loss_scale
        return super().forward(batched_inputs)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """As ``GeneralizedRCNN.inference``, with the mask threshold of this model.

        Returns:
            without ``do_postprocess``, one Instances per image, the "instances" below as the network yields them.
            Else, one dict per image of what MODEL.MNC.OUTPUTS names, in the frame of the image at its original size
            (``height`` and ``width`` of the inputs): "instances", the results of mask voting, or of MNC_box if
            MODEL.MASK_ON is off; "box_instances", the results of MNC_box; "passes", what each pass predicts for its
            boxes, see :meth:`~mnc_d2.modeling.roi_heads.outputs.PassOutput.to_instances`. Masks of "instances" are
            ``pred_masks``, bool (N, height, width); with the ``pred_mask_format`` "rle" they are ``pred_masks_rle``,
            an :class:`~mnc_d2.modeling.mask_pasting.RLEMasks`.
        """
        if detected_instances is not None:
            instances = super().inference(batched_inputs, detected_instances, do_postprocess=False)
            if not do_postprocess:
                return instances
            return [{"instances": self.postprocess(*of_image)} for of_image in zip(batched_inputs, instances)]
        features, proposals = self.propose(batched_inputs)
        results = self.roi_heads.detect(features, proposals, self.outputs if do_postprocess else ["instances"])
        if not do_postprocess:
            return results["instances"]
        return [
            {name: self.postprocess(inputs, output) for name, output in zip(results, of_image)}
            for inputs, of_image in zip(batched_inputs, zip(*results.values()))
        ]

    def propose(self, batched_inputs: list[dict]) -> tuple[dict[str, torch.Tensor], list[Instances]]:
        """Stage 1 at inference.

        Args:
            batched_inputs: as in :meth:`forward`.

        Returns:
            the backbone's feature maps by name; and one Instances per image with ``proposal_boxes``, in pixels of the
            network's input, those of the inputs where the model has no RPN.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.proposal_generator is None:
            return features, [x["proposals"].to(self.device) for x in batched_inputs]
        proposals, _ = self.proposal_generator(images, features, None)
        return features, proposals

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As ``GeneralizedRCNN.preprocess_image``, in channels_last memory format, as the RoI warp reads features."""
        images = super().preprocess_image(batched_inputs)
        images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
        return images

    def postprocess(self, inputs: dict, output: Instances | list[Instances]) -> Instances | list[Instances]:
        """Bring an output for one image to the size of the image that ``inputs`` asks for.

        Detections are treated as by Detectron2's ``detector_postprocess``, but masks are pasted into ``mask_boxes``
        where there are such, and possibly encoded. A list of what each pass predicts keeps all of its boxes.
        """
        if isinstance(output, list):
            return [_scale_boxes(inputs, of_pass) for of_pass in output]
        result = _scale_boxes(inputs, output)
        size = result.image_size
        frame = "mask_boxes" if result.has("mask_boxes") else "pred_boxes"
        for name in {"pred_boxes", frame}:
            result.get(name).clip(size)
        result = result[result.get(frame).nonempty()]
        boxes = result.get(frame).tensor
        if result.has("mask_boxes"):
            result.remove("mask_boxes")
        if result.has("pred_masks"):
            masks = result.pred_masks[:, 0]
            if self.pred_mask_format == "rle":
                result.remove("pred_masks")
                result.pred_masks_rle = encode_masks(masks, boxes, size, self.mask_threshold)
            else:
                result.pred_masks = paste_masks(masks, boxes, size, self.mask_threshold)
        return result

    @torch.no_grad()
    def visualize_training(self, batched_inputs: list[dict], proposals: list[Instances]) -> None:
        """Put a picture of the first image into the event storage: ground truth, proposals, detections with masks.

        Args:
            batched_inputs: as in :meth:`forward`.
            proposals: one per image, with ``proposal_boxes``, best first.
        """
        inputs = batched_inputs[0]
        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), self.input_format)
        with inference_context(self):
            (output,) = self.inference([{key: inputs[key] for key in ("image", "proposals") if key in inputs}])
        detections = output["instances"].to("cpu")
        detections = detections[:20]
        target = inputs["instances"]
        panels = [
            {"boxes": target.gt_boxes, "masks": target.gt_masks if target.has("gt_masks") else None},
            {"boxes": proposals[0].proposal_boxes[:20].to("cpu").tensor.detach().numpy()},
            {
                "boxes": detections.pred_boxes,
                "masks": detections.pred_masks.numpy() if detections.has("pred_masks") else None,
            },
        ]
        pictures = [Visualizer(image).overlay_instances(**panel).get_image() for panel in panels]
        get_event_storage().put_image(
            "ground truth, proposals, detections", np.concatenate(pictures, axis=1).transpose(2, 0, 1)
        )


def _scale_boxes(inputs: dict, result: Instances) -> Instances:
    """Bring boxes to the size of the image that ``inputs`` asks for: a copy with the same other fields."""
    height, width = inputs.get("height", result.image_size[0]), inputs.get("width", result.image_size[1])
    fields = result.get_fields().copy()
    for name in {"pred_boxes", "mask_boxes"} & fields.keys():
        fields[name] = fields[name].clone()  # Detectron2 scales in place
        fields[name].scale(width / result.image_size[1], height / result.image_size[0])
    return Instances((height, width), **fields)
