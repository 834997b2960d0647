"""The numbers of a report: from predictions and ground truth of a dataset."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..evaluation.ground_truth import GroundTruth, ImageTruth

# Below: from which score and IoU on a prediction counts as one, where a report has to say yes or no.
SCORE = 0.5
IOU = 0.5
_BINS = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class CocoAnalysis:
    """What COCO's evaluation says, of boxes or of masks.

    Attributes:
        ap: percent, NaN where there is nothing: rows "all" and each class; columns AP, AP50, AP75, and AP of small,
            medium and large instances (COCO's areas: 32 and 96 pixels squared).
        recall: the 101 recall levels.
        precision: (classes, 101), at IoU 0.5.
        scores: of all predictions that count, (P,).
        correct: whether each is a true positive at IoU 0.5, bool (P,).
    """

    ap: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    correct: np.ndarray


def analyse_coco(truth: GroundTruth, predictions: Sequence[dict[str, Any]], task: str) -> CocoAnalysis:
    """Evaluate predictions as COCO does.

    Args:
        truth: the ground truth; for "segm", all of it has masks.
        predictions: in COCO's format of results.
        task: "bbox" or "segm".
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on itself
        coco = _to_coco(truth)
        # With a box in them, its area would decide what is small.
        results = [{k: v for k, v in x.items() if task == "bbox" or k != "bbox"} for x in predictions]
        found = coco.loadRes(results) if results else COCO()
        evaluation = COCOeval(coco, found, task)
        if results:
            evaluation.evaluate()
            evaluation.accumulate()
    levels, classes = evaluation.params.recThrs, len(truth.class_names)
    if not results:
        none = np.zeros(0)
        return CocoAnalysis(
            np.zeros((classes + 1, 6)), levels, np.zeros((classes, len(levels))), none, none.astype(bool)
        )
    # COCOeval has categories by ascending id.
    order = [evaluation.params.catIds.index(i) for i in truth.category_ids]
    precision = evaluation.eval["precision"][:, :, order][..., -1]  # (IoU, recall, class, area)
    columns = [
        *(_mean(precision[rows, :, :, 0]) for rows in (slice(None), slice(0, 1), slice(5, 6))),
        *(_mean(precision[..., area]) for area in (1, 2, 3)),
    ]
    scores, correct = _true_positives(evaluation)
    return CocoAnalysis(np.stack(columns, axis=1), levels, precision[0, :, :, 0].T, scores, correct)


def _to_coco(truth: GroundTruth) -> COCO:
    """Return the ground truth as pycocotools takes it, whatever format it came from."""
    coco = COCO()
    annotations: list[dict[str, Any]] = []
    for image_id, image in truth.images.items():
        for anno in image.annotations:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": truth.category_ids[anno.category],
                    "bbox": list(anno.box),
                    "area": float(anno.box[2] * anno.box[3] if anno.mask is None else mask_util.area(anno.mask)),
                    "iscrowd": int(anno.crowd),
                    "segmentation": anno.mask,
                }
            )
    images = [{"id": i, "height": image.height, "width": image.width} for i, image in truth.images.items()]
    categories = [{"id": i, "name": name} for i, name in zip(truth.category_ids, truth.class_names)]
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> np.ndarray:
    """Return the means, in percent, of (IoU, recall, class): of the classes together, then of each."""
    values = np.where(precision > -1, precision, np.nan)
    per_class = [_nanmean(values[:, :, k]) for k in range(values.shape[2])]
    return 100 * np.array([_nanmean(values), *per_class])


def _nanmean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def _true_positives(evaluation: COCOeval) -> tuple[np.ndarray, np.ndarray]:
    scores, correct = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    everything = evaluation.params.areaRng[0]
    for of_image in evaluation.evalImgs:
        if of_image is not None and of_image["aRng"] == everything:
            counts = ~of_image["dtIgnore"][0].astype(bool)  # at IoU 0.5
            scores.append(np.array(of_image["dtScores"])[counts])
            correct.append(of_image["dtMatches"][0][counts] > 0)
    return np.concatenate(scores), np.concatenate(correct)


def reliability(scores: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """Return mean score, share of true positives and number of predictions of each tenth of the scores that has any."""
    rows = []
    for low, high in zip(_BINS, _BINS[1:]):
        inside = (scores >= low) & ((scores < high) | (high == 1))
        if inside.any():
            rows.append((float(scores[inside].mean()), float(correct[inside].mean()), int(inside.sum())))
    return rows


@dataclass(frozen=True)
class ImageMatches:
    """How an image was predicted, at the score and the IoU above.

    Attributes:
        pairs: of classes, (annotated, predicted); the number of classes stands for none.
        quality: true positives over true positives, false positives and missed instances; NaN for nothing at all.
    """

    pairs: list[tuple[int, int]]
    quality: float


def match_image(image: ImageTruth, predictions: Sequence[dict[str, Any]], classes: dict[int, int]) -> ImageMatches:
    """Match predictions, the best first, with the instances that they overlap most, of whatever class.

    Args:
        image: the ground truth.
        predictions: of the image, in COCO's format of results.
        classes: index of each category id.
    """
    nothing = len(classes)
    found = sorted((x for x in predictions if x["score"] >= SCORE), key=lambda x: -x["score"])
    instances = [x for x in image.annotations if not x.crowd]
    crowds = [x for x in image.annotations if x.crowd]
    ious, in_crowds = (_overlaps(found, annotations) for annotations in (instances, crowds))
    pairs, free = [], np.ones(len(instances), dtype=bool)
    for row, prediction in enumerate(found):
        category = classes[prediction["category_id"]]
        candidates = np.where(free, ious[row], 0)
        if len(candidates) and candidates.max() >= IOU:
            best = int(candidates.argmax())
            free[best] = False
            pairs.append((instances[best].category, category))
        elif not (len(crowds) and in_crowds[row].max() >= IOU):
            pairs.append((nothing, category))
    pairs += [(instances[i].category, nothing) for i in np.flatnonzero(free)]
    correct = sum(a == b for a, b in pairs)
    return ImageMatches(pairs, correct / len(pairs) if pairs else np.nan)


def _overlaps(found: Sequence[dict[str, Any]], annotations: Sequence[Any]) -> np.ndarray:
    """Return the IoU of predictions with annotations, (P, G), by masks where all have some."""
    if not found or not annotations:
        return np.zeros((len(found), len(annotations)))
    crowd = [x.crowd for x in annotations]
    if all("segmentation" in x for x in found) and all(x.mask is not None for x in annotations):
        return np.asarray(mask_util.iou([x["segmentation"] for x in found], [x.mask for x in annotations], crowd))
    return np.asarray(
        mask_util.iou(np.array([x["bbox"] for x in found]), np.array([x.box for x in annotations]), crowd)
    )


def match_images(truth: GroundTruth, predictions: Sequence[dict[str, Any]]) -> dict[Any, ImageMatches]:
    """Return :func:`match_image` of every image, by image id."""
    by_image = defaultdict(list)
    for prediction in predictions:
        by_image[prediction["image_id"]].append(prediction)
    classes = {category_id: i for i, category_id in enumerate(truth.category_ids)}
    return {i: match_image(image, by_image[i], classes) for i, image in truth.images.items()}


def confusion_matrix(matches: dict[Any, ImageMatches], num_classes: int) -> np.ndarray:
    """Return counts, (classes + 1, classes + 1), annotated by predicted, with what has no partner last."""
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for match in matches.values():
        for pair in match.pairs:
            counts[pair] += 1
    return counts
