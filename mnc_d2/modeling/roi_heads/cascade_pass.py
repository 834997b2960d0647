"""What one pass of the cascade has weights for."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from torch import nn

from ...layers import Linear
from .classifier import MaskedFeatureClassifier
from .output_layers import MNCOutputLayers


class CascadePass(nn.Module):
    """Two stages: the mask head, and the classifier of what it finds."""

    def __init__(self, mask_head: nn.Module | None, classifier: MaskedFeatureClassifier) -> None:
        """
        Args:
            mask_head: pooled features (R, C, S, S) -> mask logits (R, m, m); None where masks are given.
            classifier: (pooled features, mask probabilities) -> predictions.
        """
        super().__init__()
        self.mask_head = mask_head
        self.classifier = classifier

    @classmethod
    def from_config(cls, cfg: CfgNode, channels: int, with_mask_head: bool = True) -> CascadePass:
        """Build the heads that the config names, for features of so many channels."""
        resolution, size = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        classifier_shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
        mask_path_head, box_path_head = (build_box_head(cfg, classifier_shape) for _ in range(2))
        path_shape = box_path_head.output_shape
        path_size = path_shape.channels * (path_shape.height or 1) * (path_shape.width or 1)
        mask_head = None
        if with_mask_head:
            mask_head = build_mask_head(cfg, ShapeSpec(channels=channels, height=size, width=size))
        predictor = MNCOutputLayers(cfg, ShapeSpec(channels=2 * path_size))
        classifier = MaskedFeatureClassifier(mask_path_head, box_path_head, predictor, resolution=resolution)
        cascade_pass = cls(mask_head, classifier)
        Linear.convert(cascade_pass)
        return cascade_pass
