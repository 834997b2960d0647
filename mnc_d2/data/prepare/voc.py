"""PASCAL VOC: boxes of the XML files, and instance masks of SegmentationObject."""

from __future__ import annotations

import argparse
import functools
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import pycocotools.mask as mask_util

from ..images import open_image
from ..voc import VOC_CLASSES, VOC_SETS
from .common import (
    ConvertedImage,
    add_writing_arguments,
    argument_parser,
    check_image,
    count_problems,
    encode_masks,
    image_record,
    prepare_each,
    read_image_list,
    require_files,
    run_command,
    write_dataset,
)

__all__ = [
    "VOID",
    "VOCObject",
    "flag_annotations",
    "instance_classes",
    "main",
    "prepare_voc",
    "read_index_map",
    "read_objects",
]

VOID = 255  # in maps of instances and of classes: the border of objects, and what was not annotated
MIN_IOU = 0.5  # of the boxes of a mask and of an object in the XML file that are taken to be the same


@dataclass(frozen=True)
class VOCObject:
    """An object of an XML file.

    Attributes:
        category_id: 1 to 20.
        bbox: x, y, width, height in pixels, with (0, 0) the corner of the top-left pixel.
        difficult, truncated: 0 or 1; 0 where the file does not say.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    difficult: int
    truncated: int


def prepare_voc(root: str, names: Optional[Iterable[str]] = None, partial: bool = False, force: bool = False) -> None:
    """Check VOC 2007 and 2012 and write the annotations of the sets of their own boxes and masks.

    Args:
        root: folder of all datasets, with VOC2007 and VOC2012.
        names: the sets, of VOC_SETS; None for all of source "boxes" and "seg".
        partial: leave out images whose files are missing, and accept lists that are not the official ones.
        force: write annotations again that are there.

    Raises:
        ValueError: something is missing or bad; the message names it.
    """
    sets = [name for name, voc_set in VOC_SETS.items() if voc_set.source != "sds"] if names is None else list(names)

    def convert(name: str) -> None:
        voc_set = VOC_SETS[name]
        image_names = read_image_list(os.path.join(root, voc_set.image_list))
        convert_image = {"boxes": _convert_boxes, "seg": _convert_masks}[voc_set.source]
        write_dataset(
            voc_set.json_file(root, name),
            image_names,
            functools.partial(convert_image, root, voc_set.folder),
            partial,
            [] if partial else count_problems(voc_set.image_list, len(image_names), voc_set.num_images),
        )

    prepare_each({name: VOC_SETS[name].json_file(root, name) for name in sets}, convert, partial, force)


def _convert_boxes(root: str, folder: str, name: str) -> ConvertedImage:
    image_file = os.path.join(folder, "JPEGImages", f"{name}.jpg")
    xml_file = os.path.join(root, folder, "Annotations", f"{name}.xml")
    require_files(os.path.join(root, image_file), xml_file)
    size, objects = read_objects(xml_file)
    found = check_image(os.path.join(root, image_file))
    if found != size:
        raise ValueError(f"{image_file} is {found[1]}x{found[0]}, but {xml_file} says {size[1]}x{size[0]}")
    annotations = [
        {
            "category_id": voc_object.category_id,
            "bbox": list(voc_object.bbox),
            "area": voc_object.bbox[2] * voc_object.bbox[3],
            "iscrowd": 0,
            "difficult": voc_object.difficult,
            "truncated": voc_object.truncated,
        }
        for voc_object in objects
    ]
    notes = [] if annotations else [("images without an object", name)]
    return ConvertedImage(image_record(name, image_file, size), annotations, notes)


def _convert_masks(root: str, folder: str, name: str) -> ConvertedImage:
    image_file = os.path.join(folder, "JPEGImages", f"{name}.jpg")
    xml_file = os.path.join(root, folder, "Annotations", f"{name}.xml")
    object_file, class_file = (
        os.path.join(root, folder, f"Segmentation{kind}", f"{name}.png") for kind in ("Object", "Class")
    )
    require_files(os.path.join(root, image_file), xml_file, object_file, class_file)
    size = check_image(os.path.join(root, image_file))
    instance_map, class_map = read_index_map(object_file), read_index_map(class_file)
    for path, index_map in ((object_file, instance_map), (class_file, class_map)):
        if index_map.shape != size:
            raise ValueError(f"{path} is {index_map.shape[::-1]}, but {image_file} is {size[::-1]} (width, height)")

    ids = [int(i) for i in np.unique(instance_map) if i not in (0, VOID)]
    classes, mixed = instance_classes(instance_map, class_map, ids)
    unknown = [i for i, category_id in zip(ids, classes) if not 1 <= category_id <= len(VOC_CLASSES)]
    if unknown:
        raise ValueError(f"instances {unknown} of {object_file} have none of the 20 classes in {class_file}")
    annotations = [{"category_id": c, **encoded} for c, encoded in zip(classes, encode_masks(instance_map, ids))]
    # Instance k is object k of the XML file, unless class or box say otherwise.
    unmatched = flag_annotations(annotations, read_objects(xml_file)[1], expected=[i - 1 for i in ids])
    notes = [("instances without an object in the XML file", f"{name}/{ids[i]}") for i in unmatched]
    notes += [("instances with a few pixels of another class", f"{name}/{i}") for i in mixed]
    notes += [] if annotations else [("images without an instance", name)]
    return ConvertedImage(image_record(name, image_file, size), annotations, notes)


def read_index_map(path: str | os.PathLike) -> np.ndarray:
    """Read the palette indices of a PNG: uint8 (H, W)."""
    check_image(path)
    with open_image(path) as image:
        mode, index_map = image.mode, np.asarray(image)
    if mode not in ("P", "L"):
        raise ValueError(f"{path} has mode {mode}: it has colours where VOC has palette indices")
    return index_map


def instance_classes(
    instance_map: np.ndarray, class_map: np.ndarray, ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return for each instance the class that most of its pixels have, and the ids of instances with more than one.

    Args:
        instance_map: integers 0 to 255 (H, W).
        class_map: integers 0 to 255 (H, W).
        ids: instances that have pixels.
    """
    joint = instance_map.astype(np.int64) * 256 + class_map
    votes = np.bincount(joint.ravel(), minlength=256 * 256).reshape(256, 256)
    votes = votes[np.asarray(ids, dtype=np.int64)]  # (N, 256)
    mixed = [i for i, row in zip(ids, votes) if np.count_nonzero(row) > 1]
    return votes.argmax(axis=1).tolist(), mixed


def flag_annotations(
    annotations: list[dict[str, Any]], objects: Sequence[VOCObject], expected: Optional[Sequence[int]] = None
) -> list[int]:
    """Give each annotation the flags of its object in the XML file, or 0 where it has none.

    They are matched one to one: same class, IoU of the boxes at least 0.5, the pair of largest IoU first.

    Args:
        annotations: with category_id and bbox; get `difficult` and `truncated`.
        objects: of the same image.
        expected: for each annotation the index of the object that precedes the others if its class and box match.

    Returns:
        Indices of annotations without an object.
    """
    for annotation in annotations:
        annotation.update(difficult=0, truncated=0)
    unmatched = set(range(len(annotations)))
    if not annotations or not objects:
        return sorted(unmatched)
    boxes = [np.array([x["bbox"] for x in annotations]), np.array([x.bbox for x in objects])]
    iou = np.asarray(mask_util.iou(*boxes, [0] * len(objects)))  # (N, M)
    same_class = np.equal.outer([x["category_id"] for x in annotations], [x.category_id for x in objects])
    priority = np.where(same_class & (iou >= MIN_IOU), iou, -1)
    for i, k in enumerate(expected or ()):
        if k < len(objects) and priority[i, k] >= 0:
            priority[i, k] += 1
    while priority.max() >= 0:
        row, column = (int(x) for x in np.unravel_index(priority.argmax(), priority.shape))
        annotations[row].update(difficult=objects[column].difficult, truncated=objects[column].truncated)
        unmatched.remove(row)
        priority[row, :] = priority[:, column] = -1
    return sorted(unmatched)


def read_objects(path: str) -> tuple[tuple[int, int], list[VOCObject]]:
    """Read an XML file of Annotations.

    Boxes become Detectron2's: (xmin - 1, ymin - 1) to (xmax, ymax).

    Returns:
        (height, width) of the image, and its objects in the file's order.

    Raises:
        ValueError: the file cannot be read or an object is not valid; the message names the file.
    """
    try:
        tree = ET.parse(path)
        size = int(tree.findtext("size/height", "")), int(tree.findtext("size/width", ""))
        return size, [_read_object(element) for element in tree.findall("object")]
    except (ET.ParseError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e})") from e


def _read_object(element: ET.Element) -> VOCObject:
    name = element.findtext("name", "").strip()
    if name not in VOC_CLASSES:
        raise ValueError(f"'{name}' is not a class of VOC")
    x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    x0, y0 = x0 - 1, y0 - 1
    if not (x0 < x1 and y0 < y1 and np.isfinite([x0, y0, x1, y1]).all()):
        raise ValueError(f"the box of a {name} is not valid")
    flags = [int(element.findtext(key, "0")) for key in ("difficult", "truncated")]
    if not set(flags) <= {0, 1}:
        raise ValueError(f"difficult or truncated of a {name} is neither 0 nor 1")
    return VOCObject(VOC_CLASSES.index(name) + 1, (x0, y0, x1 - x0, y1 - y0), *flags)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit status."""
    known = [name for name, voc_set in VOC_SETS.items() if voc_set.source != "sds"]
    parser = argument_parser("Check PASCAL VOC 2007 and 2012 and write annotations in COCO format.", known)
    add_writing_arguments(parser)

    def prepare(args: argparse.Namespace) -> None:
        prepare_voc(args.root, args.datasets or None, args.partial, args.force)

    return run_command(prepare, parser.parse_args(argv), known)
