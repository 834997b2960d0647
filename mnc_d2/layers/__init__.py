from .bag_max import BagMaxMemory
from .border import clip_boxes, image_corners, inside_image
from .convolution import FusedConv2d
from .device import batch_indices, is_exporting, tensor_on
from .gradient import channels_last_gradient, clip_gradient, scale_gradient, stop_gradient_except
from .linear import Linear, LinearOfMaps
from .pooling import max_pool, max_pool_images
from .precision import HALF_PRECISIONS, HalfPrecisionWeights, at_least_float32
from .roi_warp import roi_warp, roi_warp_pyramid, roi_warp_pyramid_twice

__all__ = [
    "BagMaxMemory",
    "FusedConv2d",
    "HALF_PRECISIONS",
    "HalfPrecisionWeights",
    "Linear",
    "LinearOfMaps",
    "at_least_float32",
    "channels_last_gradient",
    "clip_boxes",
    "clip_gradient",
    "image_corners",
    "batch_indices",
    "inside_image",
    "is_exporting",
    "max_pool",
    "max_pool_images",
    "stop_gradient_except",
    "roi_warp",
    "roi_warp_pyramid",
    "roi_warp_pyramid_twice",
    "scale_gradient",
    "tensor_on",
]
