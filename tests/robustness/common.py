"""What the families of bad inputs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from programs import parse, restored_catalogs, train_net

from mnc_d2.engine import run_processes

MARK = "code-was-run"  # the file that code in an input makes, in the folder of the case


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        family: the name of the module that made it.
        name: what is wrong.
        run: writes the input into an empty folder, the current one, and gives it to the project. Returns None if the
            result is right, else what is wrong with it.
        names: a sentence about it has to contain one of these.
        is_bad: whether there is no right result, and a sentence must come.
    """

    family: str
    name: str
    run: Callable[[Path], str | None]
    names: tuple[str, ...]
    is_bad: bool = True


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path = Path(MARK)) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip_bit(content: bytes, position: int) -> bytes:
    """Return bytes of which one bit, by its position, is another."""
    flipped = bytearray(content)
    flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)


def coco_dataset(folder: Path, name: str = "bad") -> list[str]:
    """Write a right dataset of two images into a folder; return the arguments of train_net.py that register it."""
    rectangle = [[2, 2, 20, 2, 20, 20, 2, 20]]
    common = {"category_id": 1, "bbox": [2, 2, 18, 18], "area": 324, "iscrowd": 0, "segmentation": rectangle}
    dataset = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in (1, 2)],
        "annotations": [{"id": i, "image_id": i, **common} for i in (1, 2)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (folder / "annotations.json").write_text(json.dumps(dataset))
    for i in (1, 2):
        Image.new("RGB", (32, 24)).save(folder / f"{i}.png")
    return ["--dataset", name, str(folder / "annotations.json"), str(folder)]


def run_train_net(*arguments: Any) -> str | None:
    """Do what train_net.py does before it starts processes.

    Returns:
        None: nothing was found to be wrong.

    Raises:
        SystemExit: as of train_net.py, after what is wrong was printed.
    """
    defaults = ["DATASETS.TRAIN", "('bad',)", "DATASETS.TEST", "('bad',)", "MODEL.DEVICE", "cpu"]
    arguments = list(arguments)
    at = next((i for i, x in enumerate(arguments) if x == "--dataset"), -4) + 4
    arguments[at:at] = defaults
    with restored_catalogs():
        run_processes(lambda _: None, parse(arguments), train_net.find_input_error)
