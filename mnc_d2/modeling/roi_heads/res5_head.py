"""conv5 of a ResNet as the head of a path of the classifier, as in the authors' COCO entry."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_BOX_HEAD_REGISTRY.register()
class Res5BoxHead(nn.Module):
    """The blocks of res5, of stride 2, and the average over positions; the features are those of res4."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, res5: nn.Module, out_channels: int) -> None:
        """
        Args:
            input_shape: of the pooled features.
            res5: (R, C, s, s) -> (R, out_channels, s / 2, s / 2).
            out_channels: number of features that come out.
        """
        super().__init__()
        self.res5 = res5
        self.output_shape = ShapeSpec(channels=out_channels)

    @classmethod
    def from_config(cls, cfg, input_shape):
        expected = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 4
        if input_shape.channels != expected:
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.NAME Res5BoxHead takes the {expected} channels of res4, but MODEL.ROI_HEADS."
                f"IN_FEATURES {list(cfg.MODEL.ROI_HEADS.IN_FEATURES)} have {input_shape.channels}"
            )
        res5, out_channels = Res5ROIHeads._build_res5_block(cfg)
        return {"input_shape": input_shape, "res5": res5, "out_channels": out_channels}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (R, out_channels) for pooled features (R, C, s, s)."""
        return self.res5(features).mean(dim=(2, 3))
