"""Labelme's format: a JSON file with the shapes beside each image."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ..coco_checks import is_text
from ..images import read_image_size
from ..masks import find_mask_problem, finite_numbers, to_rle
from .labels import LabelledDataset, LabelledImage, read_lines

__all__ = ["is_labelme", "read_labelme"]

NO_CLASSES = ("__ignore__", "_background_")  # labels that labelme's own exports leave out
CIRCLE_POINTS = 64


def is_labelme(path: Path) -> bool:
    """Whether a JSON file is one of labelme's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def read_labelme(folder: Path) -> LabelledDataset:
    """Read all JSON files under a folder.

    The classes are labels.txt's, if there is one, in its order, and else all labels, sorted.
    """
    dataset = LabelledDataset([])
    shapes_of = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            image, shapes_of[path] = _read_file(path)
            dataset.images.append(image)
        except (ValueError, RecursionError) as error:
            dataset.problems.append(f"{path}: {error}")
        except OSError as error:  # of the image, which its message names
            dataset.problems.append(f"{path}: {str(error).rstrip('.')}")
    names = folder / "labels.txt"
    if names.is_file():
        dataset.classes = [line for line in read_lines(names) if line and line not in NO_CLASSES]
    else:
        dataset.classes = sorted({shape["label"] for shapes in shapes_of.values() for shape in shapes})
    for (path, shapes), image in zip(shapes_of.items(), dataset.images):
        _add_instances(dataset, image, path, shapes)
    return dataset


def _read_file(path: Path) -> tuple[LabelledImage, list[dict[str, Any]]]:
    """Return the image and the shapes that are of a class, each with its number as "place"."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError("it is not a file of labelme: it has no list 'shapes'")
    name = content.get("imagePath")
    if not is_text(name):
        raise ValueError("'imagePath' is not the name of an image")
    # Written on Windows, it has backslashes.
    image_path = path.parent / PureWindowsPath(name).as_posix()
    if not image_path.is_file():
        raise ValueError(f"its image {image_path} does not exist")
    width, height = read_image_size(image_path)
    claimed = content.get("imageWidth") or width, content.get("imageHeight") or height
    if claimed != (width, height):
        raise ValueError(f"it says {claimed[0]}x{claimed[1]}, but its image is {width}x{height}")
    shapes = []
    for number, shape in enumerate(content["shapes"], start=1):
        if not isinstance(shape, dict) or not is_text(shape.get("label")):
            raise ValueError(f"shape {number} has no label")
        if shape["label"] not in NO_CLASSES:
            shapes.append({**shape, "place": f"{path}, shape {number} ({shape['label']})"})
    return LabelledImage(image_path, (height, width)), shapes


def _add_instances(dataset: LabelledDataset, image: LabelledImage, path: Path, shapes: list[dict[str, Any]]) -> None:
    """Add the instances: shapes of one label and one group_id are parts of the same one."""
    instances: dict[Any, list[dict[str, Any]]] = {}
    for i, shape in enumerate(shapes):
        group = shape.get("group_id")
        instances.setdefault((shape["label"], i if group is None else f"group {group}"), []).append(shape)
    for (label, _), parts in instances.items():
        place = parts[0]["place"]
        if label not in dataset.classes:
            dataset.problems.append(f"{place}: the label is not in {path.parent / 'labels.txt'}")
            continue
        try:
            segmentations = [_segmentation(shape, image.size) for shape in parts]
        except (ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:  # but the first: of a mask
            dataset.problems.append(f"{place}: {error}")
            continue
        category_id = dataset.classes.index(label) + 1
        if all(isinstance(segmentation, list) for segmentation in segmentations):
            polygons = [polygon for segmentation in segmentations for polygon in segmentation]
            image.add(place, category_id=category_id, segmentation=polygons)
        else:
            merged = mask_util.merge([to_rle(segmentation, *image.size) for segmentation in segmentations])
            merged = {"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")}
            image.add(place, category_id=category_id, segmentation=merged)


def _segmentation(shape: dict[str, Any], size: tuple[int, int]) -> Any:
    """Return a shape as polygons or as RLE that are valid."""
    kind, points = str(shape.get("shape_type", "polygon")), shape.get("points")
    if not isinstance(points, list) or any(x is None or len(x) != 2 for x in map(finite_numbers, points)):
        raise ValueError("'points' is not a list of pairs of finite numbers")
    if kind not in ("polygon", *_KINDS):
        raise ValueError(f"a {kind} has no area: draw a polygon, a rectangle, a circle or a mask")
    if kind != "polygon" and len(points) != 2:
        raise ValueError(f"a {kind} has two points, not {len(points)}")
    segmentation = [[x for point in points for x in point]] if kind == "polygon" else _KINDS[kind](shape, size)
    problem = find_mask_problem(segmentation, *size)
    if problem:
        raise ValueError(f"a {kind} {problem}")
    return segmentation


def _rectangle(shape: dict[str, Any], size: tuple[int, int]) -> list[list[float]]:
    (x0, y0), (x1, y1) = shape["points"]
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _circle(shape: dict[str, Any], size: tuple[int, int]) -> list[list[float]]:
    """The points are the centre and one of the outline."""
    (x, y), edge = shape["points"]
    radius = math.dist((x, y), edge)
    angles = np.arange(CIRCLE_POINTS) * 2 * np.pi / CIRCLE_POINTS
    return [np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).ravel().tolist()]


def _mask(shape: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The mask is a PNG in base64, put with its corner at the first point."""
    data = base64.b64decode(str(shape.get("mask")), validate=True)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("L")) > 0
    x, y = (round(value) for value in shape["points"][0])
    canvas = np.zeros(size, dtype=np.uint8)
    if x < 0 or y < 0 or y + pixels.shape[0] > size[0] or x + pixels.shape[1] > size[1]:
        raise ValueError("a mask reaches out of the image")
    canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    rle = mask_util.encode(np.asfortranarray(canvas))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


_KINDS = {"rectangle": _rectangle, "circle": _circle, "mask": _mask}
