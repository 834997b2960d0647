"""The command that draws what a model finds in images, and the predictor behind it."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from mnc_d2 import demo
from mnc_d2.predictor import MNCPredictor


@pytest.fixture
def model_files(small_config, tmp_path):
    """Config and weights of a small model that has not been trained."""
    torch.manual_seed(0)
    cfg = small_config()
    cfg.DATASETS.TEST = ()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return cfg, tmp_path / "config.yaml"


@pytest.fixture
def folder(tmp_path):
    """A folder of two images and another file."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("b.JPG", (60, 90, 3)), ("a.png", (80, 70, 3))):
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(config, folder, output, *more):
    demo.main(["--config-file", str(config), "--input", str(folder), "--output", str(output), *more])


def test_every_image_gets_a_picture_of_its_size(model_files, folder, tmp_path):
    output = tmp_path / "new" / "pictures"
    run(model_files[1], folder, output, "--score-threshold", "0")
    assert sorted(x.name for x in output.iterdir()) == ["a.png", "b.png"]
    with Image.open(output / "a.png") as picture:
        assert picture.size == (70, 80)


def test_only_instances_of_the_score_are_drawn(model_files, folder, tmp_path):
    image = np.asarray(Image.open(folder / "a.png"))
    for threshold, changed in (("0", True), ("1.1", False)):
        run(model_files[1], folder / "a.png", tmp_path / threshold, "--score-threshold", threshold)
        picture = np.asarray(Image.open(tmp_path / threshold / "a.png")).astype(int)
        # The drawing goes through matplotlib, which may round.
        assert (np.abs(picture - image).max() > 50) == changed


def test_instances_have_the_names_of_their_classes(model_files, folder, tmp_path, monkeypatch):
    cfg, config = model_files
    seen = []
    monkeypatch.setattr(demo, "draw", lambda image, _, metadata: seen.append(metadata) or Image.fromarray(image))
    run(config, folder / "a.png", tmp_path, "DATASETS.TEST", "('shapes_val',)")
    assert seen == [MetadataCatalog.get("shapes_val")]


def test_the_predictor_gives_what_detectron2s_does(model_files, folder):
    cfg, _ = model_files
    image = np.asarray(Image.open(folder / "a.png"))[:, :, ::-1]
    ours, theirs = (predictor(cfg)(image)["instances"] for predictor in (MNCPredictor, DefaultPredictor))
    assert len(ours) > 0 and torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)


def test_the_predictor_resizes_as_the_config_says(model_files):
    cfg, _ = model_files
    cfg.INPUT.EXACT_SCALE_TEST = True
    predictor = MNCPredictor(cfg)
    given = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0]["image"]))
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    predictor(image)
    expected = predictor.aug.get_transform(image).apply_image(image)
    assert cfg.INPUT.FORMAT == "RGB" and given[0].shape == (3, 64, 78)
    assert torch.equal(given[0], torch.from_numpy(expected[:, :, ::-1].transpose(2, 0, 1).copy()))
    assert not torch.equal(given[0], given[0].round())


def test_a_config_of_this_project_is_found_by_name(model_files):
    weights = model_files[0].MODEL.WEIGHTS
    cfg = demo.build_config("quickstart/mnc_R_18_FPN.yaml", ["MODEL.WEIGHTS", weights])
    assert cfg.MODEL.META_ARCHITECTURE == "MultitaskNetworkCascade"
    assert cfg.MODEL.META_ARCHITECTURE != get_cfg().MODEL.META_ARCHITECTURE


def test_no_code_of_a_config_is_run(tmp_path):
    path, mark = tmp_path / "config.yaml", tmp_path / "mark"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ValueError, match="(?s)config.yaml: .*python/object/apply:os.mkdir"):
        demo.build_config(str(path), [])
    assert not mark.exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["MODEL.WEIGHTS", ""], "no weights: add MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS nowhere.pth does not exist"),
        (["MODEL.NO_KEY", "1"], "NO_KEY"),
        pytest.param(
            ["MODEL.DEVICE", "cuda"],
            "PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_overrides_end_in_one_sentence(model_files, folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"mnc_d2.demo: .*{message}"):
        run(model_files[1], folder, tmp_path / "pictures", *more)
    assert not (tmp_path / "pictures").exists()


def test_wrong_images_are_named(model_files, folder, tmp_path):
    config = model_files[1]
    with pytest.raises(SystemExit, match="nowhere.png does not exist"):
        run(config, tmp_path / "nowhere.png", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty has no image"):
        run(config, tmp_path / "empty", tmp_path)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="broken.png cannot be read"):
        run(config, folder / "broken.png", tmp_path)
    with pytest.raises(SystemExit, match="nothing.yaml"):
        run(tmp_path / "nothing.yaml", folder, tmp_path)


def test_pictures_that_would_overwrite_one_another_are_refused(folder):
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg and .*a.png would have the same name"):
        demo.list_images([str(folder)], "pictures")


def test_an_image_given_twice_is_one():
    assert demo.list_images([__file__, __file__], "out") == {__file__: "out/test_demo.png"}


def test_images_are_not_overwritten(model_files, folder):
    before = (folder / "a.png").read_bytes()
    with pytest.raises(SystemExit, match="a.png would overwrite an image"):
        run(model_files[1], folder, folder)
    assert (folder / "a.png").read_bytes() == before


def test_an_image_format_that_predictors_do_not_know_is_named(model_files):
    cfg, _ = model_files
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(ValueError, match="INPUT.FORMAT must be .*'YUV-BT.601'"):
        MNCPredictor(cfg)
