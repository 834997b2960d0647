"""mnc predict: pictures, COCO JSON, videos, files that cannot be read."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mnc_d2 import load_predictor
from mnc_d2.cli import main
from mnc_d2.cli.inputs import list_inputs


@pytest.fixture
def folder(tmp_path):
    """A folder of three images, of two sizes, and another file."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (64, 64)), ("b.png", (64, 64)), ("c.png", (48, 64))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(model, inputs, output, *more):
    main(["predict", str(model), *map(str, inputs), "--output", str(output), "--device", "cpu", *map(str, more)])
    return json.loads((output / "predictions.json").read_text())


@pytest.mark.parametrize("batch", [1, 2])
def test_results_are_a_dataset_in_coco_format(model_file, folder, tmp_path, batch):
    output = tmp_path / "out"
    result = predict(model_file, [folder], output, "--score", 0, "--batch", batch)
    assert [x["file_name"] for x in result["images"]] == [str(folder / name) for name in ("a.png", "b.png", "c.png")]
    assert [(x["id"], x["name"]) for x in result["categories"]] == [(1, "disc"), (2, "square")]
    expected = load_predictor(model_file)(cv2.imread(str(folder / "c.png")))["instances"]
    found = [x for x in result["annotations"] if x["image_id"] == 3]
    assert len(found) == len(expected) > 0
    for annotation, i in zip(found, np.argsort(-expected.scores.numpy(), kind="stable")):
        assert annotation["score"] == pytest.approx(expected.scores[i].item(), abs=1e-5)
        mask = mask_util.decode(annotation["segmentation"])
        # Batches of other sizes round differently: a pixel at the threshold may flip.
        assert (mask != expected.pred_masks[i].numpy()).sum() <= 2
        assert annotation["category_id"] == expected.pred_classes[i] + 1
    assert len(COCO(str(output / "predictions.json")).anns) == len(result["annotations"])
    for name in ("a.png", "b.png", "c.png"):
        assert Image.open(output / name).width == 640


def test_images_of_any_shape_are_predicted(model_file, tmp_path):
    sizes = {"dot.png": (1, 1), "high.png": (3000, 1), "wide.png": (1, 3000)}
    (tmp_path / "thin").mkdir()
    for name, size in sizes.items():
        Image.new("L", size[::-1], 200).save(tmp_path / "thin" / name)
    overrides = ["--set", "INPUT.MIN_SIZE_TEST", "64", "--set", "INPUT.MAX_SIZE_TEST", "100"]
    result = predict(model_file, [tmp_path / "thin"], tmp_path / "out", "--score", 0, *overrides)
    assert [(x["height"], x["width"]) for x in result["images"]] == list(sizes.values())


def test_the_score_decides_what_counts(model_file, folder, tmp_path):
    all_of_them = predict(model_file, [folder / "a.png"], tmp_path / "all", "--score", 0)["annotations"]
    score = sorted(x["score"] for x in all_of_them)[-2]
    some = predict(model_file, [folder / "a.png"], tmp_path / "some", "--score", score - 1e-6)["annotations"]
    assert 0 < len(some) < len(all_of_them)
    assert predict(model_file, [folder / "a.png"], tmp_path / "none", "--score", 1.1)["annotations"] == []


def test_it_goes_on_after_a_bad_image(model_file, folder, tmp_path, capsys):
    (folder / "aa.png").write_bytes(b"no image")
    (folder / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"(?s)cannot be read:\n.*aa.png: .*clip.mp4: OpenCV finds no frame"):
        predict(model_file, [folder], tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png", "b.png", "c.png", "predictions.json"]
    assert "in 3 images" in capsys.readouterr().out


def write_video(path, frames=3):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 40 * i, dtype=np.uint8))
    writer.release()


def test_a_video_becomes_an_mp4_with_the_same_frames(model_file, tmp_path):
    write_video(tmp_path / "clip.avi")
    result = predict(model_file, [tmp_path / "clip.avi"], tmp_path / "out", "--batch", 2)
    assert [x["frame"] for x in result["images"]] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "predictions.json"]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (3, 10)
    there, frame = capture.read()
    assert there and frame.shape == (480, 640, 3)  # enlarged, as pictures are


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["{folder}", "--batch", "0"], "--batch must be at least 1"),
        (["{folder}", "--set", "MODEL.NO_KEY", "1"], "NO_KEY"),
    ],
)
def test_wrong_input_ends_in_one_sentence(model_file, folder, tmp_path, arguments, message):
    arguments = [x.format(folder=folder) for x in arguments]
    with pytest.raises(SystemExit, match=f"mnc predict: .*{message}"):
        main(["predict", str(model_file), *arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no image .* and no video"):
        list_inputs([str(tmp_path)], "out")


def test_pictures_that_would_overwrite_one_another_are_refused(folder):
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg and .*a.png would have the same name"):
        list_inputs([str(folder)], "pictures")
    with pytest.raises(ValueError, match="b.png would overwrite an image"):
        list_inputs([str(folder / "b.png")], str(folder))


def test_an_image_given_twice_is_one():
    assert list_inputs([__file__, __file__], "out") == {__file__: "out/test_predict.png"}
