"""Resizing of test images as the released code does it."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T


def exact_scale(size: tuple[int, int], short_side: int, long_side: int) -> float:
    """Return the factor that brings the short side of an image to ``short_side`` pixels.

    It is smaller where the long side, in whole pixels, would else be longer than ``long_side``.

    Args:
        size: (height, width) of the image.
        short_side, long_side: in pixels.
    """
    scale = short_side / min(size)
    return long_side / max(size) if round(scale * max(size)) > long_side else scale


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the (height, width) that an image has after it was resized by a factor: rounded, half to even."""
    height, width = size
    return round(height * scale), round(width * scale)


class ExactScaleTransform(T.Transform):
    """Bilinear resizing by one factor along both axes.

    Where the size of the output is rounded, the samples still lie as the factor says: resizing to that size moves them
    by up to half a pixel at the far border.
    """

    def __init__(self, scale: float) -> None:
        """
        Args:
            scale: the factor.
        """
        super().__init__()
        self._set_attributes({"scale": scale})

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return float32 (H', W', ...), not rounded to whole grey levels, for an image (H, W, ...) of any dtype."""
        return cv2.resize(img.astype(np.float32), None, fx=self.scale, fy=self.scale, interpolation=cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the nearest labels, in the dtype of ``segmentation`` (H, W)."""
        return cv2.resize(segmentation, None, fx=self.scale, fy=self.scale, interpolation=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return points (N, 2), x and y, in the resized image."""
        return coords * self.scale


class ResizeByExactScale(T.Augmentation):
    """Resize an image by :func:`exact_scale`, with :class:`ExactScaleTransform`."""

    def __init__(self, short_side: int, long_side: int) -> None:
        """
        Args:
            short_side, long_side: in pixels.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> ExactScaleTransform:
        """Return the transform of an image (H, W, ...).

        Raises:
            ValueError: nothing would be left of its short side.
        """
        size = image.shape[:2]
        scale = exact_scale(size, self.short_side, self.long_side)
        if min(scaled_size(size, scale)) < 1:
            raise ValueError(f"An image of {size[1]} x {size[0]} pixels is too thin to be resized by {scale:.3g}.")
        return ExactScaleTransform(scale)


def build_test_resize(cfg: CfgNode) -> T.Augmentation:
    """Build the resizing of test images that INPUT asks for."""
    short_side, long_side = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if cfg.INPUT.EXACT_SCALE_TEST:
        return ResizeByExactScale(short_side, long_side)
    return T.ResizeShortestEdge([short_side, short_side], long_side)
