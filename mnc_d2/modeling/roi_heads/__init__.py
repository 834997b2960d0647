from .classifier import MNCOutputLayers
from .mask_head import MaskRegressionHead
from .mnc_roi_heads import MNCROIHeads

__all__ = ["MNCOutputLayers", "MNCROIHeads", "MaskRegressionHead"]
