"""Resizing of images: as Detectron2 does it, for any shape, and by an exact factor, as the released code does."""

from __future__ import annotations

import math

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, which leaves at least one pixel of the short side of images as thin as 1 x 3000."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Return the transform of an image (H, W, ...)."""
        resize = super().get_transform(image)
        if isinstance(resize, T.NoOpTransform):
            return resize
        return T.ResizeTransform(resize.h, resize.w, max(resize.new_h, 1), max(resize.new_w, 1), resize.interp)


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
    """Return the (height, width) of an image that was resized by a factor: rounded, half to even, and 1 at least."""
    height, width = (max(round(x * scale), 1) for x in size)
    return height, width


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
        return self._resize(img.astype(np.float32), cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the nearest labels, in the dtype of ``segmentation`` (H, W)."""
        return self._resize(segmentation, cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return points (N, 2), x and y, in the resized image."""
        return coords * self.scale

    def _resize(self, image: np.ndarray, interpolation: int) -> np.ndarray:
        # Repeat the border of sides too short for one pixel of the result.
        least = math.ceil(0.5 / self.scale) + 1
        missing = [least - x if round(x * self.scale) < 1 else 0 for x in image.shape[:2]]
        if any(missing):
            image = np.pad(image, [(0, x) for x in missing] + [(0, 0)] * (image.ndim - 2), mode="edge")
        return cv2.resize(image, None, fx=self.scale, fy=self.scale, interpolation=interpolation)


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
        """Return the transform of an image (H, W, ...)."""
        return ExactScaleTransform(exact_scale(image.shape[:2], self.short_side, self.long_side))


def build_train_resize(cfg: CfgNode) -> T.Augmentation:
    """Build the resizing of training images that INPUT asks for."""
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)


def build_test_resize(cfg: CfgNode) -> T.Augmentation:
    """Build the resizing of test images that INPUT asks for."""
    short_side, long_side = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if cfg.INPUT.get("EXACT_SCALE_TEST", False):
        return ResizeByExactScale(short_side, long_side)
    return ResizeShortestEdge([short_side, short_side], long_side)
