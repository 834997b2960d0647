"""Exported models, traced for an image of one size, beside the model itself on images of others."""

import json
import runpy
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from mnc_d2.checkpoint import ModelDescription
from mnc_d2.cli import main
from mnc_d2.export import export_model, writer
from mnc_d2.export.network import CandidateNetwork
from mnc_d2.predictor import load_model, load_predictor

onnx = pytest.importorskip("onnx")
for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package)

# (height, width); in the last, all boxes are smaller than MODEL.PROPOSAL_GENERATOR.MIN_SIZE.
SIZES = [(160, 200), (64, 64), (75, 150), (33, 40), (3, 40)]
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchvision", "detectron2", "mnc_d2"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_image(size):
    return np.random.default_rng(size[1]).integers(0, 256, (*size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def checkpoint(small_config, tmp_path_factory):
    """An untrained model of two classes that is less sure of some boxes than of others."""
    torch.manual_seed(1)
    cfg = small_config(
        **{
            "INPUT.MIN_SIZE_TEST": 0,
            # Two levels each are half a minute less than five and four. Boxes of more than 112 pixels are p3's.
            "MODEL.RPN.IN_FEATURES": ["p4", "p6"],
            "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32], [96, 150]],
            "MODEL.FPN.NORM": "",  # GroupNorm refuses maps of one pixel where it has a group for each channel
            "MODEL.MNC.NEXT_PASS_MIN_SCORE": 0.8,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
        }
    )
    model = build_model(cfg)
    predictor = model.roi_heads.get_pass(0).classifier.predictor
    with torch.no_grad():
        for layer, factor in ((predictor.cls_score, 100), (predictor.seg_cls_score, 100), (predictor.bbox_pred, 100)):
            layer.weight *= factor
    description = ModelDescription(cfg.dump(), ["disc", "square"], [], [1, 7], "drawn", "0", {})
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    torch.save({"model": model.state_dict(), "description": asdict(description)}, path)
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return load_predictor(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def program(predictor):
    """What torch.export makes of the model: once, as it takes its time."""
    return writer.trace(CandidateNetwork(load_model(predictor.cfg)).eval())


@pytest.fixture(scope="module")
def files(checkpoint, program, tmp_path_factory):
    """The folder with the model as model.onnx, with int8 weights as int8.onnx, and as model.pt2."""
    folder = tmp_path_factory.mktemp("exported") / "made" / "for it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "trace", lambda network: program)
        main(["export", str(checkpoint), "--format", "onnx", "--output", str(folder / "model.onnx")])
        main(["export", str(checkpoint), "--format", "torch", "--output", str(folder / "model.pt2")])
        # A program can only be converted to ONNX once, which also takes its time.
        converted = SimpleNamespace(model_proto=onnx.load(folder / "model.onnx"))
        patch.setattr(torch.onnx, "export", lambda *_, **__: converted)
        int8 = ["--weights", "int8", "--output", str(folder / "int8.onnx")]
        main(["export", str(checkpoint), "--format", "onnx", *int8])
    return folder


@pytest.fixture(scope="module")
def client(files):
    """The predictor of the client beside the ONNX file."""
    return runpy.run_path(str(files / "client.py"))["Predictor"](str(files / "model.onnx"), threads=1)


def candidates_of(predictor, image):
    """The candidates of the model itself, in the order of the outputs of the exported one."""
    heads = predictor.model.roi_heads
    with torch.no_grad():
        features, proposals = predictor.model.propose([predictor._to_input(image[:, :, ::-1])])
        outputs = heads.predict(features, proposals)
    regress = heads.get_pass(0).classifier.predictor.predict_class_boxes
    columns = [
        (x.boxes, x.seg_cls_probabilities[:, :-1], x.masks, regress(x.boxes, x.predictions.deltas)) for x in outputs
    ]
    return [torch.cat(x).numpy() for x in zip(*columns)], [len(x.boxes) for x in outputs]


# Convolutions and sums are in another order than PyTorch's: pixels, probabilities.
TOLERANCES = (0.01, 1e-4, 1e-4, 0.01)


@pytest.mark.parametrize("size", SIZES)
def test_onnx_has_the_candidates_of_the_model(size, predictor, client):
    image = make_image(size)
    expected, counts = candidates_of(predictor, image)
    # Some boxes go on to the second pass and some do not; or there are none.
    assert 0 < counts[1] < counts[0] if size[0] > 3 else counts == [0, 0]
    for found, reference, tolerance in zip(client.run(client.prepare(image)), expected, TOLERANCES):
        np.testing.assert_allclose(found, reference, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_client_finds_what_the_model_finds(size, predictor, client):
    image = make_image(size)
    expected = predictor(image[:, :, ::-1])["instances"]
    found = client(image)
    assert (len(expected) > 0) == (size != SIZES[-1])
    np.testing.assert_array_equal(found["classes"], expected.pred_classes)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["boxes"], expected.pred_boxes.tensor, atol=0.01, rtol=0)
    masks = expected.pred_masks.numpy()
    assert found["masks"].shape == masks.shape
    assert (found["masks"] == masks).mean() >= 0.999 if masks.size else True


def test_int8_weights_make_a_smaller_file_of_nearly_the_same_results(files, client):
    assert (files / "int8.onnx").stat().st_size < 0.6 * (files / "model.onnx").stat().st_size
    quantised = runpy.run_path(str(files / "client.py"))["Predictor"](str(files / "int8.onnx"), threads=1)
    assert quantised.settings == client.settings
    image = client.prepare(make_image(SIZES[0]))
    (boxes, scores, masks, _), (found, found_scores, found_masks, _) = client.run(image), quantised.run(image)
    # Stage 1 has no fully connected layer: the same proposals. Of what follows, 8 bits leave about two digits; the
    # weights of this model's scores are a hundred times those of a trained one.
    count = min(len(boxes), len(found), 10)
    np.testing.assert_allclose(found[:count], boxes[:count], atol=0.01)
    assert 0 < np.abs(found_masks[:count] - masks[:count]).max() < 0.02
    assert np.abs(found_scores[:count] - scores[:count]).mean() < 0.1


def test_int8_weights_are_for_onnx(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="Only the format onnx can have int8 weights, not torch"):
        export_model(checkpoint, tmp_path / "model.pt2", "torch", weights="int8")
    with pytest.raises(ValueError, match="The weights must be one of float32, int8, got 'int4'"):
        export_model(checkpoint, tmp_path / "model.onnx", "onnx", weights="int4")


def test_torch_export_is_the_model_again(files, predictor):
    extra_files = {"mnc_d2.json": ""}
    module = torch.export.load(files / "model.pt2", extra_files=extra_files).module()
    assert json.loads(extra_files["mnc_d2.json"])["class_names"] == ["disc", "square"]
    for size in SIZES:
        image = make_image(size)
        with torch.no_grad():
            found = module(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)))
        expected, _ = candidates_of(predictor, image)
        assert list(found) == ["boxes", "scores", "masks", "class_boxes"]
        for values, reference, tolerance in zip(found.values(), expected, TOLERANCES):
            np.testing.assert_allclose(values, reference, atol=tolerance, rtol=0, err_msg=str(size))


def test_the_file_says_what_a_client_needs(client, predictor):
    cfg = predictor.cfg
    assert client.settings["class_names"] == ["disc", "square"] and client.settings["category_ids"] == [1, 7]
    assert client.settings["input"] == {"format": "RGB", "short_side": 0, "long_side": cfg.INPUT.MAX_SIZE_TEST}
    assert client.settings["stages"] == 5
    assert client.settings["voting"] == {
        "score_threshold": 0.2,
        "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        "voting_iou_threshold": 0.5,
        "mask_threshold": cfg.MODEL.MNC.MASK_THRESHOLD,
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "detection_box": cfg.MODEL.MNC.DETECTION_BOX,
    }


def run_client(folder, *arguments):
    """Run the client in a process that has neither PyTorch nor this project."""
    command = [sys.executable, "-c", WITHOUT_TORCH, folder / "client.py", *arguments]
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False, cwd=folder)


def test_the_client_runs_without_torch(files, tmp_path, client):
    paths = []
    for name, size in (("a", SIZES[0]), ("b", SIZES[-1])):
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(make_image(size)).save(paths[-1])
    result = run_client(files, "model.onnx", *paths, "--output", tmp_path / "new" / "results.json", "--score", 0.3)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "disc"}, {"id": 7, "name": "square"}]
    assert [(x["height"], x["width"]) for x in content["images"]] == [SIZES[0], SIZES[-1]]
    expected = client(make_image(SIZES[0]))
    kept = expected["scores"] >= 0.3
    assert len(content["annotations"]) == kept.sum() > 0
    for annotation, mask in zip(content["annotations"], expected["masks"][kept]):
        assert annotation["image_id"] == 1 and annotation["score"] >= 0.3
        np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), mask)

    result = run_client(files, "model.onnx", *paths, "--output", tmp_path / "masks", "--score", 0.3)
    assert result.returncode == 0, result.stderr
    labels = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    np.testing.assert_array_equal(labels > 0, expected["masks"][kept].any(axis=0))
    assert not np.asarray(Image.open(tmp_path / "masks" / "b.png")).any()


def test_what_is_wrong_is_said_in_a_sentence(files, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "text.onnx").write_text("no model")
    Predictor = runpy.run_path(str(files / "client.py"))["Predictor"]
    with pytest.raises(ValueError, match="onnxruntime cannot load the model .*text.onnx"):
        Predictor(str(tmp_path / "text.onnx"))
    with pytest.raises(FileNotFoundError, match="The model .*none.onnx does not exist"):
        Predictor(str(tmp_path / "none.onnx"))
    with pytest.raises(SystemExit, match="mnc export: .*none.pth does not exist"):
        main(["export", "none.pth", "--format", "torch", "--output", str(tmp_path / "model.pt2")])
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ONNX needs the package onnx and onnxscript: pip install 'mnc_d2\[export\]'"):
        export_model(checkpoint, tmp_path / "model.onnx", "onnx")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.MASK_ON", False, "MASK_ON"),
        ("MODEL.ROI_HEADS.NAME", "PaperMNCROIHeads", "MODEL.ROI_HEADS.NAME PaperMNCROIHeads"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "RPN"),
        ("MODEL.META_ARCHITECTURE", "CaffeMultitaskNetworkCascade", "META_ARCHITECTURE"),
    ],
)
def test_parts_that_cannot_be_exported_are_named(small_config, key, value, message):
    with pytest.raises(ValueError, match=message):
        CandidateNetwork(build_model(small_config(**{key: value})))


@pytest.mark.parametrize("name, message", [("mnc_VGG_16", "backbone VGG16"), ("mnc_R_50_C4", "Res5BoxHead")])
def test_networks_that_cannot_be_exported_are_named(small_config, name, message):
    cfg = small_config(f"COCO-InstanceSegmentation/{name}.yaml", **{"MODEL.MNC.MASK_FC_DIM": 8})
    with pytest.raises(ValueError, match=message):
        CandidateNetwork(build_model(cfg))
