"""What a checkpoint says of its model, and the predictor that is made of nothing else."""

import math
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

import mnc_d2
from mnc_d2.checkpoint import ModelDescription, read_description
from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.model_zoo import parse_config
from mnc_d2.predictor import load_model

CLASSES = ["disc", "square"]


def forget_datasets():
    for name in ("drawn",):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def run(coco_dataset, small_config, tmp_path_factory):
    """The folder of a training of two iterations, whose dataset is not registered any more, and its config."""
    folder = tmp_path_factory.mktemp("run")
    register_coco_dataset("drawn", *map(str, coco_dataset))
    MetadataCatalog.get("drawn").thing_colors = [(255, 0, 0), (0, 0, 255)]
    cfg = small_config()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", ("drawn",), "DATASETS.TEST", ("drawn",), "DATALOADER.NUM_WORKERS", 0),
            *("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.IMS_PER_BATCH", 1),
            *("MODEL.ROI_HEADS.NUM_CLASSES", -1, "OUTPUT_DIR", str(folder), "TEST.NUM_PICTURES", 0),
        ]
    )
    MNCTrainer(cfg).train()
    forget_datasets()
    return folder, cfg


def random_image():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_every_checkpoint_of_a_training_describes_its_model(run):
    folder, cfg = run
    for name in ("model_0000000.pth", "model_final.pth"):
        description = read_description(str(folder / name))
        assert (description.class_names, description.category_ids) == (CLASSES, [1, 2])
        assert description.class_colors == [[255, 0, 0], [0, 0, 255]]
        assert (description.dataset, description.version) == ("drawn", mnc_d2.__version__)
        assert parse_config(description.config, "").MODEL.ROI_HEADS.NUM_CLASSES == 2  # which was left to the dataset
        assert parse_config(description.config, "").SOLVER == cfg.SOLVER
        assert all(math.isfinite(description.metrics[name]) for name in ("total_loss", "loss_mask_s4"))


def test_the_final_model_has_the_metrics_of_the_evaluation_after_it(run):
    folder, _ = run
    assert "segm/AP" in read_description(str(folder / "model_final.pth")).metrics
    assert "segm/AP" not in read_description(str(folder / "model_0000000.pth")).metrics


def test_one_file_makes_a_predictor(run, tmp_path):
    folder, cfg = run
    alone = tmp_path / "alone.pth"
    shutil.copy(folder / "model_final.pth", alone)
    predictor = mnc_d2.load_predictor(alone, device="cpu", overrides=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
    assert predictor.metadata.thing_classes == CLASSES
    assert predictor.metadata.thing_colors == [[255, 0, 0], [0, 0, 255]]
    assert not predictor.model.training
    trained = torch.load(alone, weights_only=True)["model"]
    assert all(torch.equal(x, trained[name]) for name, x in load_model(predictor.cfg).state_dict().items())
    one, two = predictor.predict_batch([random_image(), random_image()[::-1]])
    assert len(one["instances"]) > 0
    for image, output in ((random_image(), one), (random_image()[::-1], two)):
        torch.testing.assert_close(predictor(image)["instances"].scores, output["instances"].scores)


def test_a_dataset_may_have_the_models_name_by_now(run, coco_dataset):
    """What the file says holds, whatever is registered."""
    DatasetCatalog.register("drawn", list)
    MetadataCatalog.get("drawn").thing_classes = ["other"]
    try:
        assert mnc_d2.load_predictor(run[0] / "model_final.pth").metadata.thing_classes == CLASSES
    finally:
        forget_datasets()


@pytest.fixture
def bare(small_config, tmp_path):
    """A checkpoint that says nothing, of a model of two classes, and its config."""
    cfg = small_config()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    return tmp_path / "model.pth", cfg


def test_older_checkpoints_have_their_config_beside_them(bare, clean_catalogs):
    path, cfg = bare
    with pytest.raises(FileNotFoundError, match="model.pth does not say what model it is of, and there is no .*config"):
        mnc_d2.load_predictor(path)
    cfg.DATASETS.TRAIN = ("nowhere",)
    (path.parent / "config.yaml").write_text(cfg.dump())
    # A dataset that is not registered has no names, and is not registered by asking.
    assert mnc_d2.load_predictor(path).metadata.thing_classes == ["0", "1"]
    assert "nowhere" not in list(MetadataCatalog)
    cfg.DATASETS.TRAIN = ("known",)
    DatasetCatalog.register("known", list)
    MetadataCatalog.get("known").set(thing_classes=CLASSES, thing_dataset_id_to_contiguous_id={7: 1, 9: 0})
    (path.parent / "config.yaml").write_text(cfg.dump())
    metadata = mnc_d2.load_predictor(path).metadata
    assert (metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id) == (CLASSES, {9: 0, 7: 1})


def test_a_config_can_be_named(bare):
    path, cfg = bare
    file = path.parent / "other.yaml"
    file.write_text(cfg.dump())
    assert mnc_d2.load_predictor(path, config=str(file)).cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    with pytest.raises(FileNotFoundError, match="'nothing.yaml'"):
        mnc_d2.load_predictor(path, config="nothing.yaml")


def load_with(bare, change=None, *overrides):
    """Load the bare checkpoint after a function has changed its state dict."""
    path, cfg = bare
    state = torch.load(path, weights_only=True)["model"]
    if change is not None:
        change(state)
    torch.save({"model": state}, path)
    (path.parent / "config.yaml").write_text(cfg.dump())
    return mnc_d2.load_predictor(path, overrides=overrides)


def test_a_head_that_does_not_fit_is_an_error_with_both_shapes(bare):
    message = r"model.pth does not fit the model: .*cls_score.weight is \(3, 64\) in the checkpoint and \(5, 64\) in"
    with pytest.raises(ValueError, match=message):
        load_with(bare, None, "MODEL.ROI_HEADS.NUM_CLASSES", "4")


def test_weights_that_are_missing_are_named(bare):
    with pytest.raises(ValueError, match="it lacks roi_heads.passes.0.classifier.predictor.cls_score.bias"):
        load_with(bare, lambda state: state.pop("roi_heads.passes.0.classifier.predictor.cls_score.bias"))


def test_weights_that_are_not_finite_are_named(bare):
    with pytest.raises(ValueError, match="not finite: roi_heads.passes.0.mask_head.fc1.bias"):
        load_with(bare, lambda state: state["roi_heads.passes.0.mask_head.fc1.bias"].fill_(math.nan))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.NO_KEY", "1"), "overrides.*NO_KEY"),
        pytest.param(
            ("MODEL.DEVICE", "cuda"),
            "PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_overrides_are_errors(bare, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_with(bare, None, *overrides)


def test_files_that_are_no_models_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        mnc_d2.load_predictor(tmp_path / "nowhere.pth")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png cannot be loaded"):
        mnc_d2.load_predictor(tmp_path / "image.png")


def test_no_code_of_a_description_is_run(tmp_path):
    mark = tmp_path / "mark"
    config = f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{mark}']\n"
    torch.save({"model": {}, "description": {"config": config}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="(?s)the config in .*model.pth: .*python/object/apply:os.mkdir"):
        mnc_d2.load_predictor(tmp_path / "model.pth")
    assert not mark.exists()


def test_entries_of_later_versions_are_left_out():
    assert ModelDescription.from_dict({"config": "x", "flavour": "vanilla"}) == ModelDescription("x")
