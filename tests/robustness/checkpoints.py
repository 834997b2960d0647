"""Checkpoints that are wrong: damaged, with code in them, of another model, and what ``last_checkpoint`` names."""

from __future__ import annotations

import functools
import io
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from torch import nn

from mnc_d2.checkpoint import CompleteCheckpointer, MNCCheckpointer, ModelDescription
from mnc_d2.model_zoo import get_config
from mnc_d2.predictor import load_predictor

from .common import MARK, Case, Code, flip_bit

FAMILY = "checkpoints"
SHAPE = (3, 40)
WEIGHTS = {"weight": torch.arange(120.0).reshape(SHAPE), "bias": torch.tensor([1.0, 2.0, 3.0])}
ARRAYS = {name: x.numpy() for name, x in WEIGHTS.items()}


def saved(content: Any, **kwargs: Any) -> bytes:
    """Return what ``torch.save`` makes of something."""
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def _with(name: str, value: Any) -> dict[str, Any]:
    return {**WEIGHTS, name: value}


def _changed(index: int, value: float) -> torch.Tensor:
    weight = WEIGHTS["weight"].clone()
    weight.view(-1)[index] = value
    return weight


WRONG: dict[str, tuple[str, bytes]] = {
    "empty": ("m.pth", b""),
    "text": ("m.pth", b"words"),
    "zeros": ("m.pth", bytes(1000)),
    "a zip of nothing": ("m.pth", b"PK\x05\x06" + bytes(18)),
    "an HDF5 file": ("m.pth", b"\x89HDF\r\n\x1a\n" + bytes(500)),
    "a tensor": ("m.pth", saved(torch.zeros(1))),
    "a list": ("m.pth", saved([1, 2])),
    "a number": ("m.pth", saved(1)),
    "an empty dict": ("m.pth", saved({})),
    "an empty model": ("m.pth", saved({"model": {}})),
    "a model that is a list": ("m.pth", saved({"model": [1]})),
    "a model that is None": ("m.pth", saved({"model": None})),
    "a whole module": ("m.pth", saved(nn.Linear(1, 1))),
    "code": ("m.pth", saved({"model": WEIGHTS, "x": Code()})),
    "code in the old format": ("m.pth", saved({"model": WEIGHTS, "x": Code()}, _use_new_zipfile_serialization=False)),
    "pickled code": ("m.pth", pickle.dumps(Code())),
    "other names": ("m.pth", saved({"a": torch.zeros(1), "b": torch.zeros(2)})),
    "a name that is a number": ("m.pth", saved({1: torch.zeros(1)})),
    "a weight that is a list": ("m.pth", saved(_with("weight", [1.0]))),
    "a weight that is None": ("m.pth", saved(_with("weight", None))),
    "a weight that is text": ("m.pth", saved(_with("bias", "words"))),
    "a weight that is nan": ("m.pth", saved(_with("weight", _changed(5, float("nan"))))),
    "a weight that is infinite": ("m.pth", saved(_with("weight", _changed(5, float("inf"))))),
    "another shape": ("m.pth", saved(_with("weight", torch.zeros(4, 40)))),
    "another number of axes": ("m.pth", saved(_with("weight", torch.zeros(120)))),
    "no axis": ("m.pth", saved(_with("weight", torch.tensor(1.0)))),
    "no element": ("m.pth", saved(_with("weight", torch.zeros(0, 40)))),
    "without a bias": ("m.pth", saved({"weight": WEIGHTS["weight"]})),
    "sparse": ("m.pth", saved(_with("weight", WEIGHTS["weight"].to_sparse()))),
    "on the meta device": ("m.pth", saved(_with("weight", torch.zeros(SHAPE, device="meta")))),
    "pkl: empty": ("m.pkl", b""),
    "pkl: text": ("m.pkl", b"words"),
    "pkl: cut": ("m.pkl", pickle.dumps({"model": ARRAYS, "__author__": "x"})[:200]),
    "pkl: a list": ("m.pkl", pickle.dumps([1])),
    "pkl: a number": ("m.pkl", pickle.dumps(1)),
    "pkl: empty dict": ("m.pkl", pickle.dumps({})),
    "pkl: a model that is a list": ("m.pkl", pickle.dumps({"model": [1], "__author__": "x"})),
    "pkl: code": ("m.pkl", pickle.dumps({"model": ARRAYS, "__author__": Code()})),
    "pkl: code alone": ("m.pkl", pickle.dumps(Code())),
    "pkl: code as a name": ("m.pkl", pickle.dumps({(Code(),): 1})),
    "pkl: os.mkdir by hand": ("m.pkl", b"cos\nmkdir\n(V" + MARK.encode() + b"\ntR."),
    "pkl: eval by hand": ("m.pkl", b"cbuiltins\neval\n(V__import__('os').mkdir('" + MARK.encode() + b"')\ntR."),
    "pkl: os.mkdir by INST": ("m.pkl", b"(V" + MARK.encode() + b"\nios\nmkdir\n."),
    "pkl: getattr of a module": ("m.pkl", b"cbuiltins\ngetattr\n(cos\npath\nVjoin\ntR."),
    "pkl: numpy.load": ("m.pkl", b"cnumpy\nload\n(Vx\ntR."),
    "pkl: an array of objects": ("m.pkl", pickle.dumps({"model": {"weight": np.array([None])}, "__author__": "x"})),
    "pkl: a weight that is text": ("m.pkl", pickle.dumps({"model": {"weight": "words"}, "__author__": "x"})),
    "pkl: a name that is a number": ("m.pkl", pickle.dumps({"model": {1: ARRAYS["bias"]}, "__author__": "x"})),
    "pkl: other names": ("m.pkl", pickle.dumps({"model": {"a": ARRAYS["bias"]}, "__author__": "x"})),
    "pkl: Caffe2, other names": ("m.pkl", pickle.dumps({"blobs": {"conv1_w": ARRAYS["weight"]}})),
    "pkl: Caffe2, blobs that are a list": ("m.pkl", pickle.dumps({"blobs": [1]})),
    "pkl: tensors": ("m.pkl", pickle.dumps({"model": WEIGHTS, "__author__": "x"})),
    "pkl: of torch.save": ("m.pkl", saved({"model": WEIGHTS})),
    "pkl: a shape that lies": (
        "m.pkl",
        pickle.dumps({"model": ARRAYS, "__author__": "x"}, 2).replace(b"K\x03K(\x86", b"K\x7fK(\x86"),
    ),
    "pkl: an index of four billions": ("m.pkl", b"\x80\x04Nr\xff\xff\xff\xff."),
    "pkl: a list in itself": ("m.pkl", b"\x80\x04}\x94\x8c\x05model]\x94h\x01as\x8c\n__author__Ns."),
    "pyth: empty": ("m.pyth", b""),
    "pyth: code": ("m.pyth", pickle.dumps(Code())),
    "pyth: no model_state": ("m.pyth", saved({"model": WEIGHTS})),
    "a folder": ("m.pth", b"FOLDER"),
}
TAGS = {
    "nothing": b"",
    "a space": b" ",
    "what is not there": b"model_0000009.pth",
    "what is outside": b"../outside.pth",
    "an absolute path": b"/etc/passwd",
    "a pickle": b"code.pkl",
    "a pickle outside": b"../code.pkl",
    "an address": b"https://nowhere.invalid/model.pth",
    "a zero byte": b"model\0.pth",
    "bytes": bytes(range(128, 256)),
    "the folder": b".",
    "itself": b"last_checkpoint",
    "two lines": b"model_0000001.pth\nmodel_0000002.pth",
    "10000 characters": b"a" * 10000,
}


def _load(file: str, tolerated: int = 0) -> str | None:
    """Load into a model; return what is wrong with it afterwards.

    Args:
        file: the checkpoint.
        tolerated: the number of elements that may differ from those of WEIGHTS.
    """
    model = nn.Linear(*SHAPE[::-1])
    CompleteCheckpointer(model).load(file)
    others = sum(int((x != WEIGHTS[name]).sum()) for name, x in model.state_dict().items())
    return None if others <= tolerated else "the model has other weights"


def _use(folder: Path, file: str, content: bytes, tolerated: int = 0) -> str | None:
    path = folder / file
    if content == b"FOLDER":
        path.mkdir()
    else:
        path.write_bytes(content)
    return _load(str(path), tolerated)


def _resume(folder: Path, tag: bytes) -> str | None:
    run = folder / "run"
    run.mkdir()
    for iteration in (1, 2):
        weights = {name: x + iteration for name, x in WEIGHTS.items()}
        (run / f"model_{iteration:07d}.pth").write_bytes(saved({"model": weights, "iteration": iteration}))
    (folder / "outside.pth").write_bytes(saved({"model": WEIGHTS, "iteration": 9}))
    for path in (run, folder):
        (path / "code.pkl").write_bytes(pickle.dumps(Code()))
    (run / "last_checkpoint").write_bytes(tag)
    model = nn.Linear(*SHAPE[::-1])
    found = MNCCheckpointer(model, str(run)).resume_or_load("", resume=True).get("iteration")
    right = found == 2 and torch.equal(model.bias, WEIGHTS["bias"] + 2)
    return None if right else f"it is resumed from iteration {found}"


@functools.cache
def _model() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A small model of this project: its weights and its description."""
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    sizes = {"MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 8, "MODEL.MNC.MASK_FC_DIM": 8}
    sizes |= {"MODEL.ROI_HEADS.NUM_CLASSES": 2, "MODEL.DEVICE": "cpu"}
    cfg.merge_from_list([x for pair in sizes.items() for x in pair])
    return build_model(cfg).state_dict(), asdict(ModelDescription(cfg.dump(), ["a", "b"], [], [1, 2], "d", "0", {}))


def _predict(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str | None:
    weights, description = _model()
    description = dict(description)
    changed = change(description)
    torch.save({"model": weights, "description": description if changed is None else changed}, folder / "m.pth")
    predictor = load_predictor(folder / "m.pth", device="cpu")
    predictor(np.zeros((96, 96, 3), np.uint8))
    return None


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.__setitem__(key, value)


def _edit(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.__setitem__("config", description["config"].replace(old, new))


DESCRIPTIONS = {
    "is a list": lambda _: [1],
    "is text": lambda _: "words",
    "is a number": lambda _: 1,
    "without config": lambda description: description.pop("config") and None,
    **{f"config {str(x)[:20]!r}": _set("config", x) for x in (None, 1, [], {}, "words", "- 1", "\0", "SOLVER: 1")},
    "a tag in its config": _set("config", f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{MARK}']"),
    "another number of classes": _edit("NUM_CLASSES: 2", "NUM_CLASSES: 3"),
    "another architecture": _edit("META_ARCHITECTURE: MultitaskNetworkCascade", "META_ARCHITECTURE: RetinaNet"),
    "an unknown architecture": _edit("META_ARCHITECTURE: MultitaskNetworkCascade", "META_ARCHITECTURE: Nowhere"),
    "another width": _edit("OUT_CHANNELS: 32", "OUT_CHANNELS: 64"),
    "an unknown key": _edit("SEED:", "SEEDS:"),
    **{f"class_names {x}": _set("class_names", x) for x in (None, 1, "ab", ["a"], ["a", "b", "c"], [1, 2], {"a": 1})},
    **{f"class_colors {x}": _set("class_colors", x) for x in (1, [[1, 2, 3]], [[300, 0, 0], [0, 0, 0]], ["x", "y"])},
    **{f"category_ids {x}": _set("category_ids", x) for x in (1, [1], ["a", "b"], [1, 1], [[1], [2]])},
}


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family; ``seed`` draws places of bits that are flipped and of cuts."""
    cases = []
    for name, (file, content) in WRONG.items():
        cases.append(Case(FAMILY, name, lambda d, f=file, c=content: _use(d, f, c), (file,)))
    for path in ("missing.pth", "nowhere://model.pth", "torchvision://nowhere"):
        cases.append(Case(FAMILY, f"path {path!r}", lambda _, p=path: _load(p), (path,)))
    for name, tag in TAGS.items():
        cases.append(
            Case(FAMILY, f"last_checkpoint names {name}", lambda d, t=tag: _resume(d, t), ("last_checkpoint",), False)
        )
    for name, change in DESCRIPTIONS.items():
        cases.append(Case(FAMILY, f"a description: {name}", lambda d, c=change: _predict(d, c), ("m.pth",)))
    generator = random.Random(seed)
    kinds = {
        "m.pth": saved({"model": WEIGHTS, "iteration": 1}),
        "old.pth": saved({"model": WEIGHTS}, _use_new_zipfile_serialization=False),
        "m.pkl": pickle.dumps({"model": ARRAYS, "__author__": "x"}),
    }
    for file, content in kinds.items():
        for length in (generator.randrange(1, len(content)) for _ in range(8)):
            cut = content[:length]
            cases.append(Case(FAMILY, f"{file} cut to {length} bytes", lambda d, f=file, c=cut: _use(d, f, c), (file,)))
        for position in (generator.randrange(8 * len(content)) for _ in range(12)):
            flipped = flip_bit(content, position)
            # The old format and pickles have no check sums: one number is another.
            run = partial(_use, file=file, content=flipped, tolerated=int(file != "m.pth"))
            cases.append(Case(FAMILY, f"{file} with bit {position} flipped", run, (file,), False))
    return cases
