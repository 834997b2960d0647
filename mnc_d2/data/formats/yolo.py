"""Ultralytics' format: a data.yaml with the names, and a text file of normalised polygons for each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..images import ImageError, read_image_size
from .labels import LabelledDataset, LabelledImage, find_images, read_lines

__all__ = ["find_yaml", "read_yolo"]

SUBSETS = ("train", "val", "test")
TOLERANCE = 0.01  # by which coordinates may lie outside of 0 to 1


def find_yaml(folder: Path) -> Path | None:
    """Return the folder's data.yaml, or its only YAML file, or None."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())
    named = [path for path in found if path.stem == "data"]
    return (named or found if len(named or found) == 1 else [None])[0]


def read_yolo(path: Path, subset: str | None) -> LabelledDataset:
    """Read what a data.yaml names.

    Args:
        path: of data.yaml.
        subset: "train", "val" or "test", as data.yaml has them; None for all of them together.

    Raises:
        ValueError, FileNotFoundError: data.yaml is not valid, or what it names is not there; the message names it.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # neither YAML nor UTF-8; nested too deep
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a file of Ultralytics' format: it has no 'names'.")
    dataset = LabelledDataset(_read_names(path, settings.get("names")))
    subsets = [name for name in SUBSETS if settings.get(name)] if subset is None else [subset]
    if not subsets or any(not settings.get(name) for name in subsets):
        raise ValueError(f"{path} has no '{subset or 'train'}': a folder of images, or a list of such folders.")
    for image in dict.fromkeys(x for name in subsets for x in _find_subset(path, settings, name)):
        _read_image(dataset, image)
    _find_strays(dataset)
    return dataset


def _read_names(path: Path, names: Any) -> list[str]:
    """Return the class names from a list, or from a dict by index."""
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path}: the keys of 'names' are not 0, 1, ... without a gap.")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int)) for name in names):
        raise ValueError(f"{path}: 'names' is not a list of class names, nor a dict of them by index.")
    return [str(name) for name in names]


def _find_subset(path: Path, settings: dict[str, Any], name: str) -> list[Path]:
    """Return the images of a subset: those in folders, or those that a text file lists."""
    roots = [Path(path.parent, str(settings.get("path") or ".")), path.parent]
    images = []
    for entry in settings[name] if isinstance(settings[name], list) else [settings[name]]:
        # Roboflow writes ../train/images for what lies beside data.yaml.
        candidates = [root / part for root in roots for part in (str(entry), str(entry).removeprefix("../"))]
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: '{name}' is {entry}, which does not exist: looked for {candidates[0]}.")
        if found.is_dir():
            in_folder = find_images(found)
            if not in_folder:
                raise FileNotFoundError(f"{path}: '{name}' is {entry}, a folder without an image.")
            images += in_folder
        else:
            images += [found.parent / line for line in read_lines(found) if line]
    return images


def _read_image(dataset: LabelledDataset, path: Path) -> None:
    try:
        width, height = read_image_size(path)
    except ImageError as error:
        dataset.problems.append(str(error).rstrip("."))
        return
    image = LabelledImage(path, (height, width))
    dataset.images.append(image)
    labels = _labels_file(path)
    if not labels.is_file():  # an image without an instance
        return
    for number, line in enumerate(read_lines(labels), start=1):
        if line:
            place = f"{labels}, line {number}"
            try:
                image.add(place, **_read_line(line, image.size, len(dataset.classes)))
            except ValueError as error:
                dataset.problems.append(f"{place}: {error}")


def _find_strays(dataset: LabelledDataset) -> None:
    """Note the label files that are of no image, beside those that are."""
    used = {_labels_file(image.path) for image in dataset.images}
    strays = {path for folder in {path.parent for path in used} for path in folder.glob("*.txt")} - used
    dataset.problems += [f"{path} is of no image" for path in sorted(strays) if path.name != "classes.txt"]


def _labels_file(image: Path) -> Path:
    """Return .../labels/a.txt for .../images/a.jpg."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, image.stem + ".txt")


def _read_line(line: str, size: tuple[int, int], num_classes: int) -> dict[str, Any]:
    """Return category_id and segmentation, or bbox, of "class x1 y1 x2 y2 ..." or of "class x y width height"."""
    first, *rest = line.split()
    if not first.isdecimal() or int(first) >= num_classes:
        raise ValueError(f"the class is {first}, not an integer from 0 to {num_classes - 1}")
    values = np.array([float(x) for x in rest])
    if len(values) < 4 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the class: a polygon has 6 or more, a box has 4")
    if not ((values >= -TOLERANCE) & (values <= 1 + TOLERANCE)).all():
        raise ValueError("coordinates are not between 0 and 1, shares of the image's width and height")
    height, width = size
    values = values * np.resize([width, height], len(values))
    category_id = int(first) + 1
    if len(values) == 4:
        x, y, w, h = values.tolist()
        return {"category_id": category_id, "bbox": [x - w / 2, y - h / 2, w, h]}
    return {"category_id": category_id, "segmentation": [values.tolist()]}
