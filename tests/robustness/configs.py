"""Configs that are wrong: values on the command line, YAML files, what they inherit from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from programs import CONFIG

from .common import MARK, Case, coco_dataset, flip_bit, run_train_net

FAMILY = "configs"

POSITIVE = """
    INPUT.MAX_SIZE_TRAIN MODEL.MNC.MASK_FC_DIM MODEL.MNC.MASK_SIZE MODEL.MNC.NUM_PASSES_TEST MODEL.MNC.NUM_PASSES_TRAIN
    MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE MODEL.RPN.BATCH_SIZE_PER_IMAGE
    MODEL.RPN.POST_NMS_TOPK_TRAIN MODEL.RPN.PRE_NMS_TOPK_TEST SOLVER.ACCUMULATE SOLVER.CHECKPOINT_PERIOD
    SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER TEST.DETECTIONS_PER_IMAGE
""".split()
FLOATS = "SOLVER.BASE_LR SOLVER.WEIGHT_DECAY SOLVER.MOMENTUM SOLVER.GAMMA MODEL.MNC.MASK_LOSS_WEIGHT".split()
OVERRIDES: list[tuple[str, Any]] = [
    *((key, value) for key in POSITIVE for value in (0, -1, "word")),
    *((key, value) for key in FLOATS for value in ("-1.0", "float('nan')", "1e999", "-1e999", "[1.0]", "None")),
    *(("MODEL.MNC.MASK_THRESHOLD", x) for x in ("1.5", "-0.1", "1e999", "half")),
    *(("MODEL.ROI_HEADS.IOU_THRESHOLDS", x) for x in ("[]", "[0.3, 0.5]", "['x']", "[None]", "0.5")),
    *(("MODEL.PIXEL_MEAN", x) for x in ("[]", "[1.0]", "['x', 'y', 'z']", "[None, 1.0, 1.0]", "1.0")),
    *(("MODEL.PIXEL_STD", x) for x in ("[0.0, 1.0, 1.0]", "[-1.0, 1.0, 1.0]", "[1.0, 1.0]")),
    *(("SOLVER.STEPS", x) for x in ("(20, 10)", "(0,)", "('x',)", "(10, 10)", "(-5,)", "(None,)", "((1,), 2)")),
    *(("INPUT.MIN_SIZE_TRAIN", x) for x in ("()", "(-1,)", "('x',)", "((1, 2),)", "(1.5,)")),
    *(("INPUT.CROP.SIZE", x) for x in ("[]", "[0, 0]", "[-1, -1]", "['x', 1]", "[1]")),
    *(("DATASETS.TRAIN", x) for x in ("('nowhere',)", "(1,)", "nowhere", "(None,)", "()")),
    *(("DATASETS.TEST", x) for x in ("('nowhere',)", "(1,)", "(None,)")),
    ("INPUT.DATASET_MAPPER_NAME", "MaskProposalMapper"),  # with a folder that does not exist
    *(("MODEL.DEVICE", x) for x in ("cuda", "gpu", "cpu:x", "", "tpu:0", "meta")),
    *(("MODEL.WEIGHTS", x) for x in ("missing.pth", ".", "\0")),
    *(("OUTPUT_DIR", x) for x in ("", "/proc/nowhere", "1.png", "1.png/under", "\0", "a" * 300)),
    *(("MODEL.META_ARCHITECTURE", x) for x in ("", "Nowhere", "os.system")),
    *(("MODEL.BACKBONE.NAME", x) for x in ("", "build_nowhere")),
    *(("MODEL.ROI_HEADS.IN_FEATURES", x) for x in ("[]", "['p9']", "[1]", "p2")),
    *(("MODEL.ROI_HEADS.NUM_CLASSES", x) for x in (0, -2, 7, "many")),
    *(("MODEL.ANCHOR_GENERATOR.SIZES", x) for x in ("[]", "[[]]", "[[-1]]", "[['x']]", "[[0]]", "[[1e999]]")),
    *(("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", x) for x in ("[]", "[[]]", "[[0.0]]", "[[-1.0]]", "[['x']]")),
    *(("MODEL.RPN.BBOX_REG_WEIGHTS", x) for x in ("(1.0,)", "()", "(0.0, 1.0, 1.0, 1.0)", "('x', 1, 1, 1)")),
    *(("MODEL.RESNETS.DEPTH", x) for x in (0, 17, -18)),
    *(("MODEL.FPN.OUT_CHANNELS", x) for x in (0, -1, 33)),
    *(("SOLVER.OPTIMIZER", x) for x in ("sgd", "", 1)),
    *(("SOLVER.LR_SCHEDULER_NAME", x) for x in ("", "Nowhere")),
    *(("SOLVER.AMP.PRECISION", x) for x in ("float8", "", 16)),
    *(("SOLVER.PATIENCE", x) for x in (3, "few")),
    *(("INPUT.FORMAT", x) for x in ("L", "rgb", "", "YUV-BT.601")),
    *(("INPUT.MASK_FORMAT", x) for x in ("polygon", "", "nowhere")),
    *(("TEST.EVALUATORS", x) for x in ("", "voc", "['voc']", "['coco', 'sds']", "[1]")),
    *(("MODEL.MNC.OUTPUTS", x) for x in ("[]", "['nowhere']", "[1]")),
    *(("MODEL.MNC.INFERENCE_PRECISION", x) for x in ("float64", "", "int8")),
    *(("MODEL.MNC.GRADIENTS", x) for x in ("some", "", True, "coordinates=some", "released, stepwise", "border")),
    *(("MODEL.MNC.DETECTION_BOX", x) for x in ("", "loose")),
    *(("MODEL.MNC.BACKGROUND_BANDS", x) for x in ("[]", "[[0.0, 0.5]]", "[[0.0, 0.5, -1.0]]", "[['x', 'y', 'z']]")),
    ("MODEL.MNC.BOX_GRADIENT", "True"),  # a key of before
    *(("SEED", x) for x in (2**31, "2.5", "seed")),
    *(("DATALOADER.NUM_WORKERS", x) for x in (-1, "two")),
    *(("DATALOADER.SAMPLER_TRAIN", x) for x in ("", "Nowhere")),
    *((key, "1") for key in ("NOWHERE", "MODEL.NOWHERE", "MODEL.MNC", "", ".", "MODEL..DEVICE", "MODEL.DEVICE.X")),
    *(("SOLVER.MAX_ITER", x) for x in ("(" * 5000, "9" * 5000, "1 +", "__import__('os')", "[1, 2", "\0", "")),
]
# A file by name; the config is c.yaml.
BASE = f"_BASE_: {CONFIG}\n"
TAG = f"!!python/object/apply:os.mkdir ['{MARK}']"
FILES: dict[str, dict[str, str | bytes]] = {
    "empty": {"c.yaml": "- "},
    "a list": {"c.yaml": "- 1\n- 2\n"},
    "a text": {"c.yaml": "words\n"},
    "no YAML": {"c.yaml": "a: [1, 2\nb: }\n"},
    "tabs": {"c.yaml": "SOLVER:\n\tMAX_ITER: 5\n"},
    "bytes": {"c.yaml": bytes(range(256))},
    "UTF-16 without a mark": {"c.yaml": "SEED: 1".encode("utf-16-le")},
    "an unknown key": {"c.yaml": "SOLVER:\n  NOWHERE: 1\n"},
    "a section where a value is": {"c.yaml": "SOLVER:\n  MAX_ITER: {a: 1}\n"},
    "a value where a section is": {"c.yaml": "SOLVER: 1\n"},
    "null": {"c.yaml": "SOLVER: null\n"},
    "a date": {"c.yaml": "SOLVER:\n  MAX_ITER: 2020-01-01\n"},
    "a key that is a list": {"c.yaml": "? [1, 2]\n: 3\n"},
    "a key that is a number": {"c.yaml": "1: 2\n"},
    "an unknown anchor": {"c.yaml": "SEED: *nowhere\n"},
    "nested deep": {"c.yaml": "SEED: " + "[" * 5000 + "]" * 5000},
    "nan": {"c.yaml": f"{BASE}SOLVER:\n  BASE_LR: .nan\n"},
    "a tag": {"c.yaml": f"OUTPUT_DIR: {TAG}\n"},
    "a tag in a list": {"c.yaml": f"DATASETS:\n  TRAIN: [{TAG}]\n"},
    "a tag as key": {"c.yaml": f"? {TAG}\n: 1\n"},
    "a tag under a merge": {"c.yaml": f"<<: {TAG}\n"},
    "a module": {"c.yaml": "OUTPUT_DIR: !!python/module:os\n"},
    "a name": {"c.yaml": "OUTPUT_DIR: !!python/name:os.system\n"},
    "a new object": {"c.yaml": f"OUTPUT_DIR: !!python/object/new:os.mkdir ['{MARK}']\n"},
    "a tag of its own": {"c.yaml": "OUTPUT_DIR: !nowhere x\n"},
    "a tag in its base": {"c.yaml": "_BASE_: base.yaml\n", "base.yaml": f"OUTPUT_DIR: {TAG}\n"},
    "a tag in the base of its base": {
        "c.yaml": "_BASE_: base.yaml\n",
        "base.yaml": "_BASE_: top.yaml\n",
        "top.yaml": f"OUTPUT_DIR: {TAG}\n",
    },
    "a tag as base": {"c.yaml": f"_BASE_: {TAG}\n"},
    "no base": {"c.yaml": "_BASE_: nowhere.yaml\n"},
    "itself as base": {"c.yaml": "_BASE_: c.yaml\n"},
    "a circle of bases": {"c.yaml": "_BASE_: base.yaml\n", "base.yaml": "_BASE_: c.yaml\n"},
    "a number as base": {"c.yaml": "_BASE_: 1\n"},
    "a folder as base": {"c.yaml": "_BASE_: .\n"},
    "null as base": {"c.yaml": "_BASE_: null\n"},
    "a list of bases": {"c.yaml": "_BASE_: [nowhere.yaml]\n"},
    "bytes as base": {"c.yaml": "_BASE_: base.yaml\n", "base.yaml": bytes(range(256))},
    "billions of laughs": {
        "c.yaml": f"{BASE}SOLVER:\n  STEPS: &a9 "
        + "".join(f"[&a{i} " for i in range(8, -1, -1))
        + "[1, 1]"
        + "".join("," + ",".join([f"*a{i}"] * 9) + "]" for i in range(9))
        + "\n",
    },
}


FLIPPED = b"""
MODEL:
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 64, IN_FEATURES: [p2, p3, p4, p5]}
  MNC: {MASK_SIZE: 28, MASK_THRESHOLD: 0.4, OUTPUTS: [instances]}
SOLVER:
  BASE_LR: 0.002
  STEPS: [100, 200]
INPUT: {MIN_SIZE_TRAIN: [64, 96], FORMAT: BGR}
"""


def _overridden(folder: Path, overrides: Sequence[Any]) -> str | None:
    return run_train_net("--config-file", CONFIG, *coco_dataset(folder), *overrides)


def _from_files(folder: Path, files: dict[str, str | bytes]) -> str | None:
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return run_train_net("--config-file", "c.yaml", *coco_dataset(folder))


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family; ``seed`` draws the bits that are flipped."""
    cases = [
        # A model that cannot be is said in the words of those who build it.
        Case(FAMILY, f"{key} {str(x)[:40]}", lambda d, o=(key, x): _overridden(d, o), _names(key, x))
        for key, x in OVERRIDES
    ]
    for overrides in (("SEED",), ("SEED", 1, "SOLVER.MAX_ITER"), ("=",), ("SEED=1",)):
        cases.append(Case(FAMILY, f"overrides {overrides}", lambda d, o=overrides: _overridden(d, o), ("KEY VALUE",)))
    for name, files in FILES.items():
        names = (*files, "nowhere.yaml", "Is a directory", "OUTPUT_DIR", "BASE_LR")
        cases.append(Case(FAMILY, name, lambda d, f=files: _from_files(d, f), names))
    generator = random.Random(seed)
    for position in (generator.randrange(8 * len(FLIPPED)) for _ in range(20)):
        files = {"c.yaml": BASE.encode() + flip_bit(FLIPPED, position)}
        run = partial(_from_files, files=files)
        cases.append(Case(FAMILY, f"bit {position} flipped", run, ("c.yaml", "The config has no model", "."), False))
    return cases


def _names(key: str, value: Any) -> tuple[str, ...]:
    if value == "MaskProposalMapper":
        return ("DATASETS.MASK_PROPOSALS",)
    of_keys = "SOLVER.STEPS SOLVER.PATIENCE OUTPUT_DIR MODEL.WEIGHTS".split()
    if key in of_keys or key.startswith(("MODEL.MNC", "INPUT", "TEST")):
        return (key,)
    return key.split(".")[-1] or "KEY VALUE", "KEY VALUE", "The config has no model", f"'{value}'"
