"""What the preparations have in common: checking many files, naming each bad one, writing a dataset in one step."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from ...files import open_atomically
from ...messages import first_few
from ..files import datasets_root
from ..images import ImageError, image_orientation, open_image
from ..voc import VOC_CLASSES

__all__ = [
    "ConvertedImage",
    "add_writing_arguments",
    "argument_parser",
    "check_image",
    "count_problems",
    "encode_masks",
    "image_record",
    "prepare_each",
    "read_image_list",
    "require_files",
    "run_command",
    "write_dataset",
]

logger = logging.getLogger(__name__)


@dataclass
class ConvertedImage:
    """An image's record and annotations in COCO format, without the ids of annotations.

    Attributes:
        record: id, file_name, height, width.
        annotations: dicts with category_id, bbox, area, iscrowd, difficult, truncated and, if any, segmentation.
        notes: pairs of what was noticed, as a plural ("objects without ..."), and where.
    """

    record: dict[str, Any]
    annotations: list[dict[str, Any]]
    notes: list[tuple[str, str]] = field(default_factory=list)


def require_files(*paths: str) -> None:
    """Raise FileNotFoundError for the paths that are not files."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"missing: {', '.join(missing)}")


def read_image_list(path: str) -> list[str]:
    """Read names of images, one a line.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: it is empty, a line is not one name, or a name occurs twice.
    """
    require_files(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    invalid = [line for line in lines if not line.replace("_", "").isdecimal()]
    repeated = [line for line, count in Counter(lines).items() if count > 1]
    if invalid or not lines:
        raise ValueError(
            f"{path} is not a list of image names: {first_few(invalid) or 'it is empty'}. Unpack it again."
        )
    if repeated:
        raise ValueError(f"{path} names images twice: {first_few(repeated)}. Unpack it again.")
    return lines


def count_problems(image_list: str, found: int, official: int) -> list[str]:
    """Return what is to be said of a list whose number of images is not the official one: one sentence or none."""
    if found == official:
        return []
    return [f"{image_list} names {found} images, the official list {official}. Unpack it again, or use --partial."]


def image_record(name: str, image_file: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the COCO record of an image.

    Args:
        name: digits and "_"; without "_" it is the id: 2008000001 for 2008_000001.
        image_file: path relative to the root of all datasets.
        size: (height, width).
    """
    # Forward slashes, so that the annotations are the same on every system.
    path = image_file.replace(os.sep, "/")
    return {"id": int(name.replace("_", "")), "file_name": path, "height": size[0], "width": size[1]}


def check_image(path: str | os.PathLike) -> tuple[int, int]:
    """Decode an image file and return its (height, width).

    Raises:
        ImageError: it cannot be read.
        ValueError: its EXIF data turn it, but not its annotations; the message names the file.
    """
    with open_image(path) as image:
        orientation, size = image_orientation(image), (image.height, image.width)
        image.load()
    if orientation != 1:
        raise ValueError(f"{path} has the EXIF orientation {orientation}: it would be turned, and its masks not")
    return size


def encode_masks(instance_map: np.ndarray, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return segmentation, bbox (x, y, width, height; tight) and area of instances that have pixels.

    Args:
        instance_map: integers (H, W), the instance of each pixel.
        ids: the N instances to encode, each with at least one pixel.
    """
    masks = instance_map[:, :, None] == np.asarray(ids, dtype=np.int64)  # (H, W, N)
    encoded = []
    for rle in mask_util.encode(np.asfortranarray(masks, dtype=np.uint8)):
        segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        encoded.append(
            {
                "segmentation": segmentation,
                "bbox": mask_util.toBbox(rle).tolist(),
                "area": int(mask_util.area(rle)),
                "iscrowd": 0,
            }
        )
    return encoded


def write_dataset(
    json_file: str,
    names: Sequence[str],
    convert: Callable[[str], ConvertedImage],
    partial: bool = False,
    problems: Iterable[str] = (),
) -> None:
    """Convert images one by one and write the annotations, if nothing is wrong with any of them.

    The file appears in one step when all is done: an interrupted run leaves none, and an older one as it was.

    Args:
        json_file: where the annotations go. Where there are problems, they are listed in `json_file`.problems.txt.
        names: of the images.
        convert: from a name to its image. It raises FileNotFoundError for missing files, and ImageError or
            ValueError for bad ones.
        partial: leave out images with missing files.
        problems: what was found wrong before.

    Raises:
        ValueError: there are problems.
        FileNotFoundError: no image is there, where that is not a problem.
    """
    label, report = os.path.basename(json_file), f"{json_file}.problems.txt"
    images, missing, found = _convert_all(names, convert, label)
    problems = [*problems, *found]
    if problems or (missing and not partial):
        _raise_problems(json_file, report, problems, missing)
    if not images:
        raise FileNotFoundError(f"none of the {len(names)} images is there: {first_few(missing, 1)}")

    annotations = [
        {"image_id": image.record["id"], **annotation} for image in images for annotation in image.annotations
    ]
    dataset = {
        "info": {"description": label, "images_left_out": len(missing)},
        "images": [image.record for image in images],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, start=1)],
    }
    _write(json_file, json.dumps(dataset))
    with contextlib.suppress(FileNotFoundError):
        os.remove(report)  # of an earlier run
    logger.info(f"{json_file}: {len(images)} images, {len(annotations)} annotations")
    _log_notes(images, missing)


def _convert_all(
    names: Sequence[str], convert: Callable[[str], ConvertedImage], label: str
) -> tuple[list[ConvertedImage], list[str], list[str]]:
    """Return the images, what is missing of others, and what is wrong with others; show the progress."""
    images, missing, problems = [], [], []
    for name in tqdm(names, desc=label, unit=" images"):
        try:
            images.append(convert(name))
        except FileNotFoundError as e:
            missing.append(f"{name}: {e}")
        except (ImageError, ValueError) as e:
            problems.append(f"{name}: {e}")
    return images, missing, problems


def _log_notes(images: list[ConvertedImage], missing: list[str]) -> None:
    notes = defaultdict(list)
    if missing:
        notes["images left out, because a file is missing"] = missing
    for image in images:
        for kind, where in image.notes:
            notes[kind].append(where)
    for kind, places in notes.items():
        logger.info(f"  {len(places)} {kind}: {first_few(places)}")


def _raise_problems(json_file: str, report: str, problems: list[str], missing: list[str]) -> None:
    _write(report, "\n".join([*problems, *missing]) + "\n")
    lines = [f"{json_file} was not written: {len(problems)} problems, {len(missing)} images with missing files."]
    lines += [f"  {line}" for line in [*problems[:10], *missing[:10]]]
    lines.append(f"All are listed in {report}.")
    if missing:
        lines.append("Complete the download, or leave out images with missing files with --partial.")
    if problems:
        lines.append("Replace files that are bad; where that cannot be, delete them and use --partial.")
    raise ValueError("\n".join(lines))


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_atomically(path, "w", encoding="utf-8") as file:
        file.write(text)


def prepare_each(json_files: dict[str, str], convert: Callable[[str], None], partial: bool, force: bool) -> None:
    """Call ``convert(name)`` for each dataset whose annotations are not there; the failures of all are raised together.

    Args:
        json_files: paths of the annotations by name of the dataset.
        convert: writes the annotations; raises FileNotFoundError if the dataset is not there at all, ValueError if
            something is wrong with it.
        partial: leave out, with a warning, datasets that are not there, unless none is.
        force: also where they are there.

    Raises:
        ValueError: with the messages of all failures.
    """
    failures, skipped = [], []
    for name, json_file in json_files.items():
        if os.path.isfile(json_file) and not force:
            _report_existing(json_file)
            continue
        try:
            convert(name)
        except FileNotFoundError as e:
            if partial:
                logger.warning(f"{name} is not prepared: {e}")
            skipped.append(f"{name}: {e}")
        except ValueError as e:
            failures.append(f"{name}: {e}")
    if skipped and (not partial or len(skipped) == len(json_files)):
        advice = "Name the datasets that you want, if not all. datasets/README.md says where the files come from."
        failures += [*skipped, advice]
    if failures:
        raise ValueError("\n".join(failures))


def _report_existing(json_file: str) -> None:
    try:
        with open(json_file, encoding="utf-8") as file:
            dataset = json.load(file)
        found, left_out = len(dataset["images"]), dataset["info"]["images_left_out"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{json_file} was not written by this command. Remove it, or write it with --force.") from e
    part = f", without {left_out} whose files were missing" if left_out else ""
    logger.info(f"{json_file} is there, {found} images{part}. --force writes it again.")


def argument_parser(description: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all preparations have.

    Args:
        description: what the command does.
        names: of the datasets.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("datasets", nargs="*", metavar="NAME", help=f"datasets to prepare, of: {', '.join(names)}")
    parser.add_argument("--root", default=datasets_root(), help="folder of all datasets (default: %(default)s)")
    return parser


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of preparations that write annotations."""
    parser.add_argument(
        "--partial",
        action="store_true",
        help="use what is there: leave out images whose files are missing, accept lists that are not the official ones",
    )
    parser.add_argument("--force", action="store_true", help="write annotations again that are there")


def run_command(prepare: Callable[[argparse.Namespace], None], args: argparse.Namespace, known: Iterable[str]) -> int:
    """Run a preparation for the command line; return the exit status.

    Args:
        prepare: the preparation.
        args: parsed arguments.
        known: the names of datasets that are accepted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    program = os.path.basename(sys.argv[0])
    unknown = sorted(set(args.datasets) - set(known))
    try:
        if unknown:
            raise ValueError(f"{first_few(unknown)} is not among {', '.join(known)}.")
        prepare(args)
    except (ValueError, OSError) as e:
        print(f"{program}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted. What is finished is kept; run it again for the rest.", file=sys.stderr)
        return 130
    return 0
