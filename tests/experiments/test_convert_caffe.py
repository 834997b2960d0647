"""The released Caffe model: reading both of its formats, and what becomes of each layer."""

import struct
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from mnc_d2.experiments import caffe_model
from mnc_d2.experiments.caffe_model import read_caffe_model
from mnc_d2.experiments.convert_caffe import LAYERS, convert_file, convert_layers, main
from mnc_d2.model_zoo import get_config

# Two anchors, two classes and the background.
SMALL = {
    "conv1_1": ("backbone.conv1_1", (4, 3, 3, 3)),
    "rpn_cls_score": ("rpn.objectness_logits", (4, 5, 1, 1)),
    "fc6": ("box_path_head.fc1", (6, 20)),
    "cls_score": ("predictor.cls_score", (3, 6)),
    "seg_cls_score": ("predictor.seg_cls_score", (3, 6)),
    "bbox_pred": ("predictor.bbox_pred", (12, 6)),
}


@pytest.fixture
def layers():
    generator = np.random.default_rng(0)
    result = {
        name: [generator.standard_normal(x).astype(np.float32) for x in (shape, shape[:1])]
        for name, (_, shape) in SMALL.items()
    }
    return {"data": [], **result, "fc6_ext": [], "relu6": []}


def write_hdf5(path, layers):
    h5py = pytest.importorskip("h5py", reason="h5py is an optional extra")
    with h5py.File(path, "w") as file:
        for name, arrays in layers.items():
            group = file.create_group(f"data/{name}")
            for index, array in enumerate(arrays):
                group[str(index)] = array


def varint(value):
    parts = []
    while True:
        value, low = value >> 7, value & 0x7F
        parts.append(low | (0x80 if value else 0))
        if not value:
            return bytes(parts)


def field(number, payload):
    """A field of bytes, a string or a message, as protobuf's wire format has it; an integer is a varint."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def blob(array, legacy=False, double=False):
    if legacy:  # four sizes, 1 for those that the array does not have
        sizes = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(field(number, size) for number, size in enumerate(sizes, start=1))
    else:
        shape = field(7, field(1, b"".join(varint(size) for size in array.shape)))
    code = "d" if double else "f"
    return shape + field(8 if double else 5, struct.pack(f"<{array.size}{code}", *array.ravel().tolist()))


def write_protobuf(path, layers, legacy=False, double=False):
    """A NetParameter, the numbers of its fields from the public caffe.proto, with fields that hold no parameters."""
    pytest.importorskip("google.protobuf", reason="protobuf is an optional extra")
    content = field(1, b"a net") + field(3, b"input of the net")
    for name, arrays in layers.items():
        blobs = [blob(array, legacy, double) for array in arrays]
        if legacy:
            layer = field(4, name.encode()) + field(5, 14) + b"".join(field(6, x) for x in blobs)
        else:
            layer = field(1, name.encode()) + field(2, b"Type") + b"".join(field(7, x) for x in blobs)
        content += field(2 if legacy else 100, layer)
    path.write_bytes(content)


WRITERS = {
    "HDF5": write_hdf5,
    "protobuf": write_protobuf,
    "legacy protobuf": lambda path, layers: write_protobuf(path, layers, legacy=True),
    "protobuf of doubles": lambda path, layers: write_protobuf(path, layers, double=True),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_every_format_is_read(tmp_path, layers, write):
    path = tmp_path / "model"  # the content tells the format, not the name
    write(path, layers)
    read = read_caffe_model(path)
    assert set(read) == set(layers)
    for name, arrays in layers.items():
        assert len(read[name]) == len(arrays)
        for ours, theirs in zip(read[name], arrays):
            assert ours.dtype == np.float32 and np.array_equal(ours.reshape(theirs.shape), theirs)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_file_becomes_a_checkpoint_of_tensors_only(tmp_path, layers, write):
    source, target = tmp_path / "model.caffemodel", tmp_path / "new" / "model.pth"
    write(source, layers)
    assert convert_file(str(source), str(target), SMALL) == []
    checkpoint = torch.load(target, weights_only=True)
    expected, _ = convert_layers(layers, SMALL)
    assert set(checkpoint["model"]) == set(expected)
    assert len(checkpoint["description"]["class_names"]) == 20
    assert all(torch.equal(checkpoint["model"][key], value) for key, value in expected.items())
    assert {x.name for x in target.parent.iterdir()} == {target.name}


def test_layers_without_an_order_of_their_own_keep_their_values(layers):
    state, unused = convert_layers(layers, SMALL)
    assert unused == []
    for layer in ("conv1_1", "fc6"):
        for kind, array in zip(("weight", "bias"), layers[layer]):
            assert np.array_equal(state[f"{SMALL[layer][0]}.{kind}"], array)


def test_the_objectness_is_the_softmax_of_background_and_object(layers):
    state, _ = convert_layers(layers, SMALL)
    x = np.random.default_rng(1).standard_normal(5)
    weight, bias = (array.reshape(len(array), -1).astype(np.float64) for array in layers["rpn_cls_score"])
    scores = weight @ x + bias[:, 0]  # background of both anchors, object of both anchors
    logits = state["rpn.objectness_logits.weight"][:, :, 0, 0].numpy() @ x + state["rpn.objectness_logits.bias"].numpy()
    for anchor in range(2):
        background, foreground = np.exp(scores[anchor]), np.exp(scores[2 + anchor])
        assert 1 / (1 + np.exp(-logits[anchor])) == pytest.approx(foreground / (background + foreground), abs=1e-6)


@pytest.mark.parametrize("layer, rows", [("cls_score", 1), ("seg_cls_score", 1), ("bbox_pred", 4)])
def test_the_background_comes_last(layers, layer, rows):
    state, _ = convert_layers(layers, SMALL)
    for kind, array in zip(("weight", "bias"), layers[layer]):
        theirs = array.reshape(3, rows, *array.shape[1:])  # background, first class, second class
        ours = state[f"{SMALL[layer][0]}.{kind}"].numpy().reshape(theirs.shape)
        assert np.array_equal(ours, np.stack((theirs[1], theirs[2], theirs[0])))


def test_parameters_of_no_use_are_named(layers):
    layers["extra"] = [np.zeros(2, np.float32), np.zeros(3, np.float32)]
    layers["fc6"].append(np.zeros(1, np.float32))
    _, unused = convert_layers(layers, SMALL)
    assert sorted(unused) == ["extra/0", "extra/1", "fc6/2"]


def test_a_layer_that_repeats_what_it_shares_is_no_surplus(layers):
    layers["fc6_ext"] = [array.copy() for array in layers["fc6"]]
    assert convert_layers(layers, SMALL)[1] == []


@pytest.mark.parametrize("change", [lambda x: [x[0] + 1, x[1]], lambda x: x[:1], lambda x: [x[0], x[1][:1]]])
def test_a_second_pass_with_weights_of_its_own_is_refused(layers, change):
    layers["fc6_ext"] = change(layers["fc6"])
    with pytest.raises(ValueError, match="fc6_ext must share the parameters of fc6"):
        convert_layers(layers, SMALL)


def test_wrong_layers_are_all_named(layers):
    del layers["conv1_1"]
    layers["cls_score"] = [np.zeros((4, 6), np.float32), np.zeros(4, np.float32)]
    with pytest.raises(ValueError, match=r"conv1_1 must .*none; cls_score must .*\(3, 6\).* it has \(4, 6\)"):
        convert_layers(layers, SMALL)


def test_axes_that_matter_are_not_dropped(layers):
    layers["conv1_1"][0] = layers["conv1_1"][0][None].repeat(2, axis=0)
    with pytest.raises(ValueError, match="conv1_1"):
        convert_layers(layers, SMALL)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x89HDF\r\n\x1a\n damaged", b"\x0a\xff\xff\xff\xff"])
def test_other_files_are_named(tmp_path, content):
    pytest.importorskip("h5py", reason="h5py is an optional extra")
    path = tmp_path / "model.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.caffemodel"):
        read_caffe_model(path)


@pytest.mark.parametrize("name", ["numbers", "data", "data/fc6/weight"])
def test_an_hdf5_file_of_something_else_is_named(tmp_path, name):
    h5py = pytest.importorskip("h5py", reason="h5py is an optional extra")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file[name] = [1, 2, 3]
    with pytest.raises(ValueError, match="other.h5 .*not a Caffe model"):
        read_caffe_model(tmp_path / "other.h5")


def test_an_hdf5_file_that_claims_terabytes_takes_no_memory(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is an optional extra")
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("data/fc6/0", shape=(2**20, 2**20), dtype="f4", chunks=(64, 64))
    with pytest.raises(ValueError, match="large.h5 .*claims 4398046511104 bytes"):
        read_caffe_model(tmp_path / "large.h5")


def test_a_blob_of_another_size_than_it_says_is_named(tmp_path):
    pytest.importorskip("google.protobuf", reason="protobuf is an optional extra")
    values = blob(np.zeros(3, np.float32))
    path = tmp_path / "model.caffemodel"
    path.write_bytes(field(100, field(1, b"fc6") + field(7, values + field(7, field(1, varint(5))))))
    with pytest.raises(ValueError, match="model.caffemodel: layer fc6 has 3 values"):
        read_caffe_model(path)


@pytest.mark.parametrize(
    "package, module, content",
    [("h5py", "h5py", caffe_model._HDF5_SIGNATURE), ("protobuf", "google.protobuf.message", b"\x0a\x01a")],
)
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, monkeypatch, package, module, content):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "model.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ImportError, match=rf"package {package}\. .*pip install 'mnc_d2\[caffe\]'"):
        read_caffe_model(path)


def test_a_failure_leaves_no_file(tmp_path, layers, monkeypatch):
    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    write_hdf5(tmp_path / "model.h5", layers)
    with pytest.raises(OSError, match="no space left"):
        convert_file(str(tmp_path / "model.h5"), str(tmp_path / "model.pth"), SMALL)
    assert [x.name for x in tmp_path.iterdir()] == ["model.h5"]


def test_the_command_ends_with_one_sentence_that_names_the_file(tmp_path, layers):
    with pytest.raises(SystemExit, match="convert_caffe: .*nowhere.h5"):
        main([str(tmp_path / "nowhere.h5"), str(tmp_path / "model.pth")])
    write_hdf5(tmp_path / "small.h5", layers)
    with pytest.raises(SystemExit, match="small.h5: This is not the released .* conv1_2 must"):
        main([str(tmp_path / "small.h5"), str(tmp_path / "model.pth")])


def test_the_target_must_be_what_detectron2_reads_as_pytorchs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model.h5"), str(tmp_path / "model.pkl")])
    assert "model.pkl must end in .pth" in capsys.readouterr().err


def test_the_layers_are_those_of_the_config():
    """By name and shape, each parameter of the model once."""
    cfg = get_config("PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage_caffe.yaml")
    # Fully connected layers of 1.1 GB are not needed to see their shapes.
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    given = {}
    for layer, (module, shape) in LAYERS.items():
        shape = (shape[0] // 2, *shape[1:]) if layer == "rpn_cls_score" else shape
        given.update({f"{module}.weight": shape, f"{module}.bias": shape[:1]})
    assert given == expected
