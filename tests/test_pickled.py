"""Pickled checkpoints: the arrays of a model zoo are read, and nothing that a file names is called."""

import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.pickled import read_pickle

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.array([1, 2], dtype=">i4"),
    "bool": np.array([True, False]),
    "no axis": np.array(2.5),
    "empty": np.zeros((0, 4), dtype=np.float16),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_those_that_were_written(tmp_path, protocol):
    others = {
        "n": np.float32(2.5),
        "i": np.int64(-3),
        "list": [1, (2.0, None, "x", b"\xff")],
        "ordered": OrderedDict(a=1),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"arrays": ARRAYS, **others}, protocol))
    content = read_pickle(tmp_path / "x.pkl")
    arrays = content.pop("arrays")
    assert content == others
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype.newbyteorder("=") and type(arrays[name]) is np.ndarray


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_arrays_of_python_2_are_read(tmp_path, core):
    # As Python 2 pickles np.array([1, 258], "<i2"): text for bytes, and the names of NumPy 1 and of NumPy 2.
    content = (
        b"\x80\x02}U\x01wc" + core + b".multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x01\x00\x02\x01tbs."
    )
    (tmp_path / "x.pkl").write_bytes(content)
    assert read_pickle(tmp_path / "x.pkl")["w"].tolist() == [1, 258]


def test_a_model_of_the_zoo_is_loaded(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    model = {"weight": weight, "bias": np.ones(3, dtype=np.float32)}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}))
    linear = nn.Linear(2, 3)
    MNCCheckpointer(linear).load(str(tmp_path / "model_final.pkl"))
    assert linear.weight.equal(torch.from_numpy(weight)) and linear.bias.eq(1).all()


class Code:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["model.pkl", "model.pyth", "model.pth"])
def test_no_code_is_run(tmp_path, name):
    weights = {"weight": np.zeros((1, 1), np.float32)}
    content = {"model": weights, "__author__": Code(Path.touch, tmp_path / "made"), "model_state": weights}
    (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=name) as error:
        MNCCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Code(os.getcwd), "posix.getcwd, which is not admitted as it could run code"),
        (Code(eval, "1"), "builtins.eval"),
        (np.array([None]), "an array of type 'O8'"),
        (np.zeros(2, dtype="M8[s]"), "an array of type 'M8'"),
        (np.zeros(2, dtype=[("a", "f4")]), "an array of type 'V4'"),
        (torch.zeros(1), "torch._utils._rebuild_tensor_v2"),
        ({1, 2}, "builtins.set"),
    ],
    ids=["a function", "eval", "objects", "dates", "records", "a tensor", "a set"],
)
def test_what_is_not_admitted_is_named(tmp_path, value, message):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": value}, 3))
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "x.pkl")


def protocol_4(*opcodes):
    return b"\x80\x04" + b"".join(opcodes) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (pickle.dumps({"a": ARRAYS})[:-30], "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list where a dict should be"),
        (b"no pickle", "cannot be read"),
        (protocol_4(b"]\x94h\x00a"), "recursion"),  # a list in itself
        (protocol_4(b"N", b"r\xff\xff\xff\xff"), "NoneType"),  # an index of four billions, and so much memory for it
        (protocol_4(b"\x8d" + (2**50).to_bytes(8, "little")), "cannot be read"),  # a text of a petabyte
        (protocol_4(b"cnumpy\ndtype\n}\x8c\x06decodeNs\x86b"), "cannot be read"),  # sets an attribute of what it names
        (protocol_4(b"c_codecs\nencode\n\x8c\x01x\x8c\x03zip\x86R"), "encoding 'zip'"),
    ],
    ids=["empty", "cut", "list", "text", "cycle", "memo", "size", "attribute", "codec"],
)
def test_what_is_broken_is_named(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pkl .*{message}"):
        read_pickle(tmp_path / "x.pkl")


def test_what_is_named_many_times_is_read_once(tmp_path):
    # Ten lists, each with the one before ten times: ten billions of elements, were they copied.
    value = [0]
    for _ in range(10):
        value = [value] * 10
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": value}))
    (level,) = read_pickle(tmp_path / "x.pkl").values()
    assert level[0] is level[9]


def test_admitted_functions_stay_as_they_are(tmp_path):
    # A file may give what it names attributes: here __defaults__ of numpy._core.numeric._frombuffer.
    content = protocol_4(b"cnumpy._core.numeric\n_frombuffer\nN}\x8c\x0c__defaults__)s\x86b0}")
    pickletools.dis(content, out=open(os.devnull, "w"))
    (tmp_path / "x.pkl").write_bytes(content)
    assert read_pickle(tmp_path / "x.pkl") == {}
    (tmp_path / "y.pkl").write_bytes(pickle.dumps({"x": ARRAYS["float"]}, 5))
    np.testing.assert_array_equal(read_pickle(tmp_path / "y.pkl")["x"], ARRAYS["float"])
