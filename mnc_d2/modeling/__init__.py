from .backbone import VGG16, TimmBackbone, UnsharedBackbones
from .caffe import CaffeMultitaskNetworkCascade
from .causal_gradients import CausalGradients
from .mask_voting import vote_masks
from .meta_arch import MultitaskNetworkCascade
from .poolers import RoIWarpPooler
from .proposal_generator import CausalRPN
from .roi_heads import CFMROIHeads, MaskRegressionHead, MNCOutputLayers, MNCROIHeads, Res5BoxHead

__all__ = [
    "CFMROIHeads",
    "CaffeMultitaskNetworkCascade",
    "CausalGradients",
    "CausalRPN",
    "MNCOutputLayers",
    "MNCROIHeads",
    "MaskRegressionHead",
    "MultitaskNetworkCascade",
    "Res5BoxHead",
    "RoIWarpPooler",
    "TimmBackbone",
    "UnsharedBackbones",
    "VGG16",
    "vote_masks",
]
