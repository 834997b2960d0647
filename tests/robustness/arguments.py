"""Command lines that are wrong: of train_net.py and of the command ``mnc``."""

from __future__ import annotations

from pathlib import Path

import torch

from mnc_d2.cli import main as mnc

from .common import Case, coco_dataset, run_train_net

FAMILY = "arguments"
TRAIN_NET = [
    *(("--num-gpus", x) for x in ("-1", "x", "1.5", "", "nan", "3")),
    *(("--num-machines", x) for x in ("0", "-1", "x", "2")),
    *(("--machine-rank", x) for x in ("1", "-1", "x")),
    *(("--dist-timeout", x) for x in ("0", "-1", "nan", "inf", "1e300", "x")),
    ("--num-machines", "2", "--dist-url", "auto"),
    ("--nowhere",),
    ("--eval-only",),
    ("--eval-only", "--resume", "OUTPUT_DIR", "nowhere"),
    *(("--config-file", x) for x in ("", "nowhere.yaml", ".", "1.png", "annotations.json", "\0")),
    ("--dataset", "a", "b"),
    ("--dataset", "a", "nowhere.json", "."),
    ("--dataset", "a", "annotations.json", "nowhere"),
    ("--dataset", "bad", "2.json", "."),
    ("--dataset", "", "nowhere.json", ""),
    ("--dataset", "coco_2017_train", "annotations.json", "."),
]
MODEL = "words.pth"  # which is no model
MNC = [
    (),
    ("nowhere",),
    ("train",),
    ("train", "nowhere.yaml"),
    ("train", "quickstart/mnc_shapes.yaml", "--data"),
    ("train", "quickstart/mnc_shapes.yaml", "--data", "nowhere"),
    ("train", "quickstart/mnc_shapes.yaml", "--data", "1.png"),
    ("train", "quickstart/mnc_shapes.yaml", "--data", "empty"),
    ("train", "nowhere", "--data", "annotations.json"),
    ("predict",),
    ("predict", MODEL),
    ("predict", "nowhere.pth", "1.png", "--output", "out"),
    ("predict", MODEL, "1.png", "--output", "out"),
    ("predict", MODEL, "nowhere.png", "--output", "out"),
    ("predict", MODEL, "empty", "--output", "out"),
    ("predict", MODEL, "annotations.json", "--output", "out"),
    *(("predict", MODEL, "1.png", "--output", "out", "--batch", x) for x in ("0", "-1", "x", "1.5")),
    *(("predict", MODEL, "1.png", "--output", "out", "--score", x) for x in ("x", "nan", "2")),
    ("predict", MODEL, "1.png", "--output", "1.png"),
    ("predict", MODEL, "1.png", "--output", "out", "--device", "gpu"),
    ("predict", MODEL, "1.png", "--output", "out", "--config", "nowhere.yaml"),
    ("predict", MODEL, "1.png", "--output", "out", "--set", "SEED"),
    ("predict", MODEL, "1.png", "--output", "out", "--config", "quickstart/mnc_shapes.yaml", "--set", "NOWHERE", "1"),
    ("info",),
    *(("info", x) for x in ("nowhere.pth", MODEL, "1.png", ".", "nowhere.yaml", "annotations.json")),
    ("eval",),
    ("eval", "nowhere.pth", "--data", "annotations.json"),
    ("eval", MODEL, "--data", "nowhere.json"),
    ("eval", MODEL, "--data", "annotations.json"),
    ("report",),
    *(("report", x) for x in ("nowhere", "empty", "1.png")),
    ("data",),
    *(("data", x, "--output", "out") for x in ("nowhere", "empty", "1.png", "1.yaml", MODEL)),
    *(("data", "annotations.json", "--output", "out", "--split", x) for x in ("0", "1", "-1", "x", "nan", "2")),
    *(("data", "annotations.json", "--output", "out", "--augmentations", x) for x in ("-1", "x", "0")),
    ("data", "annotations.json", "--output", "1.png", "--split", "0.5"),
    ("data", "annotations.json", "--output", "out", "--subset", "nowhere"),
]


def _prepare(folder: Path) -> list[str]:
    arguments = coco_dataset(folder)
    (folder / MODEL).write_bytes(b"words")
    (folder / "1.yaml").write_text("words")
    (folder / "2.json").write_text((folder / "annotations.json").read_text())
    (folder / "empty").mkdir()
    return arguments


def _train_net(folder: Path, arguments: tuple[str, ...]) -> str | None:
    dataset = _prepare(folder)
    return run_train_net(*dataset, *arguments, "MODEL.ROI_HEADS.NUM_CLASSES", "-1")


def _mnc(folder: Path, arguments: tuple[str, ...]) -> str | None:
    _prepare(folder)
    mnc([*arguments, *(["--device", "cpu"] if "--device" not in arguments and arguments[:1] == ("predict",) else [])])
    return None


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family, which draws nothing by the seed."""
    several = torch.cuda.device_count() > 2
    cases = []
    for arguments in TRAIN_NET:
        if arguments == ("--num-gpus", "3") and several:
            continue
        names = tuple(x for x in arguments if x) + ("usage", "IMS_PER_BATCH", "machines", "evaluate", "NUM_CLASSES")
        cases.append(
            Case(FAMILY, "train_net.py " + " ".join(arguments), lambda d, a=arguments: _train_net(d, a), names)
        )
    for arguments in MNC:
        names = tuple(x for x in arguments[1:] if x) + ("COMMAND", "required", "invalid")
        cases.append(Case(FAMILY, "mnc " + " ".join(arguments), lambda d, a=arguments: _mnc(d, a), names))
    return cases
