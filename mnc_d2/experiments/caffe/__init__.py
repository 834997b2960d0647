"""The conventions of the authors' released Caffe network, as components that a config selects. Inference only.

Boxes between these components have inclusive corners: x2, y2 are the coordinates of the last pixel, so that a box is
x2 - x1 + 1 wide. Results have exclusive ones, as all of Detectron2.
"""

from .boxes import InclusiveBoxTransform
from .meta_arch import CaffeMultitaskNetworkCascade, build_caffe_vgg_backbone
from .proposal_generator import CaffeAnchorGenerator, CaffeRPN
from .roi_heads import CaffeMNCROIHeads

__all__ = [
    "CaffeAnchorGenerator",
    "CaffeMNCROIHeads",
    "CaffeMultitaskNetworkCascade",
    "CaffeRPN",
    "InclusiveBoxTransform",
    "build_caffe_vgg_backbone",
]
