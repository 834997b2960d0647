"""COCO, which needs no conversion: check that annotations and images are complete."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Optional

from ..coco_checks import check_images, read_coco_file
from .common import argument_parser, run_command

__all__ = ["COCO_SETS", "check_coco", "main"]

logger = logging.getLogger(__name__)

# Folder of the images and official number of them, by Detectron2's name of the dataset.
COCO_SETS = {
    "coco_2017_train": ("train2017", 118287),
    "coco_2017_val": ("val2017", 5000),
    "coco_2014_train": ("train2014", 82783),
    "coco_2014_val": ("val2014", 40504),
}
DEFAULT_SETS = ("coco_2017_train", "coco_2017_val")


def check_coco(root: str, names: Iterable[str] = DEFAULT_SETS) -> None:
    """Check the annotations' outline, the number of images, and every image's header and size.

    Args:
        root: folder of all datasets, with coco.
        names: of COCO_SETS.

    Raises:
        FileNotFoundError, ValueError: something is missing or bad; the message names it.
    """
    for name in names:
        folder, official = COCO_SETS[name]
        json_file = os.path.join(root, "coco", "annotations", f"instances_{folder}.json")
        dataset = read_coco_file(json_file)
        found = len(dataset["images"])
        if found != official:
            raise ValueError(f"{json_file} has {found} images, {name} has {official}. Unpack it again.")
        check_images(json_file, os.path.join(root, "coco", folder), dataset["images"])
        logger.info(f"{name}: {found} images, {len(dataset['annotations'])} annotations")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit status."""
    parser = argument_parser(f"Check COCO, by default {' and '.join(DEFAULT_SETS)}.", COCO_SETS)

    def prepare(args: argparse.Namespace) -> None:
        check_coco(args.root, args.datasets or DEFAULT_SETS)

    return run_command(prepare, parser.parse_args(argv), COCO_SETS)
