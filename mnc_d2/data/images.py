"""The one reader of image files: what Pillow raises on broken ones becomes an error that names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from detectron2.data.detection_utils import read_image as read_with_detectron2
from PIL import Image

__all__ = ["ImageError", "image_orientation", "open_image", "read_image", "read_image_size"]

EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSED = (5, 6, 7, 8)  # orientations that swap width and height


class ImageError(OSError):
    """An image file cannot be read; the message names it."""


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken PNG chunk
        raise ImageError(f"Image {path} cannot be read ({error}).") from error


@contextlib.contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image file with Pillow, to read its header or its pixels.

    Raises:
        ImageError: it cannot be opened, or what is read of it is broken.
    """
    with _named(path), Image.open(path) as image:
        yield image


def image_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none. For PNG this decodes the whole file."""
    return image.getexif().get(EXIF_ORIENTATION, 1)


def read_image_size(path: str | os.PathLike, expected: tuple[int, int]) -> tuple[int, int]:
    """Read (width, height) from the header, as seen after the rotation that :func:`read_image` applies.

    Args:
        path: the image file.
        expected: what is compared with it: the orientation is looked up only where that explains a difference.

    Raises:
        ImageError: the header cannot be read.
    """
    with open_image(path) as image:
        if image.size != expected and image.size[::-1] == expected and image_orientation(image) in EXIF_TRANSPOSED:
            return expected
        return image.size


def read_image(path: str | os.PathLike, format: str = "RGB") -> np.ndarray:
    """Read an image, turned as its EXIF data say: uint8 (H, W, 3), "RGB" or "BGR".

    Raises:
        ImageError: it cannot be read.
    """
    with _named(path):
        return read_with_detectron2(path, format=format)
