from .cascade_pass import CascadePass
from .classifier import MaskedFeatureClassifier
from .mask_head import MaskFusionHead, MaskRegressionHead
from .mask_supervision import MaskSupervision
from .mask_voting import vote_masks
from .mnc_roi_heads import MNCROIHeads
from .output_layers import MNCOutputLayers
from .res5_head import Res5BoxHead

__all__ = [
    "CascadePass",
    "MNCOutputLayers",
    "MNCROIHeads",
    "MaskFusionHead",
    "MaskRegressionHead",
    "MaskSupervision",
    "MaskedFeatureClassifier",
    "Res5BoxHead",
    "vote_masks",
]
