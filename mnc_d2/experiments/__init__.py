"""What only the paper's experiments need: the authors' released network, CFM, and features that tasks do not share.

Importing this package registers its components. It builds on the rest of ``mnc_d2``, which never imports it.
"""

from .caffe import CaffeMultitaskNetworkCascade
from .cfm_roi_heads import CFMROIHeads
from .mask_proposals import MaskProposalMapper, mask_proposals_path, save_mask_proposals
from .paper_roi_heads import PaperMNCROIHeads
from .unshared import UnsharedBackbones, UnsharedMNCROIHeads

__all__ = [
    "CFMROIHeads",
    "CaffeMultitaskNetworkCascade",
    "MaskProposalMapper",
    "PaperMNCROIHeads",
    "UnsharedBackbones",
    "UnsharedMNCROIHeads",
    "mask_proposals_path",
    "save_mask_proposals",
]
