from .backbone import VGG16, TimmBackbone, UnsharedBackbones
from .caffe import CaffeMultitaskNetworkCascade
from .causal_gradients import CausalGradients
from .meta_arch import MultitaskNetworkCascade
from .poolers import CascadePooler, RoIWarpPooler
from .proposal_generator import CausalRPN
from .roi_heads import (
    CascadePass,
    CFMROIHeads,
    MaskedFeatureClassifier,
    MaskFusionHead,
    MaskRegressionHead,
    MaskSupervision,
    MNCOutputLayers,
    MNCROIHeads,
    Res5BoxHead,
    vote_masks,
)

__all__ = [
    "CFMROIHeads",
    "CascadePass",
    "CascadePooler",
    "CaffeMultitaskNetworkCascade",
    "CausalGradients",
    "CausalRPN",
    "MNCOutputLayers",
    "MNCROIHeads",
    "MaskFusionHead",
    "MaskRegressionHead",
    "MaskSupervision",
    "MaskedFeatureClassifier",
    "MultitaskNetworkCascade",
    "Res5BoxHead",
    "RoIWarpPooler",
    "TimmBackbone",
    "UnsharedBackbones",
    "VGG16",
    "vote_masks",
]
