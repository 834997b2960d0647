"""mAP^r: evaluation of instance masks by the protocol of SDS, which the paper follows, and of boxes by that of VOC.

Simultaneous Detection and Segmentation (SDS; Hariharan et al., ECCV 2014) took the protocol of VOC's boxes over to
masks ("regions", hence the r).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

from ..messages import first_few
from .average_precision import average_precision, best_overlaps, crowd_shares, match
from .ground_truth import Annotation, GroundTruth, load_ground_truth
from .predictions import ImagePredictions, write_coco_results

__all__ = ["SDSEvaluator"]

logger = logging.getLogger(__name__)

TASKS = ("sds", "bbox")
VOLUME_THRESHOLDS = tuple(k / 10 for k in range(1, 10))
BOX_THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))
NO_PREDICTIONS = ImagePredictions(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros((0, 4)), (0, 0), [])


class SDSEvaluator(DatasetEvaluator):
    """Average precision of masks and boxes on any dataset with instances, in COCO format or not.

    Results are percentages. "sds", for masks (rules in :mod:`.average_precision`):

    * ``mAPr@50``, ``mAPr@70``, ...: mean over the classes of the 11-point AP at that IoU, the paper's mAP^r;
      ``mAPr@50-<class>``: that of a class;
    * ``mAPr_vol``: mean of mAP^r at IoU 0.1, 0.2, ..., 0.9, AP^r_vol;
    * ``mAPr_area@50``, ``mAPr_area@50-<class>``, ``mAPr_area_vol``: the same from the area under the curve.

    "bbox", for boxes, as Detectron2's ``PascalVOCDetectionEvaluator``:

    * ``AP``: mean over the classes and over IoU 0.50, 0.55, ..., 0.95; ``AP50``, ``AP75``: at one IoU;
      ``AP50-<class>``: that of a class; from the area under the curve (VOC since 2010);
    * ``AP_11point``, ``AP50_11point``, ``AP75_11point``: the same at eleven recall levels (VOC 2007).

    A class without instances or without predictions has AP 0 and counts in every mean. Instances that are flagged
    "difficult" are not counted for boxes, and predictions that match them are ignored, as in VOC; for masks, where SDS
    knows no such flag, they are instances like others. Crowd regions, which VOC has not, are no instances; a prediction
    that is no true positive, and lies in one of its class by at least the threshold, is ignored. The result is the same
    in whatever order images and predictions come, and in however many processes: equal scores are ranked by the order
    of the images in the dataset, within an image by the content of the prediction.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        thresholds: Sequence[float] = (0.5, 0.7),
        distributed: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset.
            output_dir: folder for the predictions, in COCO's format of results; None to write none.
            tasks: "sds" (masks) and "bbox"; None for boxes, and masks where the predictions have them.
            thresholds: values of mask IoU, in (0, 1].
            distributed: whether to gather the predictions of all processes in the main one, or to evaluate this
                process's.

        Raises:
            ValueError: an argument or the ground truth is not valid; the message names what.
        """
        unknown = [task for task in tasks or () if task not in TASKS]
        if unknown or (tasks is not None and not tasks):
            raise ValueError(f"tasks must be some of {list(TASKS)} or None, got {tasks!r}.")
        if not thresholds or not all(0 < x <= 1 for x in thresholds):
            raise ValueError(f"thresholds must be values of IoU in (0, 1], got {thresholds!r}.")
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._tasks = tasks
        self._thresholds = tuple(thresholds)
        self._distributed = distributed
        self._truth = load_ground_truth(dataset_name)
        if tasks is not None and "sds" in tasks:
            self._check_truth_has_masks()
        self.reset()

    def reset(self) -> None:
        self._predictions: dict[Any, ImagePredictions] = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take predictions: "image_id" of each input, "instances" of each output.

        These have pred_boxes, scores, pred_classes and, for masks, pred_masks, bool (N, height, width), or
        pred_masks_rle, ``RLEMasks``, in pixels of the image.

        Raises:
            ValueError: a prediction is not valid; the message names its image.
        """
        for record, output in zip(inputs, outputs):
            image_id = record["image_id"]
            self._check_is_new(image_id, self._predictions)
            predictions = ImagePredictions.from_instances(output["instances"].to("cpu"), with_masks=self._wants_masks())
            self._check(image_id, predictions)
            self._predictions[image_id] = predictions

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the results by task and metric; an empty dict in all processes but the main one."""
        predictions = self._gather()
        if predictions is None:
            return {}
        self._warn_of_missing(predictions)
        if self._output_dir is not None:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            logger.info(f"Writing the predictions to {path}")
            write_coco_results(path, predictions, self._truth.category_ids)
        evaluations = {"sds": self._evaluate_masks, "bbox": self._evaluate_boxes}
        return {task: evaluations[task](predictions) for task in self._tasks_of(predictions)}

    def _wants_masks(self) -> bool:
        return self._tasks is None or "sds" in self._tasks

    def _check_is_new(self, image_id: Any, known: Iterable[Any]) -> None:
        if image_id not in self._truth.images:
            raise ValueError(f"There are predictions for image {image_id!r}, which is not in '{self._dataset_name}'.")
        if image_id in known:
            raise ValueError(f"There are predictions for image {image_id!r} twice. Call reset() before an evaluation.")

    def _check_truth_has_masks(self) -> None:
        names = self._truth.without_mask
        if names:
            raise ValueError(
                f"'{self._dataset_name}': {len(names)} annotations have no segmentation to evaluate masks with: "
                f'{first_few(names)}. Evaluate boxes only: tasks=("bbox",).'
            )

    def _check(self, image_id: Any, predictions: ImagePredictions) -> None:
        image, num_classes = self._truth.images[image_id], len(self._truth.class_names)
        where = f"Predictions for image {image_id!r} of '{self._dataset_name}'"
        if not np.isfinite(predictions.scores).all():
            raise ValueError(f"{where} have scores that are not finite.")
        if not np.isfinite(predictions.boxes).all():
            raise ValueError(f"{where} have boxes that are not finite.")
        classes = predictions.classes
        if len(classes) and not (0 <= classes.min() and classes.max() < num_classes):
            wrong = sorted({int(x) for x in classes} - set(range(num_classes)))
            raise ValueError(f"{where} are of class {first_few(wrong)}; classes are 0 to {num_classes - 1}.")
        if predictions.counts is not None:
            self._check_truth_has_masks()
        elif len(classes) and self._tasks is not None and "sds" in self._tasks:
            raise ValueError(f"{where} have no pred_masks.")
        if predictions.counts and predictions.size != (image.height, image.width):
            raise ValueError(
                f"{where} have masks of {predictions.size[0]} x {predictions.size[1]} pixels, "
                f"the image has {image.height} x {image.width}."
            )

    def _gather(self) -> dict[Any, ImagePredictions] | None:
        """Return the predictions of all processes in the order of the dataset; None in all but the main process."""
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(self._predictions, dst=0)
            if not comm.is_main_process():
                return None
        else:
            parts = [self._predictions]
        predictions: dict[Any, ImagePredictions] = {}
        for part in parts:
            for image_id in part:
                self._check_is_new(image_id, predictions)
            predictions.update(part)
        return {image_id: predictions[image_id] for image_id in self._truth.images if image_id in predictions}

    def _warn_of_missing(self, predictions: dict[Any, ImagePredictions]) -> None:
        missing = [image_id for image_id in self._truth.images if image_id not in predictions]
        if missing:
            logger.warning(
                f"{len(missing)} of the {len(self._truth.images)} images of '{self._dataset_name}' were not evaluated, "
                f"their instances count as not found: {first_few(missing)}."
            )
        if not any(len(x.scores) for x in predictions.values()):
            logger.warning(f"There are no predictions on '{self._dataset_name}': every AP is 0.")

    def _tasks_of(self, predictions: dict[Any, ImagePredictions]) -> Sequence[str]:
        """Return the tasks; where they are not given, those that the predictions have what it takes for."""
        if self._tasks is not None:
            return self._tasks
        if not predictions:
            return ("bbox",) if self._truth.without_mask else TASKS
        # An image without instances need not say that these would have had masks.
        telling = {image_id: x for image_id, x in predictions.items() if len(x.scores)} or predictions
        bare = [image_id for image_id, x in telling.items() if x.counts is None]
        if 0 < len(bare) < len(telling):
            raise ValueError(
                f"Predictions on '{self._dataset_name}' have masks, but not those for the images {first_few(bare)}."
            )
        return ("bbox",) if bare else TASKS

    def _evaluate_masks(self, predictions: dict[Any, ImagePredictions]) -> dict[str, float]:
        classes = _rank_by_class(self._truth, predictions, "sds")
        aps = _aps(classes, (*self._thresholds, *VOLUME_THRESHOLDS), strict=False)  # (thresholds, classes, 2)
        results, columns, count = {}, {}, len(self._thresholds)
        for kind, suffix in enumerate(("", "_area")):
            for threshold, values in zip(self._thresholds, aps[:count, :, kind]):
                key = f"mAPr{suffix}@{100 * threshold:g}"
                results[key] = float(values.mean())
                columns[key] = values
            results[f"mAPr{suffix}_vol"] = float(aps[count:, :, kind].mean())
        return self._report("masks", results, columns)

    def _evaluate_boxes(self, predictions: dict[Any, ImagePredictions]) -> dict[str, float]:
        classes = _rank_by_class(self._truth, predictions, "bbox")
        aps = _aps(classes, BOX_THRESHOLDS, strict=True)
        results, columns = {}, {}
        for kind, suffix in ((1, ""), (0, "_11point")):
            results[f"AP{suffix}"] = float(aps[:, :, kind].mean())
            for percent in (50, 75):
                columns[f"AP{percent}{suffix}"] = values = aps[BOX_THRESHOLDS.index(percent / 100), :, kind]
                results[f"AP{percent}{suffix}"] = float(values.mean())
        return self._report("boxes", results, columns)

    def _report(self, what: str, results: dict[str, float], columns: dict[str, np.ndarray]) -> dict[str, float]:
        """Log the means and the table of the classes; return both, the latter by "<column>-<class>"."""
        logger.info(f"Results for {what} on '{self._dataset_name}', in percent:\n{create_small_table(results)}")
        names = self._truth.class_names
        table = tabulate(zip(names, *columns.values()), headers=["class", *columns], tablefmt="pipe", floatfmt=".2f")
        logger.info(f"Results for {what} by class:\n{table}")
        per_class = {f"{key}-{name}": float(x) for key, values in columns.items() for name, x in zip(names, values)}
        return {**results, **per_class}


class ClassPredictions(NamedTuple):
    """Arguments of :func:`match` for one class, with the predictions by descending score."""

    ious: np.ndarray
    instances: np.ndarray
    shares: np.ndarray
    difficult: np.ndarray


def _rank_by_class(truth: GroundTruth, predictions: dict[Any, ImagePredictions], task: str) -> list[ClassPredictions]:
    """Compare the predictions with the ground truth of their image and rank each class's by their score.

    Boxes are compared as Detectron2 has them, from corner to corner: one from pixel column 3 to column 5 is 3 wide.
    That is what VOC's development kit adds 1 for, where 3 and 5 are the coordinates.
    """
    instances: list[list[Annotation]] = [[] for _ in truth.class_names]  # by class, of all images
    overlaps = [np.zeros((3, 0))]
    for image_id, image in truth.images.items():
        found = predictions.get(image_id, NO_PREDICTIONS)
        of_image = np.zeros((3, len(found.scores)))  # rows are IoU, instance, share in crowd regions
        of_image[1] = -1
        for category, regions in _group(image.annotations).items():
            real, crowds = ([x for x in regions if x.crowd == crowd] for crowd in (False, True))
            rows = np.flatnonzero(found.classes == category)
            predicted = found.regions(task, rows)
            if real:
                of_image[0, rows], best = best_overlaps(predicted, _truth_regions(task, real))
                of_image[1, rows] = best + len(instances[category])
            if crowds:
                of_image[2, rows] = crowd_shares(predicted, _truth_regions(task, crowds))
            instances[category].extend(real)
        overlaps.append(of_image)

    everything = [NO_PREDICTIONS, *predictions.values()]
    # Equal scores stay in the order of the images and, within one, in that of ImagePredictions.
    order = np.argsort(-np.concatenate([x.scores for x in everything]), kind="stable")
    classes = np.concatenate([x.classes for x in everything])[order]
    ious, indices, shares = np.concatenate(overlaps, axis=1)[:, order]
    ranked = []
    for category, real in enumerate(instances):
        rows = classes == category
        difficult = np.array([x.difficult and task == "bbox" for x in real], dtype=bool)
        ranked.append(ClassPredictions(ious[rows], indices[rows].astype(np.int64), shares[rows], difficult))
    return ranked


def _group(annotations: Iterable[Annotation]) -> dict[int, list[Annotation]]:
    groups: dict[int, list[Annotation]] = {}
    for anno in annotations:
        groups.setdefault(anno.category, []).append(anno)
    return groups


def _truth_regions(task: str, annotations: list[Annotation]) -> list[dict[str, Any]] | np.ndarray:
    if task == "bbox":
        return np.array([x.box for x in annotations])
    masks = [x.mask for x in annotations if x.mask is not None]
    assert len(masks) == len(annotations)  # SDSEvaluator has checked the dataset
    return masks


def _aps(classes: Sequence[ClassPredictions], thresholds: Sequence[float], strict: bool) -> np.ndarray:
    """Return the 11-point AP and the area, in percent: float64 (thresholds, classes, 2)."""
    aps = np.zeros((len(thresholds), len(classes), 2))
    for i, threshold in enumerate(thresholds):
        for k, (ious, instances, shares, difficult) in enumerate(classes):
            flags = match(ious, instances, difficult, threshold, strict=strict, shares=shares)
            aps[i, k] = average_precision(*flags, num_instances=int((~difficult).sum()))
    return 100 * aps
