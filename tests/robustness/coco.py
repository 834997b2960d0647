"""Annotations in COCO's format that are wrong: their outline, single values, polygons, run lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mnc_d2.data import MNCDatasetMapper, register_coco_dataset

from .common import Case, flip_bit

FAMILY = "coco"
H, W = 24, 32
HUGE = [3e7, -1e9, 1e300, 2**31, 2**63, 10**400]
NOT_NUMBERS = [None, "1", "", [], {}, True, float("nan"), float("inf"), [1], {"a": 1}]

# What is no value of a key.
WRONG = {
    ("annotations", "id"): [*NOT_NUMBERS, 1.5, 2**63, 2],
    ("annotations", "image_id"): [*NOT_NUMBERS, 99, 1.5, "1"],
    ("annotations", "category_id"): [*NOT_NUMBERS, 99, 0, 1.5],
    ("annotations", "bbox"): [
        *NOT_NUMBERS,
        *([2, 2, 7], [2, 2, 7, 6, 1], [2, 2, -7, 6], [2, 2, 7, "6"], [2, 2, 7, None], [2, 2, 7, True], [[2, 2, 7, 6]]),
        *([2, 2, x, 6] for x in HUGE),
        *([x, 2, 7, 6] for x in (W, -7, *HUGE)),
        *([2, x, 7, 6] for x in (H, -6, float("nan"))),
    ],
    ("annotations", "area"): [x for x in NOT_NUMBERS if x is not True] + [-1, 10**400],
    ("annotations", "iscrowd"): ["yes", "1", None, 2, -1, 0.5, [], {}],
    ("annotations", "difficult"): ["yes", None, 2],
    ("annotations", "ignore"): [1, "yes", True],
    ("annotations", "keypoints"): ["x", ["x", 1, 2], [float("nan"), 1, 2], {"a": 1}],
    ("annotations", "segmentation"): [
        *(True, 1, "polygon", {"a": 1}, [1], ["polygon"], [None], [{}], [[]], [[[]]]),
        *([[2, 2, 9, 2]], [[2, 2, 9, 2, 9, 8, 2]], [[2, 2, 9, 2, 9, "8"]], [[2, 2, 9, 2, 9, None]], [2, 2, 9, 2, 9, 8]),
        *([[2, 2, x, 2, 9, 8]] for x in (*HUGE, float("nan"), float("inf"))),
        [[0, 0, W, H] * 4000],
        *(
            {"size": [H, W], "counts": x}
            for x in (None, 1, [], "", "o" * 30, "\ud800", "é", [-1, H * W + 1], [1.0, 767.0])
        ),
        *({"size": [H, W], "counts": x} for x in ([H * W, 1], [H * W - 1], [2**63, 1], [2**32, H * W], [True, 767])),
        *(
            {"size": x, "counts": [20, 30, H * W - 50]}
            for x in ([W, H], [H], None, "x", [float(H), W], [0, 0], [2**32, 2**32])
        ),
        {"size": [2**32, 2**32], "counts": [2**63]},
    ],
    ("images", "id"): [None, [], {}, True, 1.5, 2**63, "1", 2, float("nan")],
    ("images", "file_name"): [None, 1, [], "", "missing.png", "..", ".", "\0", "\ud800", "a" * 300, "annotations.json"],
    ("images", "height"): [*NOT_NUMBERS, 0, -1, 24.0, 25, 2**63, 10**400],
    ("images", "width"): [None, "32", 0, -1, 31, 1e9],
    ("categories", "id"): [None, "1", [], True, 1.5, 2**63, 5],
    ("categories", "name"): [None, 1, [], {}, "\ud800"],
}
TEXTS = {
    "empty": "",
    "no JSON": "{'images': []}",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "cut": '{"images": [{"id": 1',
    "nested deep": "[" * 100000,
    "nested deep in a key": '{"images": ' + "[" * 100000 + "]" * 100000 + "}",
    "two": "{} {}",
    "XML": "<annotation></annotation>",
    "an integer of 10000 digits": '{"images": ' + "9" * 10000 + "}",
}


def valid_dataset() -> dict[str, list[dict[str, Any]]]:
    polygon = [[2, 2, 9, 2, 9, 8, 2, 8]]
    rle = {"size": [H, W], "counts": [20, 30, H * W - 50]}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": i,
                "bbox": [2, 2, 7, 6],
                "area": 42,
                "iscrowd": 0,
                "segmentation": mask,
            }
            for i, mask in ((1, polygon), (2, rle))
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 5, "name": "c"}],
    }


def use(content: str | bytes, folder: Path) -> str | None:
    """Register annotations and map all images as in training; return what is wrong with the result."""
    path = folder / "annotations.json"
    if isinstance(content, str):
        content = content.encode("utf-8", errors="surrogatepass")
    path.write_bytes(content)
    for i in (1, 2):
        Image.new("RGB", (W, H)).save(folder / f"{i}.png")
    try:
        register_coco_dataset("bad", str(path), str(folder))
        mapper = MNCDatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
        found = sum(len(mapper(record)["instances"]) for record in DatasetCatalog.get("bad"))
    finally:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if "bad" in catalog:
                catalog.remove("bad")
    if path.read_bytes() != content:
        return "the file was changed"
    expected = len(json.loads(content)["annotations"])
    return None if found == expected else f"{found} of {expected} instances are trained on"


def _case(name: str, content: str | bytes | Callable[[], str], is_bad: bool = True) -> Case:
    def run(folder: Path) -> str | None:
        return use(content() if callable(content) else content, folder)

    return Case(FAMILY, name, run, ("annotations.json",), is_bad)


def _replaced(kind: str, key: str, value: Any) -> str:
    dataset = valid_dataset()
    dataset[kind][0][key] = value
    return json.dumps(dataset)


def _without(kind: str, key: str) -> str:
    dataset = valid_dataset()
    del dataset[kind][0][key]
    return json.dumps(dataset)


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family; ``seed`` draws the bits that are flipped and random run lengths."""
    cases = [_case(name, text) for name, text in TEXTS.items()]
    cases += [_case("UTF-16", json.dumps(valid_dataset()).encode("utf-16")), _case("bytes", bytes(range(256)))]
    for kind in valid_dataset():
        for value in (None, {}, "x", [None], [[]], [1]):
            cases.append(_case(f"{kind} is {value}", json.dumps({**valid_dataset(), kind: value})))
        cases.append(_case(f"no {kind}", json.dumps({k: x for k, x in valid_dataset().items() if k != kind})))
    for kind in ("images", "categories"):
        cases.append(_case(f"empty {kind}", json.dumps({**valid_dataset(), kind: []})))
    for (kind, key), values in WRONG.items():
        cases += [_case(f"{key} of {kind} {str(x)[:40]}", partial(_replaced, kind, key, x)) for x in values]
    required = [("annotations", x) for x in ("id", "image_id", "category_id")]
    required += [("images", x) for x in ("id", "file_name", "height", "width")]
    required += [("categories", x) for x in ("id", "name")]
    cases += [_case(f"{kind} without {key}", _without(kind, key)) for kind, key in required]
    generator = random.Random(seed)
    text = json.dumps(valid_dataset()).encode()
    for _ in range(20):
        position = generator.randrange(8 * len(text))
        cases.append(_case(f"bit {position} flipped", flip_bit(text, position), is_bad=False))
    for length in generator.sample(range(1, 40), 10):
        counts = "".join(chr(generator.randrange(48, 112)) for _ in range(length))
        content = _replaced("annotations", "segmentation", {"size": [H, W], "counts": counts})
        cases.append(_case(f"run lengths {counts}", content, is_bad=False))
    return cases
