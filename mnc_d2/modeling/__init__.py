from .backbone import TimmBackbone
from .mask_voting import vote_masks
from .meta_arch import MultitaskNetworkCascade
from .poolers import RoIWarpPooler
from .proposal_generator import CausalRPN
from .roi_heads import MaskRegressionHead, MNCOutputLayers, MNCROIHeads

__all__ = [
    "CausalRPN",
    "MNCOutputLayers",
    "MNCROIHeads",
    "MaskRegressionHead",
    "MultitaskNetworkCascade",
    "RoIWarpPooler",
    "TimmBackbone",
    "vote_masks",
]
