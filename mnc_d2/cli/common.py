"""What several subcommands share: their arguments, the datasets that these name, the log."""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..data import register_coco_dataset
from ..data.coco_checks import read_coco_file
from ..files import open_atomically

# Where the annotations of a split lie in a folder, by the habits of COCO and of those who export its format.
_PLACES = ("{}.json", "annotations/{}.json", "annotations/instances_{}*.json", "{}/_annotations.coco.json")
_DATASETS_FILE = "datasets.json"
_SPLITS = {"train": ("train",), "val": ("val", "valid", "test")}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a trained model."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, such as model_final.pth")
    parser.add_argument("--config", help="of a checkpoint that does not say it itself: a file, or one of ours by name")
    parser.add_argument("--device", help='such as "cpu"; the GPU where there is one, by default')


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set, which :func:`overrides` reads. Bare pairs at the end would hide the options from argparse."""
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="override of the config, such as --set SOLVER.MAX_ITER 500; repeatable",
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """Return KEY VALUE pairs as one list."""
    return [x for pair in args.set for x in pair]


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", metavar="FOLDER", help="of the images, where it cannot be found from the annotations"
    )


def register_split(data: str, split: str, images: str | None = None, check_files: bool = True) -> str | None:
    """Register the part of a dataset that a split needs.

    Args:
        data: a file in COCO format; a folder with a file for each split; or the name of a registered dataset.
        split: "train" or "val".
        images: folder of the images; None to look for them near the annotations.
        check_files: whether to read the header of every image.

    Returns:
        the name that it is registered by; None if the folder has no validation set.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not valid; the message says what.
    """
    if data in DatasetCatalog:
        return data
    if os.path.isdir(data):
        file = _find_annotations(data, split)
        if file is None and split == "train":
            raise FileNotFoundError(
                f"{data} has no annotations in COCO format, such as train.json. If it has YOLO's, labelme's or Pascal "
                f"VOC's, convert them: mnc data {data} --output FOLDER"
            )
        if file is None:
            return None
    elif os.path.isfile(data):
        file = data
    else:
        raise FileNotFoundError(f"The dataset {data} is neither a file nor a folder, nor registered by that name.")
    name = dataset_name(file)
    register_coco_dataset(name, file, images or find_images(file), check_files=check_files)
    return name


def dataset_name(file: str) -> str:
    """Return the name that the dataset of a file is registered by."""
    return re.sub(r"\W+", "_", "_".join(os.path.splitext(os.path.abspath(file))[0].split(os.sep)[-3:])).strip("_")


def _find_annotations(folder: str, split: str) -> str | None:
    for name in _SPLITS[split]:
        for place in _PLACES:
            files = sorted(glob.glob(os.path.join(glob.escape(folder), place.format(name))))
            if files:
                return files[0]
    return None


def find_images(file: str) -> str:
    """Return the folder that the images of a COCO file are in, by its ``info.image_root`` or by the first of them."""
    dataset = read_coco_file(file)
    info, records = dataset.get("info"), dataset["images"]
    if isinstance(info, dict) and isinstance(info.get("image_root"), str):
        return info["image_root"]
    name = records[0].get("file_name") if records else None
    parent, stem = os.path.dirname(os.path.abspath(file)), os.path.splitext(os.path.basename(file))[0]
    top = os.path.dirname(parent)
    split = stem.replace("instances_", "")
    folders = [
        parent,
        *(os.path.join(x, *part) for x in (parent, top) for part in (("images",), ("images", split), (split,))),
    ]
    for folder in (*folders, top):
        if isinstance(name, str) and os.path.isfile(os.path.join(folder, name)):
            return folder
    raise FileNotFoundError(f"{file}: the images, such as {name}, are in none of {', '.join(folders)}. Add --images.")


def record_datasets(cfg: CfgNode) -> None:
    """Write into OUTPUT_DIR where the datasets of a run are, for :func:`register_recorded`."""
    sources = {name: MetadataCatalog.get(name).get("coco_source") for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    with open_atomically(os.path.join(cfg.OUTPUT_DIR, _DATASETS_FILE), "w", encoding="utf-8") as file:
        json.dump({name: source for name, source in sources.items() if source}, file, indent=1)


def register_recorded(folder: str) -> None:
    """Register the datasets of a run as far as they are where they were."""
    path = os.path.join(folder, _DATASETS_FILE)
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        sources = json.load(file)
    for name, (json_file, images) in sources.items():
        if os.path.isfile(json_file):
            register_coco_dataset(name, json_file, images)


def set_up_log(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Run Detectron2's ``default_setup``, with the long log in OUTPUT_DIR only and warnings on the terminal."""
    # It gives its loggers the standard output, and writes pages there.
    terminal = io.StringIO()
    with contextlib.redirect_stdout(terminal):
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mnc_d2")
    if comm.is_main_process():
        record_datasets(cfg)
    for name in ("fvcore", "detectron2", "mnc_d2"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                handler.setStream(sys.stderr)
                handler.setLevel(logging.WARNING)


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """Keep what pycocotools prints from the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
