"""Datasets in COCO format, registered by name from the command line and checked before anything is trained on them."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from PIL import Image
from tqdm import tqdm

__all__ = ["num_classes_from_datasets", "register_coco_dataset"]

logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSED = (5, 6, 7, 8)  # orientations that swap width and height


def register_coco_dataset(name: str, json_file: str, image_root: str, *, check_files: bool = True) -> None:
    """Check a dataset in COCO's instance format and register it with Detectron2.

    Category ids are mapped to 0, 1, ... by ascending id. An instance with a mask and no bbox gets the mask's tight box;
    one with a bbox and no mask is kept for mixed supervision. Crowd annotations are kept, for the evaluator to ignore.

    Beside Detectron2's keys the metadata has `has_all_masks`: whether every annotation has a segmentation, without
    which COCOEvaluator can evaluate boxes only. `json_file` is set only if COCOEvaluator can read the file as it is;
    otherwise (no area, no iscrowd, ...) the evaluator converts the dataset by itself, as it does without `json_file`.

    Args:
        name: the name for cfg.DATASETS.TRAIN and TEST. A second call with the same name and paths does nothing.
        json_file: path of the annotations.
        image_root: folder to which the file names in the annotations are relative.
        check_files: whether to read the header of every image; False where another process has.

    Raises:
        FileNotFoundError: `json_file`, `image_root` or an image is missing.
        ValueError: the annotations are not valid, an image's header cannot be read, or `name` stands for another
            dataset. The message names the file and the ids of the offending records.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    source = (os.path.realpath(json_file), os.path.realpath(image_root))
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("coco_source") == source:
            return
        raise ValueError(f"A dataset named '{name}' is registered already, from other files. Choose another name.")

    dataset = read_coco_file(json_file)
    categories = _check_categories(json_file, dataset["categories"])
    images = check_images(json_file, image_root, dataset["images"], files=check_files)
    annotations = dataset["annotations"]
    _check_annotations(json_file, annotations, images, categories)

    metadata = MetadataCatalog.get(name).set(
        coco_source=source,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[categories[i] for i in sorted(categories)],
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(sorted(categories))},
        has_all_masks=all(anno.get("segmentation") for anno in annotations),
    )
    if all(_is_complete(anno) for anno in annotations):
        metadata.json_file = json_file
    DatasetCatalog.register(name, lambda: _load(name, json_file, image_root))
    logger.info(f"Registered '{name}': {len(images)} images, {len(annotations)} annotations, {len(categories)} classes")


def num_classes_from_datasets(cfg: CfgNode) -> int:
    """Return the number of classes that the model needs: cfg.MODEL.ROI_HEADS.NUM_CLASSES, or, where that is -1, the
    number of classes of the datasets in cfg.DATASETS.TRAIN (of TEST where TRAIN is empty).

    Raises:
        ValueError: a dataset is not registered, datasets differ in their classes, the config's number differs from
            theirs, or neither gives a number.
    """
    names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(
                f"Dataset '{name}' in DATASETS.TRAIN or DATASETS.TEST is not registered. Register a COCO-format "
                f"dataset with --dataset {name} ANNOTATIONS.json IMAGE_ROOT."
            )
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = [name for name in names if classes[name] is not None]
    for name in known[1:]:
        if list(classes[name]) != list(classes[known[0]]):
            raise ValueError(
                f"Datasets '{known[0]}' and '{name}' differ in their classes: {_summary(classes[known[0]])} and "
                f"{_summary(classes[name])}. Datasets of one run need the same classes in the same order."
            )

    given = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if not known:
        if given == -1:
            raise ValueError(
                f"The number of classes is not known from the datasets {names}. Set MODEL.ROI_HEADS.NUM_CLASSES."
            )
        return given
    number = len(classes[known[0]])
    if given not in (-1, number):
        # as_dict() holds plain attributes: asking for the file of an embedded dataset would draw it.
        metadata = MetadataCatalog.get(known[0]).as_dict()
        file = metadata.get("json_file") or metadata.get("coco_source", [known[0]])[0]
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {given}, but {file} has {number} classes. "
            "Set the key to -1 to take the number from the dataset."
        )
    return number


def _summary(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"


def _load(name: str, json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Load the records as Detectron2 does and give each instance a box."""
    records = load_coco_json(json_file, image_root, name)
    for record in records:
        for anno in record["annotations"]:
            if "bbox" not in anno:
                rle = to_rle(anno["segmentation"], record["height"], record["width"])
                anno["bbox"] = mask_util.toBbox(rle).tolist()
    return records


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return polygons or an RLE of either kind as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(valid_polygons(segmentation), height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def _is_complete(anno: dict[str, Any]) -> bool:
    """Whether COCOeval can take the annotation from the file as it is."""
    segmentation = anno.get("segmentation")
    return (
        all(key in anno for key in ("bbox", "area", "iscrowd"))
        and anno["id"] != 0  # COCOeval reads a match with id 0 as no match
        and (not isinstance(segmentation, list) or len(valid_polygons(segmentation)) == len(segmentation))
    )


def _reject(where: str, offenders: Sequence[Any], what: str, advice: str, error: type = ValueError) -> None:
    """Raise `error` if there are offenders, naming the first five of them and their number."""
    if offenders:
        shown = ", ".join(str(offender) for offender in offenders[:5]) + (", ..." if len(offenders) > 5 else "")
        raise error(f"{where}: {what}: {shown} ({len(offenders)} in all). {advice}")


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
        invalid = [i for i in ids if not _is_integer(i) and not (key == "images" and isinstance(i, str))]
        _reject(json_file, invalid, f"{key} with an id that is not an integer", "Give each record an integer id.")
        _reject(json_file, _repeated(ids), f"{key} with the same id", "Make the ids unique.")
    return dataset


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _repeated(ids: Iterable[Any]) -> list[Any]:
    seen, repeated = set(), {}
    for i in ids:
        if i in seen:
            repeated[i] = None
        seen.add(i)
    return list(repeated)


def _check_categories(json_file: str, categories: list[dict[str, Any]]) -> dict[int, str]:
    """Return the names by category id."""
    if not categories:
        raise ValueError(f"{json_file}: 'categories' is empty. List the classes with id and name.")
    unnamed = [category["id"] for category in categories if not isinstance(category.get("name"), str)]
    _reject(json_file, unnamed, "categories without a name", "Give each category a name.")
    return {category["id"]: category["name"] for category in categories}


def check_images(
    json_file: str, image_root: str, images: list[dict[str, Any]], progress: bool = False, files: bool = True
) -> dict[Any, tuple[int, int]]:
    """Check the records of images and the headers of the files; return (height, width) by image id.

    Args:
        json_file: where the records are from, for messages.
        image_root: folder to which the file names are relative.
        images: the records.
        progress: show a progress bar.
        files: whether to look at the files.

    Raises:
        FileNotFoundError, ValueError: images are missing, not readable or of another size; the message names them.
    """
    if not images:
        raise ValueError(f"{json_file}: 'images' is empty. A dataset needs images.")
    invalid = [
        image["id"]
        for image in images
        if not isinstance(image.get("file_name"), str)
        or not all(_is_integer(image.get(key)) and image[key] > 0 for key in ("height", "width"))
    ]
    _reject(json_file, invalid, "images without file_name, height and width", "Complete these records.")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"The image folder {image_root} of {json_file} does not exist. Check the path.")

    missing, unreadable, different = [], [], []
    for image in tqdm(images if files else [], os.path.basename(json_file), unit=" images", disable=not progress):
        path = os.path.join(image_root, image["file_name"])
        size = (image["width"], image["height"])
        if not os.path.isfile(path):
            missing.append(path)
            continue
        try:
            found = _image_size(path, size)
        except (OSError, SyntaxError, ValueError):  # what Pillow raises on broken headers
            unreadable.append(path)
            continue
        if found != size:
            different.append(f"{path} is {found[0]}x{found[1]}, not {size[0]}x{size[1]}")
    check_root = "Check the image folder, to which the file names are relative."
    _reject(json_file, missing, "images that do not exist", check_root, FileNotFoundError)
    _reject(json_file, unreadable, "files that cannot be read as images", "Replace them or remove their records.")
    _reject(json_file, different, "images of another size than annotated", "Correct width and height or the images.")
    return {image["id"]: (image["height"], image["width"]) for image in images}


def _image_size(path: str, expected: tuple[int, int]) -> tuple[int, int]:
    """Read (width, height) from the header, as seen after the rotation that Detectron2 applies on reading."""
    with Image.open(path) as image:
        # The orientation is looked up only where it explains a difference: for PNG this decodes the whole file.
        if image.size != expected and image.size[::-1] == expected:
            if image.getexif().get(EXIF_ORIENTATION) in EXIF_TRANSPOSED:
                return expected
        return image.size


def _check_annotations(
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


def _find_problem(
    anno: dict[str, Any], images: dict[Any, tuple[int, int]], categories: dict[int, str]
) -> Optional[str]:
    """Return what is wrong with an annotation, as the end of "annotations ...", or None."""
    image_id, category_id = anno.get("image_id"), anno.get("category_id")
    if not isinstance(image_id, (int, str)) or image_id not in images:
        return "whose image_id is not among the images"
    if not _is_integer(category_id) or category_id not in categories:
        return "whose category_id is not among the categories"
    if anno.get("ignore", 0):
        return "with 'ignore', which Detectron2 does not support (use iscrowd)"
    segmentation = anno.get("segmentation")
    if "bbox" in anno:
        problem = _find_box_problem(anno["bbox"], *images[image_id])
    else:
        problem = None if segmentation else "with neither segmentation nor bbox"
    if problem is None and segmentation:
        problem = _find_mask_problem(segmentation, *images[image_id])
        if problem is None and "bbox" not in anno and not mask_util.area(to_rle(segmentation, *images[image_id])):
            problem = "without a bbox, with a segmentation that covers no pixel"
    return problem


def _find_box_problem(bbox: Any, height: int, width: int) -> Optional[str]:
    values = _finite_numbers(bbox)
    if values is None or len(values) != 4:
        return "whose bbox is not four finite numbers (x, y, width, height)"
    x, y, w, h = values
    if w <= 0 or h <= 0:
        return "whose bbox has zero or negative width or height"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "whose bbox lies outside the image"
    return None


def _find_mask_problem(segmentation: Any, height: int, width: int) -> Optional[str]:
    if isinstance(segmentation, list):
        if any(_finite_numbers(polygon) is None for polygon in segmentation):
            return "with a polygon that is not a list of finite numbers"
        # COCO has polygons of many parts with a degenerate one among them: Detectron2 leaves such parts out.
        if not valid_polygons(segmentation):
            return "whose polygons all have fewer than three points or an odd number of coordinates"
        return None
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str)):
        return "whose segmentation is neither polygons nor an RLE with size and counts"
    if segmentation.get("size") != [height, width]:
        return "whose RLE size is not (height, width) of the image"
    runs = _run_lengths(segmentation["counts"])
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return "whose RLE counts do not add up to the image"
    if runs[1::2].sum() == 0:
        return "whose RLE covers no pixel"
    return None


def valid_polygons(polygons: list[list[float]]) -> list[list[float]]:
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _finite_numbers(values: Any) -> Optional[np.ndarray]:
    """Return a list of finite numbers as an array, None for anything else."""
    if not isinstance(values, list):
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    array = np.asarray(values, dtype=np.float64)
    return array if np.isfinite(array).all() else None


def _run_lengths(counts: Any) -> Optional[np.ndarray]:
    """Return the run lengths of an RLE, None if it cannot be parsed.

    pycocotools decodes a compressed RLE that is too short into uninitialised memory, so its length is checked here. Its
    code: each number is little-endian groups of 5 bits, one character (from "0") a group, bit 5 set if another follows,
    bit 4 of the last one the sign; from the fourth number on it is the difference to the number two before.
    """
    if isinstance(counts, list):
        return np.asarray(counts, dtype=np.int64) if counts and all(_is_integer(count) for count in counts) else None
    codes = np.frombuffer(counts.encode("utf-8"), dtype=np.uint8).astype(np.int64) - ord("0")
    if codes.size == 0 or codes.min() < 0 or codes.max() > 0x3F or codes[-1] & 0x20:
        return None
    last = np.flatnonzero(codes & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 7:  # no image has runs of more than 2 ** 34 pixels
        return None
    shift = 5 * (np.arange(codes.size) - np.repeat(first, groups))
    runs = np.add.reduceat((codes & 0x1F) << shift, first) - ((codes[last] & 0x10) >> 4 << 5 * groups)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
