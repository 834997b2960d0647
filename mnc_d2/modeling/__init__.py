from .backbone import VGG16, UnsharedBackbones
from .mask_voting import vote_masks
from .meta_arch import MultitaskNetworkCascade
from .poolers import RoIWarpPooler
from .proposal_generator import CausalRPN
from .roi_heads import CFMROIHeads, MaskRegressionHead, MNCOutputLayers, MNCROIHeads, Res5BoxHead

__all__ = [
    "CFMROIHeads",
    "CausalRPN",
    "MNCOutputLayers",
    "MNCROIHeads",
    "MaskRegressionHead",
    "MultitaskNetworkCascade",
    "Res5BoxHead",
    "RoIWarpPooler",
    "UnsharedBackbones",
    "VGG16",
    "vote_masks",
]
