"""Datasets in COCO format, registered by name from the command line and checked before anything is trained on them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.utils.logger import log_first_n

from ..messages import first_few
from .coco_checks import check_coco_dataset
from .masks import to_rle, valid_polygons

__all__ = ["num_classes_from_datasets", "register_coco_dataset"]

logger = logging.getLogger(__name__)


def register_coco_dataset(name: str, json_file: str, image_root: str, *, check_files: bool = True) -> None:
    """Check a dataset in COCO's instance format and register it with Detectron2.

    Category ids are mapped to 0, 1, ... by ascending id. An instance with a mask and no bbox gets the mask's tight box;
    one with a bbox and no mask is kept for mixed supervision. Crowd annotations are kept, for the evaluator to ignore.
    Annotations whose mask covers no pixel, or whose box has no area, are left out of training, with a warning, and stay
    in the evaluation.

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

    dataset, empty = check_coco_dataset(json_file, image_root, files=check_files)
    annotations = dataset["annotations"]
    categories = {category["id"]: category["name"] for category in dataset["categories"]}
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
    DatasetCatalog.register(name, lambda: _load(name, json_file, image_root, empty))
    logger.info(
        f"Registered '{name}': {len(dataset['images'])} images, {len(annotations)} annotations, "
        f"{len(categories)} classes"
    )


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
        metadata = MetadataCatalog.get(known[0])
        file = metadata.get("json_file") or metadata.get("coco_source", [known[0]])[0]
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {given}, but {file} has {number} classes. "
            "Set the key to -1 to take the number from the dataset."
        )
    return number


def _summary(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({first_few(classes)})"


def _load(name: str, json_file: str, image_root: str, empty: list[int]) -> list[dict[str, Any]]:
    """Load the records as Detectron2 does and give each instance a box; warn of those whose ids ``empty`` has."""
    if empty:
        # Once in a process, and not before a run has set up its log.
        message = f"{json_file}: annotations that cover no pixel are left out of training; ids: {first_few(empty)}."
        log_first_n(logging.WARNING, message, name=__name__, key="message")
    records = load_coco_json(json_file, image_root, name)
    for record in records:
        for anno in record["annotations"]:
            if "bbox" not in anno:
                rle = to_rle(anno["segmentation"], record["height"], record["width"])
                anno["bbox"] = mask_util.toBbox(rle).tolist()
    return records


def _is_complete(anno: dict[str, Any]) -> bool:
    """Whether COCOeval can take the annotation from the file as it is."""
    segmentation = anno.get("segmentation")
    return (
        all(key in anno for key in ("bbox", "area", "iscrowd"))
        and anno["id"] != 0  # COCOeval reads a match with id 0 as no match
        and (not isinstance(segmentation, list) or len(valid_polygons(segmentation)) == len(segmentation))
    )
