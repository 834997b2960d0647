from .gradient import clip_gradient, inside_image, pass_gradient
from .roi_warp import RoIWarp, roi_warp, roi_warp_pyramid

__all__ = ["RoIWarp", "clip_gradient", "inside_image", "pass_gradient", "roi_warp", "roi_warp_pyramid"]
