"""Images that are wrong: damaged, of other formats and kinds, or other than their header says."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnc_d2.data.images import read_image, read_image_size

from .common import Case, flip_bit

FAMILY = "images"
H, W = 6, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
DEEP = (np.arange(H * W).reshape(H, W) * 1000).astype(np.uint16)
STRETCHED = np.repeat(np.round(np.arange(H * W).reshape(H, W, 1) * 255 / (H * W - 1)), 3, 2).astype(np.uint8)


def encoded(format: str, pixels: Any = PIXELS, **kwargs: Any) -> bytes:
    """Return an image file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, body: bytes = b"") -> bytes:
    """Return a PNG file by its header, with a body that may be too short for it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _image(mode: str) -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


def _several(format: str) -> bytes:
    others = [Image.fromarray(255 - PIXELS)]
    return encoded(format, save_all=True, append_images=others, **({"lossless": True} if format == "WEBP" else {}))


def _oriented(orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("PNG", exif=exif.tobytes())


BAD: dict[str, bytes] = {
    "empty": b"",
    "text": b"words",
    "zeros": bytes(500),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n(code) run\n",
    "PDF": b"%PDF-1.4\n",
    "GIF": encoded("GIF"),
    "animated GIF": _several("GIF"),
    "JPEG 2000": encoded("JPEG2000"),
    "ICO": encoded("ICO", Image.new("RGB", (16, 16))),
    "TGA": encoded("TGA"),
    "animated PNG": _several("PNG"),
    "animated WebP": _several("WEBP"),
    "a stack of TIFFs": _several("TIFF"),
    "Lab": encoded("TIFF", Image.new("LAB", (W, H))),
    **{f"floats with {x}": encoded("TIFF", np.full((H, W), x, np.float32)) for x in (np.nan, np.inf, -np.inf)},
    "PNG of a billion pixels": png(40000, 40000),
    "PNG of 2^31 columns": png(2**31 - 1, 2**31 - 1),
    "PNG of no column": png(0, 6),
    "PNG of no row": png(8, 0),
    "PNG without pixels": png(8, 6),
    "PNG of an unknown colour": png(8, 6, colour=5, body=bytes(150)),
    "PNG of an unknown depth": png(8, 6, depth=7, body=bytes(150)),
    "PNG of its signature": b"\x89PNG\r\n\x1a\n",
    "PPM without pixels": b"P6 8 6 255\n",
    "PPM of a billion pixels": b"P6 40000 40000 255\n" + bytes(100),
    "PPM of negative size": b"P6 -8 6 255\n" + bytes(200),
    "PPM of depth 0": b"P6 8 6 0\n" + bytes(200),
    "PPM of words": b"P6 a b c\n",
    "BMP of its signature": b"BM",
    "BMP of a billion pixels": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40000, 40000, 1, 24, 0, 0, 0, 0, 0, 0),
    "TIFF of its signature": b"II*\0",
    "TIFF whose directory is itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "JPEG of its signature": b"\xff\xd8\xff",
    "WebP of its signature": b"RIFF\x04\0\0\0WEBP",
    "a folder": b"FOLDER",
    "a missing file": b"MISSING",
}
# Unusual, and what they are read as; None for whatever a decoder makes of it.
UNUSUAL: dict[str, tuple[bytes, np.ndarray | None]] = {
    "another suffix": (encoded("BMP"), PIXELS),
    "16 bits, grey": (encoded("PNG", DEEP), STRETCHED),
    "16 bits, TIFF": (encoded("TIFF", DEEP), STRETCHED),
    "32 bits, TIFF": (encoded("TIFF", DEEP.astype(np.int32)), STRETCHED),
    "floats": (encoded("TIFF", DEEP.astype(np.float32)), STRETCHED),
    "floats, all the same": (encoded("TIFF", np.full((H, W), 7, np.float32)), np.zeros_like(PIXELS)),
    "huge floats": (encoded("TIFF", DEEP.astype(np.float32) * 1e30), STRETCHED),
    "tiny floats": (encoded("TIFF", DEEP.astype(np.float32) * 1e-30), STRETCHED),
    "transparent": (encoded("PNG", np.dstack([PIXELS, np.zeros((H, W), np.uint8)])), PIXELS),
    "CMYK": (encoded("TIFF", _image("CMYK")), np.asarray(_image("CMYK").convert("RGB"))),
    "palette": (encoded("PNG", _image("P")), np.asarray(_image("P").convert("RGB"))),
    "black and white": (encoded("PNG", _image("1")), np.asarray(_image("1").convert("RGB"))),
    "grey and transparent": (encoded("PNG", _image("LA")), np.asarray(_image("L").convert("RGB"))),
    "half of the pixels, well packed": (png(8, 6, body=bytes(75)), None),  # Pillow makes the rest black
    "YCbCr": (encoded("TIFF", _image("YCbCr")), None),
    "a tail": (encoded("PNG") + bytes(1000), PIXELS),
    "a broken EXIF block": (encoded("PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), PIXELS),
    **{f"orientation {x}": (_oriented(x), PIXELS) for x in (0, 1, 9, 65535)},
    "orientation 6": (_oriented(6), np.rot90(PIXELS, -1)),
    "orientation 3": (_oriented(3), PIXELS[::-1, ::-1]),
}
KINDS: dict[str, Callable[[], bytes]] = {
    x: (lambda format=x: encoded(format)) for x in ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
}


def _read(folder: Path, content: bytes, expected: np.ndarray | None = None) -> str | None:
    path = folder / "i.png"
    if content == b"FOLDER":
        path.mkdir()
    elif content != b"MISSING":
        path.write_bytes(content)
    size = read_image_size(path)
    image = read_image(path)
    if image.dtype != np.uint8 or image.shape != (size[1], size[0], 3):
        return f"an array of {image.dtype} and shape {image.shape}, for a header of {size}"
    return None if expected is None or np.array_equal(image, expected) else "other pixels"


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family; ``seed`` draws places of bits that are flipped and of cuts."""
    cases = [Case(FAMILY, n, lambda d, c=c: _read(d, c), ("i.png",)) for n, c in BAD.items()]
    cases += [Case(FAMILY, n, lambda d, x=x: _read(d, *x), ("i.png",), False) for n, x in UNUSUAL.items()]
    generator = random.Random(seed)
    for kind, make in KINDS.items():
        content = make()
        for length in (generator.randrange(1, len(content) - 20) for _ in range(5)):
            cases.append(
                Case(FAMILY, f"{kind} cut to {length}", lambda d, c=content[:length]: _read(d, c), ("i.png",), False)
            )
        for position in (generator.randrange(8 * len(content)) for _ in range(10)):
            flipped = flip_bit(content, position)
            # A decoder of a format without check sums cannot know.
            expected = PIXELS if kind == "PNG" else None
            run = partial(_read, content=flipped, expected=expected)
            cases.append(Case(FAMILY, f"{kind} with bit {position} flipped", run, ("i.png",), False))
    return cases
