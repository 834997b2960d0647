"""Mask proposals, NumPy files and HDF5 that are wrong."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from programs import CONFIG

from mnc_d2.experiments import save_mask_proposals
from mnc_d2.experiments.convert_caffe import main as convert_caffe
from mnc_d2.experiments.mask_proposals import load_mask_proposals

from .common import Case, Code, coco_dataset, flip_bit, run_train_net

FAMILY = "arrays"
BOXES = np.array([[1, 2, 9, 8], [0, 0, 31, 23]], dtype=np.float32)
MASKS = np.ones((2, 5, 5), dtype=np.uint8)
SCORES = np.array([0.5, 0.9], dtype=np.float32)
ARRAYS = {"boxes": BOXES, "masks": MASKS, "scores": SCORES}


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{**ARRAYS, **arrays})
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def archive(entries: dict[str, bytes]) -> bytes:
    """Return a zip file of the entries, and of the right arrays that they do not name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in {**{f"{k}.npy": npy(x) for k, x in ARRAYS.items()}, **entries}.items():
            target.writestr(name, content)
    return file.getvalue()


def claim(shape: str, dtype: str = "<f4", body: bytes = bytes(16)) -> bytes:
    """Return a .npy file whose header says what it has not."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


class _Objects:
    def __reduce__(self):
        return Code().__reduce__()


PROPOSALS: dict[str, bytes] = {
    "empty": b"",
    "text": b"words",
    "a .npy file": npy(BOXES),
    "a pickled .npy file": npy(np.array([_Objects()], dtype=object)),
    "a zip without arrays": archive({})[:0] + b"PK\x05\x06" + bytes(18),
    "no boxes": archive({"boxes.npy": b""}),
    "boxes that are objects": npz(boxes=np.array([_Objects(), None], dtype=object)),
    "masks that are objects": npz(masks=np.array([_Objects(), None], dtype=object)),
    "scores that are texts": npz(scores=np.array(["a", "b"])),
    "boxes that are texts": npz(boxes=np.full((2, 4), "a")),
    "boxes of records": npz(boxes=np.zeros(2, dtype=[("x", "f4")])),
    "boxes that are complex": npz(boxes=BOXES.astype(np.complex64)),
    "boxes that are dates": npz(boxes=BOXES.astype("M8[s]")),
    **{f"boxes of shape {x}": npz(boxes=np.ones(x, np.float32)) for x in ((2,), (2, 3), (4, 2), (3, 4), (2, 4, 1), ())},
    **{
        f"masks of shape {x}": npz(masks=np.ones(x, np.uint8))
        for x in ((2,), (2, 5), (2, 5, 4), (3, 5, 5), (2, 5, 5, 1))
    },
    **{f"scores of shape {x}": npz(scores=np.ones(x, np.float32)) for x in ((), (1,), (3,), (2, 1))},
    **{f"masks of {x}": npz(masks=MASKS.astype(x)) for x in ("f4", "i8", "i1", "u2")},
    **{f"boxes with {x}": npz(boxes=np.full((2, 4), x, np.float32)) for x in (np.nan, np.inf, 0)},
    **{f"scores with {x}": npz(scores=np.array([0.5, x], np.float32)) for x in (np.nan, -np.inf)},
    "boxes turned round": npz(boxes=BOXES[:, ::-1]),
    "a petabyte of boxes": archive({"boxes.npy": claim("(70000000000000, 4)")}),
    "a wrapping number of boxes": archive({"boxes.npy": claim("(4611686018427387904, 4)")}),
    "a negative shape": archive({"boxes.npy": claim("(-2, 4)")}),
    "a shape of 5000 digits": archive({"boxes.npy": claim("(" + "9" * 5000 + ", 4)")}),
    "a header that is code": archive({"boxes.npy": claim("__import__('os').mkdir('code-was-run')")}),
    "a header that is deep": archive({"boxes.npy": claim("(" * 5000)}),
    "an unknown type": archive({"boxes.npy": claim("(2, 4)", "<q9")}),
    "an unknown version": archive({"boxes.npy": b"\x93NUMPY\x09\x00" + npy(BOXES)[8:]}),
    "two gigabytes of zeros": archive({"masks.npy": claim("(2, 32768, 32768)", "|u1")}),
}


def _hdf5(fill: Callable[[h5py.File], Any]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as target:
        fill(target)
    return file.getvalue()


def _layer(shape: tuple[int, ...], **kwargs: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset("data/conv1_1/0", shape, **{"dtype": "f4", **kwargs})


MODELS: dict[str, bytes] = {
    "empty": b"",
    "text": b"words",
    "zeros": bytes(1000),
    "HDF5: its signature": b"\x89HDF\r\n\x1a\n",
    "HDF5: nothing": _hdf5(lambda file: None),
    "HDF5: no layers": _hdf5(lambda file: file.create_group("data")),
    "HDF5: data is an array": _hdf5(lambda file: file.create_dataset("data", (3,), "f4")),
    "HDF5: a layer is an array": _hdf5(lambda file: file.create_dataset("data/conv1_1", (3,), "f4")),
    "HDF5: a parameter without number": _hdf5(lambda file: file.create_dataset("data/conv1_1/weight", (3,), "f4")),
    "HDF5: another shape": _hdf5(_layer((2, 3))),
    "HDF5: no axis": _hdf5(_layer(())),
    "HDF5: texts": _hdf5(_layer((2,), dtype=h5py.string_dtype())),
    "HDF5: a terabyte": _hdf5(_layer((2**20, 2**18), chunks=(64, 64))),
    "HDF5: an exabyte": _hdf5(_layer((2**30, 2**28), chunks=(64, 64))),
    "HDF5: a link outside": _hdf5(lambda file: file.__setitem__("data", h5py.ExternalLink("/etc/passwd", "/"))),
    "HDF5: a link to nothing": _hdf5(lambda file: file.__setitem__("data", h5py.SoftLink("/nowhere"))),
    "HDF5: a link to itself": _hdf5(lambda file: file.__setitem__("data", h5py.SoftLink("/data"))),
    "protobuf: a length that lies": b"\xa2\x06\xff\xff\xff\xff\x0f",
    "protobuf: cut": b"\xa2\x06\x20\x0a\x07conv1_1",
}


def _train(folder: Path, content: bytes | None) -> str | None:
    """Have the files of mask proposals checked before a training, and read one as the training does."""
    for name in ("1.npz", "2.npz"):
        save_mask_proposals(folder / name, BOXES, MASKS, SCORES)
    (folder / "2.npz").write_bytes(content) if content is not None else (folder / "2.npz").unlink()
    overrides = "INPUT.DATASET_MAPPER_NAME", "MaskProposalMapper", "DATASETS.MASK_PROPOSALS", folder
    run_train_net("--config-file", CONFIG, *coco_dataset(folder), *overrides)
    found = load_mask_proposals(folder / "2.npz")
    order = np.argsort(-SCORES)
    same = np.array_equal(found.proposal_boxes.tensor.numpy(), BOXES[order])
    same &= np.array_equal(found.proposal_masks.numpy() * 255, MASKS[order])
    return None if same else "the proposals are others"


def _convert(folder: Path, content: bytes) -> str | None:
    (folder / "m.h5").write_bytes(content)
    convert_caffe([str(folder / "m.h5"), str(folder / "out.pth")])
    return None


def make_cases(seed: int) -> list[Case]:
    """Return the cases of this family; ``seed`` draws places of bits that are flipped and of cuts."""
    cases = [Case(FAMILY, f"proposals: {n}", lambda d, c=c: _train(d, c), ("2.npz",)) for n, c in PROPOSALS.items()]
    cases.append(Case(FAMILY, "proposals: missing", lambda d: _train(d, None), ("2.npz",)))
    cases += [Case(FAMILY, f"caffe model: {n}", lambda d, c=c: _convert(d, c), ("m.h5",)) for n, c in MODELS.items()]
    generator = random.Random(seed)
    for content in (npz(), archive({})):
        for length in (generator.randrange(1, len(content)) for _ in range(6)):
            cases.append(Case(FAMILY, f"cut to {length}", lambda d, c=content[:length]: _train(d, c), ("2.npz",)))
        for position in (generator.randrange(8 * len(content)) for _ in range(10)):
            flipped = flip_bit(content, position)
            cases.append(Case(FAMILY, f"bit {position}", lambda d, c=flipped: _train(d, c), ("2.npz",), False))
    model = _hdf5(_layer((64, 3, 3, 3)))
    for position in (generator.randrange(8 * len(model)) for _ in range(10)):
        flipped = flip_bit(model, position)
        cases.append(Case(FAMILY, f"HDF5 bit {position}", lambda d, c=flipped: _convert(d, c), ("m.h5",)))
    return cases
