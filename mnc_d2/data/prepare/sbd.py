"""The Semantic Boundaries Dataset (SBD): instance masks for 11355 images of VOC 2012, in MATLAB files.

Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011. Instance segmentation on VOC uses its masks
with VOC 2012's own division into train and val ("Simultaneous detection and segmentation", ECCV 2014): not SBD's lists,
which mix the two, but the images of VOC's lists that SBD annotates.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
from scipy.io import loadmat

from ...messages import first_few
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
from .voc import VOID, flag_annotations, instance_classes, read_objects

__all__ = ["SBD_LISTS", "main", "prepare_sbd", "read_sbd_classes", "read_sbd_instances"]

logger = logging.getLogger(__name__)

SBD_FOLDER = os.path.join("SBD", "dataset")
SBD_LISTS = {"train": 8498, "val": 2857}
VOC_LISTS = {"train": 5717, "val": 5823}


def prepare_sbd(
    root: str,
    names: Optional[Iterable[str]] = None,
    partial: bool = False,
    force: bool = False,
    trust_inst: bool = False,
) -> None:
    """Check SBD and write the annotations of voc_2012_sds_train and voc_2012_sds_val.

    Args:
        root: folder of all datasets, with SBD and VOC2012.
        names: of the datasets; None for both.
        partial: leave out images whose image or .mat files are missing, accept lists that are not the official ones,
            and take 0 for the flags where an XML file is missing.
        force: write annotations again that are there.
        trust_inst: where inst/ and cls/ disagree about an instance's class, take that of inst/.

    Raises:
        ValueError: something is missing or bad; the message names it.
    """
    names = [name for name, voc_set in VOC_SETS.items() if voc_set.source == "sds"] if names is None else list(names)

    def convert(name: str) -> None:
        voc_set = VOC_SETS[name]
        image_names, problems = _image_names(root, voc_set.image_set)
        if not problems and len(image_names) != voc_set.num_images:
            difference = len(image_names) - voc_set.num_images
            logger.warning(
                f"{name}: the lists have their official lengths, but give {len(image_names)} images, {difference:+d} "
                f"to the {voc_set.num_images} of the literature."
            )
        write_dataset(
            voc_set.json_file(root, name),
            image_names,
            functools.partial(_convert, root, voc_set.folder, partial=partial, trust_inst=trust_inst),
            partial,
            [] if partial else problems,
        )

    prepare_each({name: VOC_SETS[name].json_file(root, name) for name in names}, convert, partial, force)


def _image_names(root: str, image_set: str) -> tuple[list[str], list[str]]:
    """Return the images of VOC's list that SBD annotates, and what is wrong with the lists."""
    problems, annotated = [], set()
    for name, official in SBD_LISTS.items():
        path = os.path.join(root, SBD_FOLDER, f"{name}.txt")
        listed = read_image_list(path)
        annotated.update(listed)
        problems += count_problems(path, len(listed), official)
    voc_names = {}
    for name, official in VOC_LISTS.items():
        path = os.path.join(root, "VOC2012", "ImageSets", "Main", f"{name}.txt")
        voc_names[name] = read_image_list(path)
        problems += count_problems(path, len(voc_names[name]), official)
    neither = sorted(annotated.difference(*voc_names.values()))
    if neither:
        logger.warning(f"In SBD, but in neither train nor val of VOC 2012, so left out: {first_few(neither)}")
    names = [name for name in voc_names[image_set] if name in annotated]
    if not names:
        raise ValueError(f"SBD's lists have none of the images of VOC 2012's {image_set}.txt. Unpack both again.")
    return names, problems


def _convert(root: str, folder: str, name: str, partial: bool, trust_inst: bool) -> ConvertedImage:
    image_file = _image_file(root, folder, name)
    inst_file, cls_file = (os.path.join(root, SBD_FOLDER, kind, f"{name}.mat") for kind in ("inst", "cls"))
    xml_file = os.path.join(root, folder, "Annotations", f"{name}.xml")
    has_xml = os.path.isfile(xml_file) or not partial
    require_files(os.path.join(root, image_file), inst_file, cls_file, *([xml_file] if has_xml else []))

    size = check_image(os.path.join(root, image_file))
    instance_map, categories = read_sbd_instances(inst_file)
    class_map = read_sbd_classes(cls_file)
    for path, found in ((inst_file, instance_map.shape), (cls_file, class_map.shape)):
        if found != size:
            raise ValueError(f"{path} is {found[::-1]}, but {image_file} is {size[::-1]} (width, height)")

    present = set(np.unique(instance_map).tolist())
    ids = [i for i in range(1, len(categories) + 1) if i in present]
    mixed = _check_classes(inst_file, cls_file, instance_map, class_map, ids, categories, trust_inst)
    annotations = [
        {"category_id": categories[i - 1], **encoded} for i, encoded in zip(ids, encode_masks(instance_map, ids))
    ]
    unmatched = flag_annotations(annotations, read_objects(xml_file)[1] if has_xml else [])
    notes = [("instances without an object in the XML file: their flags are 0", f"{name}/{ids[i]}") for i in unmatched]
    notes += [("instances with pixels of another class in cls/", f"{name}/{i}") for i in mixed]
    empty = sorted(set(range(1, len(categories) + 1)) - present)
    notes += [("instances without a pixel, left out", f"{name}/{i}") for i in empty]
    notes += [] if has_xml else [("images without an XML file", name)]
    notes += [] if annotations else [("images without an instance", name)]
    return ConvertedImage(image_record(name, image_file, size), annotations, notes)


def _image_file(root: str, folder: str, name: str) -> str:
    """Return the image relative to `root`: VOC's, or SBD's copy of it where that is not there."""
    voc_file = os.path.join(folder, "JPEGImages", f"{name}.jpg")
    sbd_file = os.path.join(SBD_FOLDER, "img", f"{name}.jpg")
    has_copy_only = os.path.isfile(os.path.join(root, sbd_file)) and not os.path.isfile(os.path.join(root, voc_file))
    return sbd_file if has_copy_only else voc_file


def _check_classes(
    inst_file: str,
    cls_file: str,
    instance_map: np.ndarray,
    class_map: np.ndarray,
    ids: Sequence[int],
    categories: Sequence[int],
    trust_inst: bool,
) -> list[int]:
    """Compare the categories of instances with their pixels' classes; return the ids of those that differ in part.

    Raises:
        ValueError: most pixels of an instance have another class, unless `trust_inst`.
    """
    voted, mixed = instance_classes(instance_map, class_map, ids)
    differing = [(i, categories[i - 1], found) for i, found in zip(ids, voted) if found != categories[i - 1]]
    if differing and not trust_inst:
        cases = "; ".join(f"instance {i} is {_class_name(a)} and {_class_name(b)}" for i, a, b in differing)
        raise ValueError(f"{inst_file} and {cls_file} disagree: {cases}. --trust-inst takes the former")
    return sorted({*mixed, *(i for i, _, _ in differing)})


def _class_name(category_id: int) -> str:
    return VOC_CLASSES[category_id - 1] if 1 <= category_id <= len(VOC_CLASSES) else f"class {category_id}"


def read_sbd_instances(path: str) -> tuple[np.ndarray, list[int]]:
    """Read inst/*.mat.

    Returns:
        The instance of each pixel, uint8 (H, W), 0 for none; and the category id (1 to 20) of instances 1, 2, ...

    Raises:
        ValueError: the file cannot be read or is not such a file; the message names it.
    """
    struct = _read_struct(path, "GTinst")
    instance_map = _index_map(path, struct, "Segmentation")
    categories = np.asarray(_field(path, struct, "Categories"))
    invalid = categories.dtype.kind not in "uif" or not np.isin(categories, np.arange(1, len(VOC_CLASSES) + 1)).all()
    if invalid:
        raise ValueError(f"{path}: GTinst.Categories are not classes from 1 to {len(VOC_CLASSES)}")
    beyond = instance_map[(instance_map != VOID) & (instance_map > categories.size)]
    if beyond.size:
        raise ValueError(f"{path}: instance {beyond.max()} is in the map, but there are {categories.size} categories")
    return instance_map, categories.ravel().astype(int).tolist()


def read_sbd_classes(path: str) -> np.ndarray:
    """Read cls/*.mat: the class of each pixel, uint8 (H, W), 0 for none.

    Raises:
        ValueError: the file cannot be read or is not such a file; the message names it.
    """
    return _index_map(path, _read_struct(path, "GTcls"), "Segmentation")


def _read_struct(path: str, variable: str) -> np.ndarray:
    try:
        contents = loadmat(path, variable_names=[variable])
    except Exception as e:  # scipy and zlib raise all kinds on damaged files: ValueError, TypeError, zlib.error, ...
        raise ValueError(f"{path} cannot be read as a MATLAB file ({type(e).__name__}: {e})") from e
    if variable not in contents:
        raise ValueError(f"{path} has no variable {variable}")
    return contents[variable]


def _field(path: str, struct: np.ndarray, name: str) -> Any:
    """Return a field of a 1 x 1 struct, out of the object arrays that loadmat wraps structs and fields in."""
    if struct.dtype.names is None or name not in struct.dtype.names or struct.size != 1:
        raise ValueError(f"{path} is not a file of SBD: it has no struct with the field {name}")
    value = struct[name]
    while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.item()
    return value


def _index_map(path: str, struct: np.ndarray, name: str) -> np.ndarray:
    index_map = np.asarray(_field(path, struct, name))
    # Compared as numbers first: a cast would wrap what does not fit.
    if index_map.ndim != 2 or index_map.dtype.kind not in "uif" or not np.isin(index_map, np.arange(256)).all():
        raise ValueError(f"{path}: {name} is not a map of integers from 0 to 255")
    return index_map.astype(np.uint8)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit status."""
    known = [name for name, voc_set in VOC_SETS.items() if voc_set.source == "sds"]
    parser = argument_parser("Check SBD and write annotations of voc_2012_sds_* in COCO format.", known)
    add_writing_arguments(parser)
    parser.add_argument("--trust-inst", action="store_true", help="where inst and cls disagree, take the class of inst")

    def prepare(args: argparse.Namespace) -> None:
        prepare_sbd(args.root, args.datasets or None, args.partial, args.force, args.trust_inst)

    return run_command(prepare, parser.parse_args(argv), known)
