"""PASCAL VOC with instance masks, SBD's and its own, and with boxes only; unions for mixed supervision.

The files are written by :mod:`mnc_d2.data.prepare` (``datasets/prepare_voc.py``, ``datasets/prepare_sbd.py``).
Detectron2 itself registers ``voc_2007_trainval`` and the like, which read boxes from the XML files.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from .files import prepare_dataset

__all__ = ["VOC_CLASSES", "VOC_SETS", "VOC_UNIONS", "VOCSet", "register_union", "register_voc_set", "voc_palette"]

logger = logging.getLogger(__name__)

VOC_CLASSES = tuple(CLASS_NAMES)  # category ids 1 to 20, in this order
ANNOTATION_FOLDER = "mnc_annotations"
COMMANDS = {
    "sds": "python datasets/prepare_sbd.py",
    "seg": "python datasets/prepare_voc.py",
    "boxes": "python datasets/prepare_voc.py",
}


@dataclass(frozen=True)
class VOCSet:
    """What a dataset is made of.

    Attributes:
        folder: "VOC2007" or "VOC2012", under the root of all datasets.
        source: "sds": instance masks of SBD; "seg": of VOC's SegmentationObject; "boxes": boxes of the XML files.
        image_set: name of the list in ImageSets/Main, for "seg" in ImageSets/Segmentation.
        num_images: the official number of images.
    """

    folder: str
    source: str
    image_set: str
    num_images: int

    @property
    def image_list(self) -> str:
        """Path of the list of images, relative to the root of all datasets."""
        task = "Segmentation" if self.source == "seg" else "Main"
        return os.path.join(self.folder, "ImageSets", task, f"{self.image_set}.txt")

    def json_file(self, root: str, name: str) -> str:
        """Path of the annotations of the dataset `name`."""
        return os.path.join(root, self.folder, ANNOTATION_FOLDER, f"{name}.json")


VOC_SETS = {
    "voc_2012_sds_train": VOCSet("VOC2012", "sds", "train", 5623),
    "voc_2012_sds_val": VOCSet("VOC2012", "sds", "val", 5732),
    "voc_2012_seg_train": VOCSet("VOC2012", "seg", "train", 1464),
    "voc_2012_seg_val": VOCSet("VOC2012", "seg", "val", 1449),
    "voc_2012_boxes_train": VOCSet("VOC2012", "boxes", "train", 5717),
    "voc_2012_boxes_val": VOCSet("VOC2012", "boxes", "val", 5823),
    "voc_2007_seg_train": VOCSet("VOC2007", "seg", "train", 209),
    "voc_2007_seg_val": VOCSet("VOC2007", "seg", "val", 213),
    "voc_2007_seg_test": VOCSet("VOC2007", "seg", "test", 210),
    "voc_2007_boxes_trainval": VOCSet("VOC2007", "boxes", "trainval", 5011),
    "voc_2007_boxes_test": VOCSet("VOC2007", "boxes", "test", 4952),
}

# The "07++12" of the literature; the second one is for VOC 2012's test server only, as it trains on sds_val.
VOC_UNIONS = {
    "voc_0712_sds_train": ("voc_2007_boxes_trainval", "voc_2007_boxes_test", "voc_2012_sds_train"),
    "voc_0712_sds_trainval": (
        "voc_2007_boxes_trainval",
        "voc_2007_boxes_test",
        "voc_2012_sds_train",
        "voc_2012_sds_val",
    ),
}


def voc_palette(size: int = 256) -> np.ndarray:
    """Return VOC's colours by index, 0 the background: uint8 RGB (size, 3).

    Bits 0, 3, 6 of the index are the highest bits of red, bits 1, 4, 7 green's, bits 2, 5 blue's.
    """
    index = np.arange(size)
    colours = np.zeros((size, 3), dtype=np.uint8)
    for bit in range(8):
        channel, place = bit % 3, 7 - bit // 3
        colours[:, channel] |= ((index >> bit & 1) << place).astype(np.uint8)
    return colours


def register_voc_set(name: str, voc_set: VOCSet, root: str) -> None:
    """Register a dataset; its files are looked for when it is used.

    The records are Detectron2's, with integer image ids and, in each annotation, `difficult` and `truncated` (0 or 1).
    A use before its files are there ends in a FileNotFoundError that names the file and the command to run.

    Args:
        name: name in Detectron2's DatasetCatalog and MetadataCatalog.
        voc_set: what it is made of.
        root: folder of all datasets, to which the file names of images are relative.

    Raises:
        AssertionError: the name is taken, from DatasetCatalog.
    """
    has_masks = voc_set.source != "boxes"
    json_file = voc_set.json_file(root, name)
    DatasetCatalog.register(name, lambda: _load(name, json_file, root, voc_set.num_images))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=root,
        evaluator_type="sds",
        has_all_masks=has_masks,
        prepare_command=COMMANDS[voc_set.source],
        **_class_metadata(),
    )


def register_union(name: str, parts: tuple[str, ...]) -> None:
    """Register the concatenation of datasets of VOC's classes, for training.

    Args:
        name: name in Detectron2's DatasetCatalog and MetadataCatalog.
        parts: names of registered datasets, read when the union is.

    Raises:
        AssertionError: the name is taken, from DatasetCatalog.
    """
    DatasetCatalog.register(name, lambda: [record for part in parts for record in DatasetCatalog.get(part)])
    MetadataCatalog.get(name).set(parts=parts, has_all_masks=False, **_class_metadata())


def _class_metadata() -> dict[str, Any]:
    return {
        "thing_classes": list(VOC_CLASSES),
        "thing_colors": voc_palette()[1 : len(VOC_CLASSES) + 1].tolist(),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(VOC_CLASSES))},
    }


def _load(name: str, json_file: str, root: str, num_images: int) -> list[dict[str, Any]]:
    prepare_dataset(name)
    records = load_coco_json(json_file, root, name, extra_annotation_keys=["difficult", "truncated"])
    if len(records) != num_images:
        logger.warning(
            f"'{name}' has {len(records)} images, officially {num_images}: see the output of its preparation."
        )
    return records
