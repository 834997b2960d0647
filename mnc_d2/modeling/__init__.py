from .backbone import VGG16, TimmBackbone
from .causal_gradients import CausalGradients
from .meta_arch import MultitaskNetworkCascade
from .poolers import CascadePooler, RoIWarpPooler
from .proposal_generator import CausalRPN
from .roi_heads import (
    CascadePass,
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
    "CascadePass",
    "CascadePooler",
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
    "VGG16",
    "vote_masks",
]
