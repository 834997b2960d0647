"""What is checked of a file in COCO's instance format before anything is trained or evaluated on it."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pycocotools.mask as mask_util
from tqdm import tqdm

from ..messages import first_few
from .images import ImageError, read_image_size
from .masks import find_mask_problem, finite_numbers, is_integer, to_rle

__all__ = ["check_annotations", "check_categories", "check_images", "read_coco_file"]


def read_coco_file(json_file: str) -> dict[str, list[dict[str, Any]]]:
    """Read annotations and check their outline: a dict with three lists of dicts that have unique ids.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not valid; the message names it.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"The annotation file {json_file} does not exist. Check the path.")
    try:
        with open(json_file, encoding="utf-8") as file:
            dataset = json.load(file)
    except ValueError as e:  # neither JSON nor UTF-8
        raise ValueError(f"{json_file} is not a JSON file: {e}.") from e
    keys = ("images", "annotations", "categories")
    for key in keys:
        records = dataset.get(key) if isinstance(dataset, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(
                f"{json_file} is not in COCO format: it has no list of records '{key}'. "
                "A dict with the keys images, annotations and categories is needed."
            )
        ids = [record.get("id") for record in records]
        invalid = [i for i in ids if not is_integer(i) and not (key == "images" and isinstance(i, str))]
        _reject(json_file, invalid, f"{key} with an id that is not an integer", "Give each record an integer id.")
        _reject(json_file, _repeated(ids), f"{key} with the same id", "Make the ids unique.")
    return dataset


def check_categories(json_file: str, categories: list[dict[str, Any]]) -> dict[int, str]:
    """Return the names by category id."""
    if not categories:
        raise ValueError(f"{json_file}: 'categories' is empty. List the classes with id and name.")
    unnamed = [category["id"] for category in categories if not isinstance(category.get("name"), str)]
    _reject(json_file, unnamed, "categories without a name", "Give each category a name.")
    return {category["id"]: category["name"] for category in categories}


def check_images(
    json_file: str, image_root: str, images: list[dict[str, Any]], progress: bool = False
) -> dict[Any, tuple[int, int]]:
    """Check the records of images and the headers of the files; return (height, width) by image id.

    Args:
        json_file: where the records are from, for messages.
        image_root: folder to which the file names are relative.
        images: the records.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: images are missing, not readable or of another size; the message names them.
    """
    if not images:
        raise ValueError(f"{json_file}: 'images' is empty. A dataset needs images.")
    invalid = [
        image["id"]
        for image in images
        if not isinstance(image.get("file_name"), str)
        or not all(is_integer(image.get(key)) and image[key] > 0 for key in ("height", "width"))
    ]
    _reject(json_file, invalid, "images without file_name, height and width", "Complete these records.")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"The image folder {image_root} of {json_file} does not exist. Check the path.")

    missing, unreadable, different = [], [], []
    for image in tqdm(images, os.path.basename(json_file), unit=" images", disable=not progress):
        path = os.path.join(image_root, image["file_name"])
        size = (image["width"], image["height"])
        if not os.path.isfile(path):
            missing.append(path)
            continue
        try:
            found = read_image_size(path, size)
        except ImageError:
            unreadable.append(path)
            continue
        if found != size:
            different.append(f"{path} is {found[0]}x{found[1]}, not {size[0]}x{size[1]}")
    check_root = "Check the image folder, to which the file names are relative."
    _reject(json_file, missing, "images that do not exist", check_root, FileNotFoundError)
    _reject(json_file, unreadable, "files that cannot be read as images", "Replace them or remove their records.")
    _reject(json_file, different, "images of another size than annotated", "Correct width and height or the images.")
    return {image["id"]: (image["height"], image["width"]) for image in images}


def check_annotations(
    json_file: str, annotations: list[dict[str, Any]], images: dict[Any, tuple[int, int]], categories: dict[int, str]
) -> None:
    """Raise ValueError for the first kind of problem found, with the ids of all annotations that have it."""
    problems = defaultdict(list)
    for anno in annotations:
        problem = _find_problem(anno, images, categories)
        if problem is not None:
            problems[problem].append(anno["id"])
    for problem, ids in problems.items():
        _reject(json_file, ids, f"annotations {problem}; ids", "Correct or remove them.")


def _find_problem(anno: dict[str, Any], images: dict[Any, tuple[int, int]], categories: dict[int, str]) -> str | None:
    """Return what is wrong with an annotation, as the end of "annotations ...", or None."""
    image_id, category_id = anno.get("image_id"), anno.get("category_id")
    if not isinstance(image_id, (int, str)) or image_id not in images:
        return "whose image_id is not among the images"
    if not is_integer(category_id) or category_id not in categories:
        return "whose category_id is not among the categories"
    if anno.get("ignore", 0):
        return "with 'ignore', which Detectron2 does not support (use iscrowd)"
    segmentation = anno.get("segmentation")
    if "bbox" in anno:
        problem = _find_box_problem(anno["bbox"], *images[image_id])
    else:
        problem = None if segmentation else "with neither segmentation nor bbox"
    if problem is None and segmentation:
        problem = find_mask_problem(segmentation, *images[image_id])
        if problem is None and "bbox" not in anno and not mask_util.area(to_rle(segmentation, *images[image_id])):
            problem = "without a bbox, with a segmentation that covers no pixel"
    return problem


def _find_box_problem(bbox: Any, height: int, width: int) -> str | None:
    values = finite_numbers(bbox)
    if values is None or len(values) != 4:
        return "whose bbox is not four finite numbers (x, y, width, height)"
    x, y, w, h = values
    if w <= 0 or h <= 0:
        return "whose bbox has zero or negative width or height"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "whose bbox lies outside the image"
    return None


def _repeated(ids: Iterable[Any]) -> list[Any]:
    seen, repeated = set(), {}
    for i in ids:
        if i in seen:
            repeated[i] = None
        seen.add(i)
    return list(repeated)


def _reject(where: str, offenders: Sequence[Any], what: str, advice: str, error: type = ValueError) -> None:
    """Raise `error` if there are offenders, naming the first of them and their number."""
    if offenders:
        raise error(f"{where}: {what}: {first_few(offenders)}. {advice}")
