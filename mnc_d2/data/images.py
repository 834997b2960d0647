"""The one reader of image files, for checks, training, evaluation and prediction: what it refuses, it names.

It reads the formats of ``IMAGE_FORMATS``, known by their content, not by their name, and turns images as their EXIF
orientation says. To 8 bits it brings

* grey images of 16 and 32 bits and of floats: linearly, the image's own smallest value to 0 and its largest to 255.
  Cameras of 12 bits leave most of 16 bits unused; a fixed scale would make their images black;
* colour images of 16 bits: the upper 8 bits, as Pillow reads them.

Palettes and CMYK become RGB. Transparency is left out: what counts is the colour that a transparent pixel has.

Refused are other formats, files with several images (animations, stacks of slices), other colour spaces (Lab, ...),
values that are not finite, and more pixels than Pillow's limit, against files that would fill the memory.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

__all__ = ["IMAGE_FORMATS", "IMAGE_SUFFIXES", "ImageError", "open_image", "read_image", "read_image_size"]

IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_METADATA = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageError(OSError):
    """An image file cannot be read or is refused; the message names it and says why."""


@contextlib.contextmanager
def open_image(path: str | os.PathLike, content: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Open an image file with Pillow, to read its header or its pixels.

    Args:
        path: the image file.
        content: what is in it, where it is not on a disk; ``path`` is its name then.

    Raises:
        ImageError: it is refused, it cannot be opened, or what is read of it in the block is broken.
    """
    try:
        opened = PathManager.open(os.fspath(path), "rb") if content is None else contextlib.nullcontext(content)
        with opened as file, warnings.catch_warnings():
            # Twice as many pixels as for the warning are an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                _refuse(image)
                yield image
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(IMAGE_FORMATS)
        raise ImageError(f"Image {path} cannot be read (it is none of {formats}, or it is damaged).") from error
    except Exception as error:  # Pillow's decoders raise all kinds: OSError, SyntaxError, struct.error, KeyError, ...
        raise ImageError(f"Image {path} cannot be read ({str(error) or type(error).__name__}).") from error


def _refuse(image: Image.Image) -> None:
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a JPEG with previews of other sizes
        raise ValueError("it holds several images: save the one that is meant as a file of its own")
    if image.mode not in (*_EIGHT_BIT_MODES, *_DEEP_MODES):
        raise ValueError(f"its colour space {image.mode} is not supported: convert it to RGB")


def image_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 where there is none.

    It is that of the header, before the pixels: to look behind them Pillow would decode a whole PNG.
    """
    if image.format == "TIFF":  # Pillow turns it: its size at once, its pixels when it loads them
        return 1
    if image.format == "PNG" and not image.info.keys() & _PNG_METADATA:
        return 1
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF data do not make the pixels bad
        return 1


def read_image_size(path: str | os.PathLike, content: IO[bytes] | None = None) -> tuple[int, int]:
    """Read (width, height) from the header, as they are in what :func:`read_image` returns.

    Args:
        path, content: as :func:`open_image` takes them.

    Raises:
        ImageError: the header cannot be read, or the image is refused.
    """
    with open_image(path, content) as image:
        return image.size[::-1] if image_orientation(image) in (5, 6, 7, 8) else image.size


def read_image(path: str | os.PathLike, format: str = "RGB", content: IO[bytes] | None = None) -> np.ndarray:
    """Read an image, turned as its EXIF data say, in 8 bits as the module says: uint8 (H, W, 3).

    Args:
        path, content: as :func:`open_image` takes them.
        format: "RGB" or "BGR".

    Raises:
        ImageError: it cannot be read, or it is refused.
    """
    with open_image(path, content) as image:
        orientation = image_orientation(image)
        image.load()
        if image.mode in _DEEP_MODES:
            image = Image.fromarray(_to_eight_bits(np.asarray(image)))
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns of transparency that it would drop
        image = image.convert("RGB")
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        pixels = np.asarray(image)
    return {"RGB": pixels, "BGR": pixels[:, :, ::-1]}[format]


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    return np.round((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
