"""The whole model: backbone, RPN and cascade."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation import inference_context
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer

from ..data import num_classes_from_datasets


@META_ARCH_REGISTRY.register()
class MultitaskNetworkCascade(GeneralizedRCNN):
    """A ``GeneralizedRCNN`` whose masks have a threshold of their own and whose training pictures show masks."""

    @configurable
    def __init__(self, *, mask_threshold: float = 0.4, **kwargs) -> None:
        """
        Args:
            mask_threshold: pixels of the results are foreground from this probability on.
            kwargs: those of Detectron2's ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        self.mask_threshold = mask_threshold

    @classmethod
    def from_config(cls, cfg):
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
        return {**super().from_config(cfg), "mask_threshold": cfg.MODEL.MNC.MASK_THRESHOLD}

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """As ``GeneralizedRCNN.inference``, with the mask threshold of this model."""
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        processed = []
        for inputs, result in zip(batched_inputs, results):
            height = inputs.get("height", result.image_size[0])
            width = inputs.get("width", result.image_size[1])
            processed.append({"instances": detector_postprocess(result, height, width, self.mask_threshold)})
        return processed

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
