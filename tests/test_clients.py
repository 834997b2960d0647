"""Programs of others that take a Detectron2 model: each gets what it expects."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils.video_visualizer import VideoVisualizer

from mnc_d2 import load_predictor
from mnc_d2.checkpoint import DescribeModel

NAMES = ["disc", "square"]
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)  # BGR


@pytest.fixture(scope="module")
def files(small_config, tmp_path_factory):
    """The model file of a small model that was not trained, and the config beside it."""
    torch.manual_seed(0)
    folder, cfg = tmp_path_factory.mktemp("model"), small_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    description = {**DescribeModel(cfg).state_dict(), "class_names": NAMES, "category_ids": [1, 2]}
    torch.save({"model": build_model(cfg).state_dict(), "description": description}, folder / "model_final.pth")
    return folder / "model_final.pth", folder / "config.yaml"


@pytest.fixture(scope="module")
def predictor(files):
    return load_predictor(files[0], device="cpu")


@pytest.fixture(scope="module")
def expected(predictor):
    instances = predictor(IMAGE)["instances"]
    assert len(instances) > 0
    return instances


def test_default_predictor_takes_config_and_file(predictor, expected):
    found = DefaultPredictor(predictor.cfg)(IMAGE)["instances"]
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


def test_test_time_augmentation(predictor):
    model = GeneralizedRCNNWithTTA(predictor.cfg, predictor.model)
    image = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 64, "width": 80}])
    assert output["instances"].pred_masks.shape[1:] == (64, 80) and len(output["instances"]) > 0


def test_video_visualizer_has_the_names(predictor, expected):
    visualizer = VideoVisualizer(predictor.metadata)
    for _ in range(2):
        picture = visualizer.draw_instance_predictions(IMAGE[:, :, ::-1], expected)
    assert {text.get_text().split()[0] for text in picture.ax.texts} <= set(NAMES)
    assert len(picture.ax.texts) > 0


def test_supervision_with_class_names(predictor, expected):
    supervision = pytest.importorskip("supervision", reason="the package supervision is not installed")
    detections = supervision.Detections.from_detectron2(predictor(IMAGE))
    detections["class_name"] = np.array(predictor.metadata.thing_classes)[detections.class_id]
    assert len(detections) == len(expected) and detections.mask.shape == (len(expected), 64, 80)
    assert detections["class_name"].tolist() == [NAMES[i] for i in expected.pred_classes]
    supervision.MaskAnnotator().annotate(IMAGE.copy(), detections)
    supervision.LabelAnnotator().annotate(IMAGE.copy(), detections)


def sahi_model(**arguments):
    """A model of sahi, which takes RGB."""
    sahi = pytest.importorskip("sahi", reason="the package sahi is not installed")
    return sahi.AutoDetectionModel.from_pretrained(
        "detectron2",
        device="cpu",
        confidence_threshold=0.0,
        category_mapping={str(i): name for i, name in enumerate(NAMES)},
        **arguments,
    )


def sahi_predictions(model):
    from sahi.predict import get_prediction

    found = get_prediction(np.ascontiguousarray(IMAGE[:, :, ::-1]), model).object_prediction_list
    return sorted((x.score.value, x.category.name) for x in found)


def test_sahi_with_a_predictor(predictor, expected):
    model = sahi_model(load_at_init=False)
    model.model = predictor
    found = sahi_predictions(model)
    # sahi drops masks of few pixels, of which it can make no polygon.
    wanted = sorted(zip(expected.scores.tolist(), [NAMES[i] for i in expected.pred_classes]))
    assert len(found) > 0 and set(found) <= set(wanted)


def test_sahi_with_the_files_of_a_run(files):
    model = sahi_model(model_path=str(files[0]), config_path=str(files[1]))
    assert len(sahi_predictions(model)) > 0
