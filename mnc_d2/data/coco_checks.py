"""What is checked of a file in COCO's instance format before anything is trained or evaluated on it."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from tqdm import tqdm

from ..messages import first_few
from . import images as image_files
from . import masks
from .checked import CheckedDataset
from .images import ImageError, read_image_size
from .masks import MAX_REACH, NO_PIXEL, find_mask_problem, finite_numbers, is_integer, reaches_far_out

__all__ = ["check_coco_dataset", "check_images", "find_problem", "is_text", "read_coco_file"]

_NO_AREA = "whose bbox has no width or no height"
# What COCO's own files have a few of: nothing to train on, and nothing wrong with the rest.
_EMPTY = (NO_PIXEL, _NO_AREA)
# Whose text says what is checked.
_MODULES = (__file__, image_files.__file__, masks.__file__)


def check_coco_dataset(json_file: str, image_root: str, files: bool = True) -> tuple[dict[str, Any], list[int]]:
    """Read a file in COCO's instance format and check all of it, if it or an image has changed since the last time.

    Args:
        json_file: path of the annotations.
        image_root: folder to which the file names in the annotations are relative.
        files: whether to read the header of every image.

    Returns:
        what is in the file, and the ids of annotations with a mask that covers no pixel or a box without area, which
        cannot be trained on.

    Raises:
        FileNotFoundError: `json_file`, `image_root` or an image is missing.
        ValueError: the annotations are not valid or an image's header cannot be read. The message names the file and
            the ids of the offending records.
    """
    dataset = read_coco_file(json_file)
    names = [image["file_name"] for image in dataset["images"] if is_text(image.get("file_name"))]
    checked = CheckedDataset(json_file, image_root, names, _MODULES)
    empty = checked.recall()
    if empty is None:
        categories = _check_categories(json_file, dataset["categories"])
        images = check_images(json_file, image_root, dataset["images"], files)
        empty = _check_annotations(json_file, dataset["annotations"], images, categories)
        if files:
            checked.remember(empty)
    return dataset, empty


def read_coco_file(json_file: str) -> dict[str, Any]:
    """Read annotations and check their outline: a dict with three lists of dicts that have unique ids.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not valid; the message names it.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"The annotation file {json_file} does not exist. Check the path.")
    try:
        with open(json_file, encoding="utf-8") as file:
            dataset = json.load(file)
    except (ValueError, RecursionError) as e:  # neither JSON nor UTF-8; nested too deep
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
        invalid = [i for i in ids if not _is_id(i) and not (key == "images" and is_text(i))]
        _reject(json_file, invalid, f"{key} with an id that is not an integer", "Give each record an integer id.")
        if len({type(i) for i in ids}) > 1:
            raise ValueError(f"{json_file}: the ids of {key} are integers and strings. Make all of them integers.")
        _reject(json_file, _repeated(ids), f"{key} with the same id", "Make the ids unique.")
    return dataset


def _is_id(value: Any) -> bool:
    return is_integer(value) and -(2**63) <= value < 2**63


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value of a JSON file is a string that can be printed: JSON can hold half a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _check_categories(json_file: str, categories: list[dict[str, Any]]) -> dict[int, str]:
    """Return the names by category id."""
    if not categories:
        raise ValueError(f"{json_file}: 'categories' is empty. List the classes with id and name.")
    unnamed = [category["id"] for category in categories if not is_text(category.get("name"))]
    _reject(json_file, unnamed, "categories without a name", "Give each category a name.")
    return {category["id"]: category["name"] for category in categories}


def check_images(
    json_file: str, image_root: str, images: list[dict[str, Any]], files: bool = True
) -> dict[Any, tuple[int, int]]:
    """Check the records of images and the headers of the files; return (height, width) by image id.

    On a terminal a bar shows the progress.

    Args:
        json_file: where the records are from, for messages.
        image_root: folder to which the file names are relative.
        images: the records.
        files: whether to look at the files.

    Raises:
        FileNotFoundError, ValueError: images are missing, not readable or of another size; the message names them.
    """
    if not images:
        raise ValueError(f"{json_file}: 'images' is empty. A dataset needs images.")
    invalid = [
        image["id"]
        for image in images
        if not is_text(image.get("file_name"))
        or not all(is_integer(image.get(key)) and image[key] > 0 for key in ("height", "width"))
    ]
    _reject(json_file, invalid, "images without file_name, height and width", "Complete these records.")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"The image folder {image_root} of {json_file} does not exist. Check the path.")

    missing, unreadable, different = [], [], []
    for image in tqdm(images if files else [], os.path.basename(json_file), unit=" images", disable=None):
        path = os.path.join(image_root, image["file_name"])
        size = (image["width"], image["height"])
        if not os.path.isfile(path):
            missing.append(path)
            continue
        try:
            found = read_image_size(path)
        except ImageError as error:
            unreadable.append(str(error).rstrip("."))
            continue
        if found != size:
            different.append(f"{path} is {found[0]}x{found[1]}, not {size[0]}x{size[1]}")
    check_root = "Check the image folder, to which the file names are relative."
    _reject(json_file, missing, "images that do not exist", check_root, FileNotFoundError)
    _reject(
        json_file,
        unreadable,
        "files that cannot be read as images",
        "Replace them or remove their records.",
    )
    _reject(json_file, different, "images of another size than annotated", "Correct width and height or the images.")
    return {image["id"]: (image["height"], image["width"]) for image in images}


def _check_annotations(
    json_file: str, annotations: list[dict[str, Any]], images: dict[Any, tuple[int, int]], categories: dict[int, str]
) -> list[int]:
    """Return the ids of annotations that cover no pixel; of those that are wrong, raise ValueError for the first kind.

    On a terminal a bar shows the progress.
    """
    problems = defaultdict(list)
    for anno in tqdm(annotations, os.path.basename(json_file), unit=" annotations", disable=None):
        problem = find_problem(anno, images, categories)
        if problem is not None:
            problems[problem].append(anno["id"])
    empty = {i for problem in _EMPTY for i in problems.pop(problem, ())}
    for problem, ids in problems.items():
        _reject(json_file, ids, f"annotations {problem}; ids", "Correct or remove them.")
    if not any(anno.get("iscrowd", 0) == 0 and anno["id"] not in empty for anno in annotations):
        raise ValueError(
            f"{json_file}: no annotation is usable, as there is none but crowds and such that cover no pixel. "
            "Annotate instances."
        )
    return sorted(empty)


def find_problem(anno: dict[str, Any], images: dict[Any, tuple[int, int]], categories: dict[int, str]) -> str | None:
    """Return what is wrong with an annotation, as the end of "annotations ...", or None."""
    image_id, category_id = anno.get("image_id"), anno.get("category_id")
    if not (is_integer(image_id) or isinstance(image_id, str)) or image_id not in images:
        return "whose image_id is not among the images"
    if not is_integer(category_id) or category_id not in categories:
        return "whose category_id is not among the categories"
    problems = [_find_flag_problem(anno)]
    if "bbox" in anno:
        problems.append(_find_box_problem(anno["bbox"], *images[image_id]))
    if anno.get("segmentation"):
        problems.append(find_mask_problem(anno["segmentation"], *images[image_id]))
    if "bbox" not in anno and not anno.get("segmentation"):
        problems.append("with neither segmentation nor bbox")
    # An annotation that covers no pixel may have worse.
    return min(filter(None, problems), key=lambda x: x in _EMPTY, default=None)


def _find_flag_problem(anno: dict[str, Any]) -> str | None:
    if anno.get("ignore", 0) != 0:
        return "with 'ignore', which Detectron2 does not support (use iscrowd)"
    for key in ("iscrowd", "difficult"):
        if not isinstance(anno.get(key, 0), int) or anno.get(key, 0) not in (0, 1):
            return f"whose {key} is neither 0 nor 1"
    area = finite_numbers([anno.get("area", 0)])
    if area is None or area[0] < 0:
        return "whose area is not a finite number from 0 on"
    if anno.get("keypoints") and finite_numbers(anno["keypoints"]) is None:
        return "whose keypoints are not a list of finite numbers"
    return None


def _find_box_problem(bbox: Any, height: int, width: int) -> str | None:
    values = finite_numbers(bbox)
    if values is None or len(values) != 4:
        return "whose bbox is not four finite numbers (x, y, width, height)"
    x, y, w, h = values
    if w < 0 or h < 0:
        return "whose bbox has negative width or height"
    if w == 0 or h == 0:
        return _NO_AREA
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "whose bbox lies outside the image"
    if reaches_far_out(values, height, width):
        return f"whose bbox reaches more than {MAX_REACH} image sizes out (coordinates are in pixels)"
    return None


def _repeated(ids: Iterable[Any]) -> list[Any]:
    seen: set[Any] = set()
    repeated: dict[Any, None] = {}  # a set in the order of the ids
    for i in ids:
        if i in seen:
            repeated[i] = None
        seen.add(i)
    return list(repeated)


def _reject(where: str, offenders: Sequence[Any], what: str, advice: str, error: type = ValueError) -> None:
    """Raise `error` if there are offenders, naming the first of them and their number."""
    if offenders:
        raise error(f"{where}: {what}: {first_few(offenders)}. {advice}")
