"""The drawing of `shapes`: a few discs, rectangles, triangles, rings and crosses on a textured background.

They are turned, of varied scale and contrast, hide one another in part, and are hidden in part by bars that are not
labelled; strokes and specks are clutter. Colour and texture are drawn alike for every class, so only the form tells the
classes apart.

It needs numpy and Pillow only, and every image has a random generator of its own, so that image ``i`` of a seed is the
same whatever else is drawn and by whichever process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

__all__ = ["DRAWING_VERSION", "SHAPES_CLASSES", "ShapesSpec", "draw_image"]

SHAPES_CLASSES = ("disc", "rectangle", "triangle", "ring", "cross")

# A part of the cache folder's name. Raise it with every change of what is drawn, so that old caches are left alone.
DRAWING_VERSION = 1


DIAMETERS = (20.0, 56.0)  # pixels, drawn uniformly in the logarithm
INSTANCES = (4, 9)  # wanted in one image; fewer where no more fit
MIN_VISIBLE = 0.4  # share of its pixels that an instance keeps whatever is put over it
MIN_PIXELS = 40


@dataclass(frozen=True)
class ShapesSpec:
    """What to draw. Two specs that differ have different folders.

    Attributes:
        split: a word for the folder's name; it does not change what is drawn.
        num_images: number of images, at least 1.
        seed: seed of the drawing, at least 0. Splits that must not share images need different seeds.
        image_size: (height, width) in pixels.
    """

    split: str
    num_images: int
    seed: int
    image_size: tuple[int, int] = (128, 128)

    @property
    def folder(self) -> str:
        """Name of the cache folder."""
        height, width = self.image_size
        return f"shapes_v{DRAWING_VERSION}_{self.split}_n{self.num_images}_{height}x{width}_seed{self.seed}"


def draw_image(spec: ShapesSpec, index: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw image number `index` of a dataset.

    Returns:
        The image, uint8 RGB of shape (H, W, 3), and for each instance, from back to front, its class (index into
        SHAPES_CLASSES) and the mask of its visible pixels, bool of shape (H, W).
    """
    rng = np.random.default_rng([spec.seed, index])
    canvas = _background(rng, spec.image_size)
    for _ in range(rng.integers(2, 7)):
        _paint(canvas, _stroke(rng, spec.image_size), rng)

    labels: list[int] = []
    masks: list[np.ndarray] = []  # visible pixels
    areas: list[int] = []  # pixels before anything was put over them
    wanted = rng.integers(INSTANCES[0], INSTANCES[1] + 1)
    for _ in range(4 * INSTANCES[1]):
        if len(labels) == wanted:
            break
        is_bar = rng.random() < 0.1
        label = int(rng.integers(len(SHAPES_CLASSES)))
        form = _bar(rng, spec.image_size) if is_bar else _shape(rng, spec.image_size, SHAPES_CLASSES[label])
        inside = np.zeros(spec.image_size, dtype=bool)
        inside[form.window] = form.distance < 0
        left = [mask & ~inside for mask in masks]
        if any(mask.sum() < max(MIN_PIXELS, MIN_VISIBLE * area) for mask, area in zip(left, areas)):
            continue
        if not is_bar:
            if inside.sum() < MIN_PIXELS:
                continue
            labels.append(label)
            areas.append(int(inside.sum()))
            left.append(inside)
        masks = left
        _paint(canvas, form, rng)

    blur = ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.8)))
    image = np.asarray(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(blur), dtype=np.float32)
    image = image + float(rng.uniform(1.0, 6.0)) * rng.standard_normal(image.shape, dtype=np.float32)
    return image.clip(0, 255).astype(np.uint8), list(zip(labels, masks))


class _Form(NamedTuple):
    """A form to paint: signed distance in pixels to its outline, negative inside, on a window of the image."""

    window: tuple[slice, slice]  # rows, columns
    distance: np.ndarray  # (h, w) of the window, float


def _local_grid(
    size: tuple[int, int], center: tuple[float, float], reach: float, angle: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Return the window of the image within `reach` of `center` (x, y), and the x and y of its pixel centres, each
    (h, w), in a frame turned by `angle` about `center`."""
    (height, width), (x, y) = size, center
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 1, height))
    columns = slice(max(int(x - reach), 0), min(int(x + reach) + 1, width))
    dy = np.arange(rows.start, rows.stop)[:, None] + 0.5 - y
    dx = np.arange(columns.start, columns.stop) + 0.5 - x
    cos, sin = np.cos(angle), np.sin(angle)
    return (rows, columns), cos * dx + sin * dy, cos * dy - sin * dx


def _shape(rng: np.random.Generator, size: tuple[int, int], name: str) -> _Form:
    """Draw at random where, how large and how turned an instance of the class `name` is."""
    height, width = size
    radius = 0.5 * np.exp(rng.uniform(*np.log(DIAMETERS)))
    # The image's border cuts off less than half of a form.
    center = rng.uniform(0.5 * radius, width - 0.5 * radius), rng.uniform(0.5 * radius, height - 0.5 * radius)
    window, x, y = _local_grid(size, center, radius + 3, rng.uniform(0, 2 * np.pi))
    x = x / radius
    y = y / radius * rng.uniform(1.0, 1.35)  # the box's aspect does not tell the class
    if name == "disc":
        distance = np.hypot(x, y) - 0.95
    elif name == "ring":
        distance = np.abs(np.hypot(x, y) - 0.725) - 0.225
    else:
        distance = _polygon_distance(x, y, _corners(name))
    return _Form(window, distance * radius)


def _corners(name: str) -> np.ndarray:
    """Corners of a polygonal class within the unit circle: (K, 2)."""
    if name == "cross":
        arm, end = 0.3, 0.95
        quarter = np.array([[end, -arm], [end, arm], [arm, arm]])
        turn = np.array([[0, 1], [-1, 0]])  # row vectors, by 90 degrees
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])
    radii, count = {"rectangle": ([1.0], 4), "triangle": ([1.0], 3)}[name]
    angles = (np.arange(count) + 0.5) * 2 * np.pi / count  # the half turns a square's sides along the axes
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of the points `x`, `y` (h, w) to the outline of the polygon `corners` (K, 2): (h, w)."""
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        distance = np.minimum(distance, _segment_distance(x, y, start, end))
        # Even-odd rule: count the edges that a ray towards larger x crosses.
        crosses = (y < start[1]) != (y < end[1])
        slope = (end[0] - start[0]) / (end[1] - start[1] or 1.0)
        inside ^= crosses & (x < start[0] + slope * (y - start[1]))
    return np.where(inside, -distance, distance)


def _segment_distance(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of the points `x`, `y` (h, w) to the segment from `start` to `end`, each (x, y): (h, w)."""
    along = end - start
    share = (((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along)).clip(0, 1)
    return np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])


def _stroke(rng: np.random.Generator, size: tuple[int, int]) -> _Form:
    """Clutter behind the instances: a thin stroke or a speck."""
    half = rng.uniform(8, 50) if rng.random() < 0.5 else 0.5
    thickness = rng.uniform(0.6, 2.0) if half > 1 else rng.uniform(1.0, 4.0)
    center = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    window, x, y = _local_grid(size, center, half + thickness + 3, rng.uniform(0, np.pi))
    return _Form(window, _segment_distance(x, y, np.array([-half, 0.0]), np.array([half, 0.0])) - thickness)


def _bar(rng: np.random.Generator, size: tuple[int, int]) -> _Form:
    """An unlabelled bar that hides a part of what it crosses."""
    half_length, half_width = rng.uniform(25, 80), rng.uniform(1.5, 4.0)
    center = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    window, x, y = _local_grid(size, center, half_length + 6, rng.uniform(0, np.pi))
    return _Form(window, np.maximum(np.abs(x) - half_length, np.abs(y) - half_width))


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A random colour with soft patches, coarse and fine: (H, W, 3) float32, about 0 to 255."""
    height, width = size
    canvas = np.broadcast_to(rng.uniform(70, 185) + rng.uniform(-30, 30, 3), (height, width, 3)).astype(np.float32)
    for cell in (64, 12):
        # Half of each patch is common to the three channels: lighter and darker rather than coloured.
        grid = (height // cell + 2, width // cell + 2)
        patches = (rng.normal(size=(*grid, 1)) + rng.normal(size=(*grid, 3))) * rng.uniform(1, 8)
        for channel in range(3):
            patch = Image.fromarray(patches[..., channel].astype(np.float32))
            canvas[..., channel] += np.asarray(patch.resize((width, height), Image.Resampling.BICUBIC))
    return canvas


def _paint(canvas: np.ndarray, form: _Form, rng: np.random.Generator) -> None:
    """Paint `form` on `canvas` (H, W, 3) in place, in a colour that stands out from what lies under it, with a soft
    edge and, sometimes, stripes or a gradient."""
    target = canvas[form.window]
    inside = form.distance < 0
    if not inside.any():
        return
    under = target[inside].mean(axis=0)
    contrast = rng.uniform(70, 190)
    colours = rng.uniform(0, 255, (32, 3))
    colour = colours[np.abs(np.linalg.norm(colours - under, axis=1) - contrast).argmin()]

    softness = rng.uniform(1.0, 2.5)
    rows, columns = np.nonzero(form.distance < 0.5 * softness)  # the P pixels that change
    cover = (0.5 - form.distance[rows, columns] / softness).clip(0, 1)
    angle, wavelength, start = rng.uniform(0, 2 * np.pi), rng.uniform(4, 60), rng.uniform(0, 2 * np.pi)
    phase = (np.cos(angle) * columns + np.sin(angle) * rows) * 2 * np.pi / wavelength + start
    fill = colour + rng.uniform(0, 0.25) * contrast * np.sin(phase)[:, None]  # (P, 3)
    target[rows, columns] += cover[:, None] * (fill - target[rows, columns])
