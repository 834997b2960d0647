"""Pictures of ground truth beside predictions."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from mnc_d2.data import register_coco_dataset
from mnc_d2.evaluation import PredictionPictures

SIZE = 96
PANEL = 640  # small images are enlarged to this width
pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def dataset(coco_dataset):
    register_coco_dataset("drawn", *map(str, coco_dataset))
    return DatasetCatalog.get("drawn")


def predict(*scores, masks=True):
    """Predictions of the whole image, one per score."""
    result = Instances((SIZE, SIZE))
    result.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, SIZE, SIZE]] * len(scores)).view(-1, 4))
    result.scores = torch.tensor(scores)
    result.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    if masks:
        result.pred_masks = torch.ones(len(scores), SIZE, SIZE, dtype=torch.bool)
    return {"instances": result}


def write(dataset, folder, outputs, num_pictures=10, **kwargs):
    """Run the evaluator on the images of the dataset; return the pictures by file name."""
    evaluator = PredictionPictures("drawn", str(folder), num_pictures, **kwargs)
    evaluator.reset()
    for record, output in zip(dataset, outputs):
        evaluator.process([record], [output])
    assert evaluator.evaluate() == {}
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


@pytest.mark.parametrize("num_pictures", [1, 2, 5])
def test_the_first_images_get_a_picture_named_after_their_file(dataset, tmp_path, num_pictures):
    pictures = write(dataset, tmp_path / "new", [predict(0.9)] * 2, num_pictures)
    assert sorted(pictures) == ["1.png", "2.png"][:num_pictures]


def halves(picture):
    return picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]


def original(dataset, index=0):
    """The image enlarged, as it is shown."""
    return np.asarray(Image.open(dataset[index]["file_name"]).resize((PANEL, PANEL), Image.Resampling.NEAREST))


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def test_ground_truth_is_on_the_left_and_predictions_on_the_right(dataset, tmp_path):
    left, right = halves(write(dataset, tmp_path, [predict(0.9)])["1.png"])
    nothing_left, nothing_right = halves(write(dataset, tmp_path / "nothing", [predict()])["1.png"])
    assert left.shape == right.shape == (PANEL, PANEL, 3)
    # Without predictions the right is the image; the resampling blurs its edges.
    assert difference(nothing_right, original(dataset)) < 3
    assert difference(right, original(dataset)) > 10
    assert difference(left, original(dataset)) > 10 and difference(nothing_left, original(dataset)) > 10


@pytest.mark.parametrize(("score", "shown"), [(0.6, True), (0.4, False)])
def test_predictions_below_the_score_threshold_are_left_out(dataset, tmp_path, score, shown):
    _, right = halves(write(dataset, tmp_path, [predict(score)], score_threshold=0.5)["1.png"])
    assert (difference(right, original(dataset)) > 10) == shown


def test_colours_are_those_of_the_file(dataset, tmp_path):
    _, right = halves(write(dataset, tmp_path, [predict()])["1.png"])
    # The middle of the disc, red, and of the square, blue.
    disc, square = ([round(x * PANEL / SIZE) for x in center] for center in ((26, 24), (30, 68)))
    assert right[tuple(disc)].tolist() == pytest.approx([230, 60, 40], abs=3)
    assert right[tuple(square)].tolist() == pytest.approx([50, 90, 220], abs=3)


def test_boxes_without_masks_are_drawn(dataset, tmp_path):
    assert "1.png" in write(dataset, tmp_path, [predict(0.9, masks=False)])


def test_nothing_but_the_pictures_is_left_in_the_folder(dataset, tmp_path):
    write(dataset, tmp_path, [predict(0.9)] * 2)
    pictures = write(dataset, tmp_path, [predict(0.9)] * 2)  # over those of the run before
    assert sorted(pictures) == ["1.png", "2.png"]
