"""Predictions of a model on one image, in little memory: an evaluation keeps a whole dataset's."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

from ..files import open_atomically


@dataclass
class ImagePredictions:
    """Predictions for one image, by descending score; equal ones in an order that depends on their content only.

    Attributes:
        scores: float64 (N,).
        classes: int64 (N,).
        boxes: float64 (N, 4), x1, y1, x2, y2.
        size: height and width of the masks.
        counts: the compressed run lengths of each mask; None where there are no masks.
    """

    scores: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    counts: list[bytes] | None

    @classmethod
    def from_instances(cls, instances: Instances, with_masks: bool) -> ImagePredictions:
        """Encode the predictions of a model.

        Args:
            instances: with pred_boxes, scores and pred_classes, on the CPU.
            with_masks: whether to take pred_masks, bool (N, height, width), or pred_masks_rle, ``RLEMasks``, too,
                where there are some.
        """
        scores = instances.scores.double().numpy()
        boxes = instances.pred_boxes.tensor.double().numpy()
        size, counts = tuple(instances.image_size), None
        if with_masks and instances.has("pred_masks"):
            counts = _encode(instances.pred_masks)
            size = tuple(instances.pred_masks.shape[-2:])
        elif with_masks and instances.has("pred_masks_rle"):
            counts = [rle["counts"] for rle in instances.pred_masks_rle.rles]
        rows = boxes.tolist()
        contents = list(zip((-scores).tolist(), rows, counts or itertools.repeat(b"")))
        order = sorted(range(len(contents)), key=contents.__getitem__)
        return cls(
            scores[order],
            instances.pred_classes.numpy()[order],
            boxes[order],
            size,
            None if counts is None else [counts[i] for i in order],
        )

    def regions(self, task: str, rows: Iterable[int]) -> list[dict[str, Any]] | np.ndarray:
        """Return some predictions as pycocotools compares them.

        Args:
            task: "sds" for masks, as compressed RLE; "bbox" for boxes, float64 (R, 4): x, y, width, height.
            rows: indices of R predictions.
        """
        return self.masks(rows) if task == "sds" else self.boxes_by_size(rows)

    def masks(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Return the masks of some predictions, which have masks, as compressed RLE."""
        if self.counts is None:
            raise ValueError("These predictions have no masks.")
        return [{"size": list(self.size), "counts": self.counts[i]} for i in rows]

    def boxes_by_size(self, rows: Iterable[int]) -> np.ndarray:
        """Return the boxes of some predictions, float64 (R, 4): x, y, width, height."""
        boxes = self.boxes[list(rows)]
        return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)


def _encode(masks: torch.Tensor) -> list[bytes]:
    """Return the compressed run lengths of masks, bool (N, height, width)."""
    pixels = masks.bool().numpy().view(np.uint8)
    return [mask_util.encode(np.asfortranarray(mask))["counts"] for mask in pixels]


def write_coco_results(path: str, predictions: Mapping[Any, ImagePredictions], category_ids: Sequence[int]) -> None:
    """Write predictions in COCO's format of results.

    Args:
        path: the JSON file; its folder is made if need be.
        predictions: by image id.
        category_ids: the dataset's own id of each class.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_atomically(path, "w", encoding="utf-8") as file:
        separator = "[\n"
        for record in _records(predictions, category_ids):
            file.write(separator + json.dumps(record))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _records(predictions: Mapping[Any, ImagePredictions], category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    for image_id, found in predictions.items():
        boxes = found.boxes_by_size(range(len(found.scores))).tolist()
        for i, box in enumerate(boxes):
            record = {
                "image_id": image_id,
                "category_id": category_ids[int(found.classes[i])],
                "bbox": box,
                "score": float(found.scores[i]),
            }
            if found.counts is not None:
                record["segmentation"] = {"size": list(found.size), "counts": found.counts[i].decode("ascii")}
            yield record


def instances_from_results(
    results: Sequence[Mapping[str, Any]], category_ids: Sequence[int], size: tuple[int, int]
) -> Instances:
    """Return predictions on an image in COCO's format of results as a model returns them.

    Args:
        results: with bbox, score, category_id and possibly segmentation, as compressed RLE.
        category_ids: the dataset's own id of each class.
        size: height and width of the image.
    """
    classes = {category_id: i for i, category_id in enumerate(category_ids)}
    instances = Instances(size)
    boxes = np.array([x["bbox"] for x in results], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(torch.from_numpy(boxes))
    instances.scores = torch.tensor([x["score"] for x in results])
    instances.pred_classes = torch.tensor([classes[x["category_id"]] for x in results], dtype=torch.int64)
    if results and all("segmentation" in x for x in results):
        masks = mask_util.decode([x["segmentation"] for x in results])  # (H, W, N)
        instances.pred_masks = torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))).bool()
    return instances
