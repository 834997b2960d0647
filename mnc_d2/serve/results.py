"""What a model finds in an image, to be shown by any score without running the model again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from ..evaluation.coco_output import CocoOutput
from ..evaluation.predictions import instances_from_results
from ..predictor import MNCPredictor
from ..report.passes import clear_detections
from ..visualizer import draw_predictions

# Detections below are not kept: an untrained guess in every corner.
MIN_SCORE = 0.05
# Sides of pictures, in pixels, at most: labels in larger ones could not be read on a screen.
_LONGEST_SIDE = 1280


@dataclass(frozen=True)
class View:
    """Detections in an image, at one point of the cascade.

    Attributes:
        title: such as "Pass 1".
        caption: what is shown.
        coco: the detections, in COCO format, by descending score.
    """

    title: str
    caption: str
    coco: CocoOutput


class ImageResult:
    """What a model finds in an image: after each pass of the cascade, and in the end.

    Masks are kept as run lengths, and of the image what pictures need.

    Attributes:
        name: of the image.
        size: its height and width in pixels.
        views: one for each pass, if the model says what they find, and the final one.
    """

    def __init__(self, predictor: MNCPredictor, name: str, image: np.ndarray) -> None:
        """
        Args:
            predictor: the model; it is run.
            name: of the image.
            image: uint8 (H, W, 3), BGR.
        """
        self.name = name
        self.size = image.shape[:2]
        self.views: list[View] = []
        self._metadata = predictor.metadata
        self._picture = _shrink(image[:, :, ::-1])
        output = predictor(image)
        for i, of_pass in enumerate(output.get("passes", ()), start=1):
            instances = clear_detections(of_pass, predictor.model.mask_threshold, MIN_SCORE)
            caption = (
                f"What stages {2 * i} and {2 * i + 1} say of the boxes that stage {2 * i - 1} gave them: masks and "
                "scores, without boxes that a better one overlaps."
            )
            self._add(f"Pass {i}", caption, instances)
        instances = output["instances"].to("cpu")
        caption = "After mask voting over all passes." if self.views else ""
        self._add("Final", caption, instances[instances.scores >= MIN_SCORE])

    def _add(self, title: str, caption: str, instances: Instances) -> None:
        coco = CocoOutput(self._metadata)
        coco.add(self.name, instances)
        self.views.append(View(title, caption, coco))

    def draw(self, view: int, score: float) -> np.ndarray:
        """Return a picture of the detections of a view that have a score: uint8 (H', W', 3), RGB.

        It has the proportions of the image.
        """
        ids = self._metadata.thing_dataset_id_to_contiguous_id
        annotations = self.views[view].coco.content(score)["annotations"]
        instances = instances_from_results(annotations, sorted(ids, key=ids.get), self.size)
        return draw_predictions(self._picture, _resize(instances, self._picture.shape[:2]), self._metadata)

    def describe(self) -> dict[str, Any]:
        """Return what the page shows beside pictures, for JSON: names, boxes (x, y, width, height), areas in pixels."""
        return {
            "name": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "views": [
                {"title": x.title, "caption": x.caption, "detections": _describe(x.coco, self._metadata)}
                for x in self.views
            ],
        }


def _describe(coco: CocoOutput, metadata: Metadata) -> list[dict[str, Any]]:
    classes = metadata.thing_dataset_id_to_contiguous_id
    return [
        {
            "class": metadata.thing_classes[classes[x["category_id"]]],
            **{key: x[key] for key in ("score", "bbox", "area")},
        }
        for x in coco.annotations
    ]


def _shrink(image: np.ndarray) -> np.ndarray:
    factor = _LONGEST_SIDE / max(image.shape[:2])
    if factor >= 1:
        return np.ascontiguousarray(image)
    height, width = (max(round(x * factor), 1) for x in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _resize(instances: Instances, size: tuple[int, int]) -> Instances:
    """Return instances as they are in the image at another size, height and width."""
    if tuple(instances.image_size) == tuple(size):
        return instances
    resized = Instances(size, **instances.get_fields())
    resized.pred_boxes.scale(size[1] / instances.image_size[1], size[0] / instances.image_size[0])
    if instances.has("pred_masks"):
        masks = [cv2.resize(x.numpy().view(np.uint8), size[::-1]) for x in instances.pred_masks]
        resized.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    return resized
