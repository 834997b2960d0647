"""AP and seconds of exported models on a dataset in COCO format, such as one in float32 and one with int8 weights.

    python tests/benchmarks/exported.py float32/model.onnx int8/model.onnx --dataset val.json images/ [--limit 20]

Each image goes through all models before the next one does, each with one thread. One JSON line a model: size of the
file, AP, and the median over images of the seconds of the whole call, masks included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mnc_d2.export.client import Predictor, read_image, to_annotations


def average_precision(truth: COCO, annotations: list[dict], images: list[int], kind: str) -> float | None:
    """Return the AP, in per cent, of detections in the images with these ids; None if there are no detections."""
    if not annotations:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(annotations), kind)
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(100 * float(evaluation.stats[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--dataset", nargs=2, required=True, metavar=("ANNOTATIONS.json", "IMAGE_ROOT"))
    parser.add_argument("--limit", type=int, help="number of images, all of them by default")
    options = parser.parse_args()
    annotations, root = options.dataset
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
    predictors = {path: Predictor(path, threads=1) for path in options.models}
    seconds, found = ({path: [] for path in options.models} for _ in range(2))
    images = sorted(truth.imgs)[: options.limit]
    for image_id in images:
        image = read_image(os.path.join(root, truth.imgs[image_id]["file_name"]))
        for path, predictor in predictors.items():
            start = time.perf_counter()
            result = predictor(image)
            seconds[path].append(time.perf_counter() - start)
            found[path] += to_annotations(result, image_id, predictor.settings["category_ids"])
    for path in options.models:
        row = {"model": path, "MiB": round(os.path.getsize(path) / 2**20, 1), "images": len(images)}
        row |= {f"{kind} AP": average_precision(truth, found[path], images, kind) for kind in ("segm", "bbox")}
        print(json.dumps({**row, "seconds": round(statistics.median(seconds[path]), 3)}))


if __name__ == "__main__":
    main()
