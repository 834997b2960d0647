"""The heads of one pass of the cascade: two stages with weights."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, build_box_head, build_mask_head
from torch import nn

from ...layers import at_least_float32
from .classifier import MaskedFeatureClassifier
from .output_layers import MNCOutputLayers


class CascadePass(nn.Module):
    """A mask head, and the classifier of boxes and of the masks in them."""

    def __init__(self, mask_head: BaseMaskRCNNHead | None, classifier: MaskedFeatureClassifier) -> None:
        """
        Args:
            mask_head: one of Detectron2's: its ``layers`` give class-agnostic mask logits (R, 1, m, m) for pooled
                features (R, C, S, S). None where masks are given.
            classifier: (pooled features, mask probabilities) -> predictions.
        """
        super().__init__()
        self.mask_head = mask_head
        self.classifier = classifier

    def predict_masks(self, features: torch.Tensor) -> torch.Tensor:
        """Return mask logits (R, m, m), at least float32, for pooled features (R, C, S, S)."""
        if self.mask_head is None:
            raise TypeError("This pass has no mask head and needs masks that are given.")
        return at_least_float32(self.mask_head.layers(features))[:, 0]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], with_mask_head: bool = True) -> CascadePass:
        """Build the heads that the config names.

        Args:
            cfg: the config.
            input_shape: of the feature maps, all of the same channels.
            with_mask_head: whether masks are regressed, not given.
        """
        resolution, size = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        if size % resolution:
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION ({resolution}) must divide MODEL.ROI_MASK_HEAD."
                f"POOLER_RESOLUTION ({size})"
            )
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        classifier_shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
        mask_path_head, box_path_head = (build_box_head(cfg, classifier_shape) for _ in range(2))
        path_shape = box_path_head.output_shape
        path_size = path_shape.channels * (path_shape.height or 1) * (path_shape.width or 1)
        mask_head = None
        if with_mask_head:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True  # a mask is regressed before its class is known
            mask_head = build_mask_head(cfg, ShapeSpec(channels=channels, height=size, width=size))
        predictor = MNCOutputLayers(cfg, ShapeSpec(channels=2 * path_size))
        return cls(mask_head, MaskedFeatureClassifier(mask_path_head, box_path_head, predictor, resolution=resolution))
