"""COCO AP, by the package faster-coco-eval where it is installed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator

from ..files import open_atomically

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with the same arguments and results, which takes less time.

    Without the package faster-coco-eval, for keypoints, and for image ids that are not integers, which the package does
    not know, it is ``COCOEvaluator`` as it is.
    """

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """As Detectron2's; the masks of "instances" may be ``pred_masks_rle``, an ``RLEMasks``, as well."""
        for record, output in zip(inputs, outputs):
            super().process([record], [output])
            if "instances" in output and output["instances"].has("pred_masks_rle"):
                for result, rle in zip(self._predictions[-1]["instances"], output["instances"].pred_masks_rle.rles):
                    result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        """Fill the results of each task. Detectron2's ``evaluate`` calls this with what ``process`` gathered."""
        results = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        if (
            COCOeval_faster is None
            or "keypoints" in tasks
            or not self._do_evaluation
            or not all(isinstance(image_id, int) for image_id in self._coco_api.imgs)
        ):
            super()._eval_predictions(predictions, img_ids=img_ids)
            return
        results = self._with_category_ids(results)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with open_atomically(path, "w", encoding="utf-8") as file:
                json.dump(results, file)
        self._logger.info("Evaluating predictions with faster-coco-eval ...")
        for task in tasks:
            # Detectron2 reports no predictions at all as NaN.
            evaluation = self._compare(results, task, img_ids) if results else None
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)

    def _with_category_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return copies of the results with the dataset's own category ids in place of class indices."""
        indices = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if indices is None:
            return [dict(result) for result in results]
        ids = {index: category_id for category_id, index in indices.items()}
        for result in results:
            if result["category_id"] not in ids:
                raise ValueError(
                    f"A prediction for image {result['image_id']!r} is of class {result['category_id']}; "
                    f"classes are 0 to {len(ids) - 1}."
                )
        return [{**result, "category_id": ids[result["category_id"]]} for result in results]

    def _compare(self, results: list[dict[str, Any]], task: str, img_ids: list[int] | None) -> COCOeval_faster:
        # Results with a box would have its area, and not that of the mask, decide what is small.
        dropped = "bbox" if task == "segm" else None
        results = [{key: value for key, value in result.items() if key != dropped} for result in results]
        evaluation = COCOeval_faster(self._coco_api, self._coco_api.loadRes(results), task)
        evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.run()
        return evaluation
