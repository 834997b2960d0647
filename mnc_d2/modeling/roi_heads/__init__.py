from .cfm_roi_heads import CFMROIHeads
from .classifier import MNCOutputLayers
from .mask_head import MaskRegressionHead
from .mnc_roi_heads import MNCROIHeads
from .res5_head import Res5BoxHead

__all__ = ["CFMROIHeads", "MNCOutputLayers", "MNCROIHeads", "MaskRegressionHead", "Res5BoxHead"]
