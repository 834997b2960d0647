"""Pascal VOC's folders, of VOC's classes or of any others: masks of SegmentationObject and SegmentationClass."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..images import ImageError, read_image_size
from ..prepare.common import encode_masks
from ..prepare.voc import VOID, instance_classes, read_index_map
from ..voc import VOC_CLASSES
from .labels import LabelledDataset, LabelledImage, find_images, read_lines

__all__ = ["FOLDERS", "read_voc"]

FOLDERS = ("JPEGImages", "SegmentationObject", "SegmentationClass")


def read_voc(folder: Path, subset: str | None) -> LabelledDataset:
    """Read a folder with FOLDERS.

    The classes are those of class_names.txt or labels.txt in it, one a line, index 1 first (a line "_background_", for
    index 0, may precede it), and else VOC's twenty.

    Args:
        folder: "VOC2012", for example.
        subset: a list in ImageSets/Segmentation; None for every image that has a file in SegmentationObject.

    Raises:
        FileNotFoundError, ValueError: the list is missing or not a text file; the message names it.
    """
    dataset = LabelledDataset(_read_names(folder))
    if subset is None:
        names = sorted(path.stem for path in (folder / "SegmentationObject").glob("*.png"))
    else:
        names = [line for line in read_lines(folder / "ImageSets" / "Segmentation" / f"{subset}.txt") if line]
    images = {path.stem: path for path in find_images(folder / "JPEGImages")}
    for name in names:
        if name not in images:
            dataset.problems.append(f"{folder / 'JPEGImages'} has no image {name}")
            continue
        try:
            dataset.images.append(_read_image(folder, images[name], dataset.classes))
        except (ImageError, ValueError) as error:
            dataset.problems.append(str(error).rstrip("."))
    return dataset


def _read_names(folder: Path) -> list[str]:
    for path in (folder / "class_names.txt", folder / "labels.txt"):
        if path.is_file():
            return [line for line in read_lines(path) if line and line not in ("__ignore__", "_background_")]
    return list(VOC_CLASSES)


def _read_image(folder: Path, path: Path, classes: list[str]) -> LabelledImage:
    width, height = read_image_size(path)
    image = LabelledImage(path, (height, width))
    object_file, class_file = (folder / kind / f"{path.stem}.png" for kind in FOLDERS[1:])
    instance_map, class_map = read_index_map(object_file), read_index_map(class_file)
    for file, index_map in ((object_file, instance_map), (class_file, class_map)):
        if index_map.shape != image.size:
            raise ValueError(f"{file} is {index_map.shape[1]}x{index_map.shape[0]}, but {path} is {width}x{height}")
    ids = [int(i) for i in np.unique(instance_map) if i not in (0, VOID)]
    categories, _ = instance_classes(instance_map, class_map, ids)
    for i, category_id, encoded in zip(ids, categories, encode_masks(instance_map, ids)):
        if not 1 <= category_id <= len(classes):
            raise ValueError(
                f"{object_file}, instance {i}: its class in {class_file} is {category_id}, of which there "
                f"are 1 to {len(classes)}"
            )
        image.add(f"{object_file}, instance {i}", category_id=category_id, segmentation=encoded["segmentation"])
    return image
