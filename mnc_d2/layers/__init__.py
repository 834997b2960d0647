from .border import clip_boxes, image_corners, inside_image
from .device import batch_indices, to_device
from .gradient import clip_gradient, scale_gradient, stop_gradient_except
from .precision import HALF_PRECISIONS, at_least_float32
from .roi_warp import roi_warp, roi_warp_pyramid, roi_warp_pyramid_twice

__all__ = [
    "HALF_PRECISIONS",
    "at_least_float32",
    "batch_indices",
    "clip_boxes",
    "clip_gradient",
    "image_corners",
    "inside_image",
    "roi_warp",
    "roi_warp_pyramid",
    "roi_warp_pyramid_twice",
    "scale_gradient",
    "stop_gradient_except",
    "to_device",
]
