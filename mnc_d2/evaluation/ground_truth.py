"""Ground truth of a registered dataset, as evaluation needs it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..data.masks import to_rle, valid_polygons


@dataclass(frozen=True)
class Annotation:
    """One annotated region.

    Attributes:
        name: how messages call it.
        category: index of its class.
        box: x, y, width, height in pixels of the image.
        mask: compressed RLE of the image's size; None where the annotation has no segmentation.
        difficult: VOC's flag.
        crowd: whether it is a crowd region, which holds an unknown number of instances, and not an instance.
    """

    name: str
    category: int
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None
    difficult: bool
    crowd: bool


@dataclass(frozen=True)
class ImageTruth:
    """Size of an image in pixels, and what is annotated in it."""

    height: int
    width: int
    annotations: list[Annotation]


@dataclass(frozen=True)
class GroundTruth:
    """A dataset.

    Attributes:
        images: by image id, in the order of the dataset.
        class_names: by class index.
        category_ids: the dataset's own id of each class.
        without_mask: names of the annotations that have no segmentation.
    """

    images: dict[Any, ImageTruth]
    class_names: list[str]
    category_ids: list[int]
    without_mask: list[str]


def load_ground_truth(dataset_name: str) -> GroundTruth:
    """Load the ground truth of a registered dataset.

    Datasets in COCO format are read from their file, where annotations may have VOC's flag "difficult"; others from
    their records in ``DatasetCatalog``.

    Args:
        dataset_name: a registered dataset.

    Raises:
        ValueError: there are no annotations, or one of them is not valid; the message names it.
    """
    metadata = MetadataCatalog.get(dataset_name)
    # The file that register_coco_dataset has read; json_file may be what COCOEvaluator made of it, without flags.
    json_file = metadata.get("coco_source", [None])[0] or metadata.get("json_file")
    if json_file is not None:
        return _from_json(json_file, metadata)
    if metadata.get("evaluator_type") == "pascal_voc":
        raise ValueError(
            f"Detectron2's '{dataset_name}' does not say which instances are difficult. Evaluate it with "
            '"auto" in TEST.EVALUATORS, or take voc_2007_boxes_test and the like: see datasets/README.md.'
        )
    names = metadata.get("thing_classes")
    if names is None:
        raise ValueError(f"Dataset '{dataset_name}' has neither json_file nor thing_classes in its metadata.")
    mapping = metadata.get("thing_dataset_id_to_contiguous_id", {})
    images = {}
    for record in DatasetCatalog.get(dataset_name):
        image_id = record["image_id"]
        annotations = [
            _annotation(anno, f"annotation {i} of image {image_id!r}", anno["category_id"], record)
            for i, anno in enumerate(record.get("annotations", []))
        ]
        images[image_id] = ImageTruth(record["height"], record["width"], annotations)
    # Where the ids of the dataset are not known they are taken to be the indices.
    ids = {index: category_id for category_id, index in mapping.items()}
    return _ground_truth(dataset_name, images, names, [ids.get(index, index) for index in range(len(names))])


def _from_json(json_file: str, metadata) -> GroundTruth:
    with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
        dataset = json.load(file)
    if "annotations" not in dataset:
        raise ValueError(f"{json_file} has no annotations: there is nothing to evaluate predictions with.")
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    # What Detectron2 does with a dataset that says nothing else.
    mapping: dict[int, int] = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i: k for k, i in enumerate(sorted(names))
    }
    images = {x["id"]: ImageTruth(x["height"], x["width"], []) for x in dataset["images"]}
    records = {x["id"]: x for x in dataset["images"]}
    for anno in dataset["annotations"]:
        name = f"annotation {anno['id']}"
        if anno["image_id"] not in images:
            raise ValueError(f"{json_file}: {name} is of image {anno['image_id']!r}, which is not among the images.")
        if anno["category_id"] not in mapping:
            raise ValueError(f"{json_file}: {name} is of category {anno['category_id']}, which the dataset lacks.")
        parsed = _annotation(anno, name, mapping[anno["category_id"]], records[anno["image_id"]])
        images[anno["image_id"]].annotations.append(parsed)
    ids = sorted(mapping, key=mapping.__getitem__)
    return _ground_truth(json_file, images, metadata.get("thing_classes") or [names[i] for i in ids], ids)


def _annotation(anno: dict, name: str, category: int, image: dict) -> Annotation:
    mask = _read_mask(anno.get("segmentation"), name, image["height"], image["width"])
    if "bbox" in anno:
        # Files have no mode: their boxes are x, y, width, height.
        box = BoxMode.convert(list(anno["bbox"]), anno.get("bbox_mode", BoxMode.XYWH_ABS), BoxMode.XYWH_ABS)
    elif mask is not None:
        box = mask_util.toBbox(mask)
    else:
        raise ValueError(f"{name} has neither bbox nor segmentation.")
    difficult, crowd = (bool(anno.get(key, 0)) for key in ("difficult", "iscrowd"))
    x, y, width, height = map(float, box)
    return Annotation(name, category, (x, y, width, height), mask, difficult, crowd)


def _read_mask(segmentation: Any, name: str, height: int, width: int) -> dict[str, Any] | None:
    """Return polygons, or an RLE of either kind, as one compressed RLE; None where there is no segmentation."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        if not valid_polygons(segmentation):
            return None
    elif list(segmentation["size"]) != [height, width]:
        raise ValueError(f"{name} has a mask of {segmentation['size']}, its image is {height} x {width}.")
    return to_rle(segmentation, height, width)


def _ground_truth(
    source: str, images: dict[Any, ImageTruth], names: Iterable[str], category_ids: list[int]
) -> GroundTruth:
    names = list(names)
    annotations = [anno for image in images.values() for anno in image.annotations]
    for anno in annotations:
        if not 0 <= anno.category < len(names):
            raise ValueError(f"{source}: {anno.name} is of class {anno.category}; there are {len(names)} classes.")
    return GroundTruth(images, names, category_ids, [anno.name for anno in annotations if anno.mask is None])
