"""Predictions as a dataset in COCO format, which labelling tools and pycocotools read."""

from __future__ import annotations

import json

import pycocotools.mask as mask_util
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from ..files import open_atomically
from .predictions import ImagePredictions


class CocoOutput:
    """Gathers predictions: images, categories with the ids of the training set, annotations with scores.

    ``json.load(file)["annotations"]`` is what ``pycocotools.COCO.loadRes`` takes, where image ids are those of the
    ground truth.
    """

    def __init__(self, metadata: Metadata) -> None:
        """
        Args:
            metadata: thing_classes and thing_dataset_id_to_contiguous_id.
        """
        names, ids = metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
        self.categories = [{"id": i, "name": names[k]} for i, k in ids.items()]
        self._category_ids = {k: i for i, k in ids.items()}
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, path: str, instances: Instances, frame: int | None = None) -> None:
        """Add the predictions of an image, or of a frame of a video, counted from 0."""
        height, width = instances.image_size
        image = {"id": len(self.images) + 1, "file_name": path, "height": height, "width": width}
        self.images.append(image if frame is None else {**image, "frame": frame})
        found = ImagePredictions.from_instances(instances, with_masks=True)
        rows = range(len(found.scores))
        masks = [None] * len(rows) if found.counts is None else found.masks(rows)
        for i, box, mask in zip(rows, found.boxes_by_size(rows).tolist(), masks):
            annotation = {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": self._category_ids[int(found.classes[i])],
                "bbox": box,
                "area": box[2] * box[3] if mask is None else int(mask_util.area(mask)),
                "iscrowd": 0,
                "score": float(found.scores[i]),
            }
            if mask is not None:
                annotation["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
            self.annotations.append(annotation)

    def content(self, min_score: float = 0.0) -> dict[str, list[dict]]:
        """Return the dataset, with the annotations that have the score."""
        annotations = [x for x in self.annotations if x["score"] >= min_score]
        return {"images": self.images, "categories": self.categories, "annotations": annotations}

    def write(self, path: str) -> None:
        with open_atomically(path, "w", encoding="utf-8") as file:
            json.dump(self.content(), file)

    def summary(self) -> str:
        """Say how much there is."""
        return f"{len(self.annotations)} instances in {len(self.images)} images"
