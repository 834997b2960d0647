"""Pictures of predictions beside ground truth."""

from __future__ import annotations

import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from PIL import Image

from ..data.images import read_image
from ..files import open_atomically
from ..visualizer import draw_predictions, draw_record


class PredictionPictures(DatasetEvaluator):
    """Write one picture for each of the first images of a dataset: ground truth on the left, predictions on the right.

    In a distributed evaluation each process writes its images that are among the first.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder for the pictures, made if need be; named after the image files.
        num_pictures: how many of the dataset's images get a picture.
        score_threshold: predictions with a lower score are left out.
    """

    def __init__(self, dataset_name: str, output_dir: str, num_pictures: int, score_threshold: float = 0.5) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._records = {x["image_id"]: x for x in DatasetCatalog.get(dataset_name)[:num_pictures]}
        self._output_dir = output_dir
        self._score_threshold = score_threshold

    def reset(self) -> None:
        os.makedirs(self._output_dir, exist_ok=True)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for record, output in zip(inputs, outputs):
            if record["image_id"] in self._records:
                self._write(self._records[record["image_id"]], output["instances"].to("cpu"))

    def _write(self, record: dict, predictions: Instances) -> None:
        image = read_image(record["file_name"])
        shown = predictions[predictions.scores >= self._score_threshold]
        panels = (draw_record(image, record, self._metadata), draw_predictions(image, shown, self._metadata))
        picture = np.concatenate(panels, axis=1)
        name = os.path.splitext(os.path.basename(record["file_name"]))[0] + ".png"
        path = os.path.join(self._output_dir, name)
        with open_atomically(path) as file:
            Image.fromarray(picture).save(file, format="PNG")

    def evaluate(self) -> dict:
        return {}
