"""mAP^r: time and memory of the evaluator beside a loop over dense masks. One JSON line a row; see README.md here."""

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances

from mnc_d2.evaluation import SDSEvaluator
from mnc_d2.evaluation.average_precision import average_precision, match

HEIGHT, WIDTH = 375, 500
CLASSES = 20
OBJECTS, VARIANTS = 24, 8  # each object is drawn several times, a little different
THRESHOLDS = (0.5, 0.7)
BAR = 0.2


def draw_masks(generator: np.random.Generator) -> torch.Tensor:
    """Ellipses of 40 to 240 pixels, bool (OBJECTS, VARIANTS, HEIGHT, WIDTH)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    masks = np.zeros((OBJECTS, VARIANTS, HEIGHT, WIDTH), dtype=bool)
    for group in masks:
        radii, centre = generator.uniform(20, 120, 2), generator.uniform(0.2, 0.8, 2) * (WIDTH, HEIGHT)
        for mask in group:
            (cx, cy), (rx, ry) = centre + 0.1 * radii * generator.normal(size=2), radii * generator.uniform(0.8, 1.2, 2)
            # A wave along the outline: masks of networks are not smooth.
            wave = 0.05 * np.sin(0.3 * x + generator.uniform(0, 6)) * np.sin(0.3 * y)
            mask[:] = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1 + wave
    return torch.from_numpy(masks)


def draw_dataset(masks: torch.Tensor, num_images: int, generator: np.random.Generator) -> list[dict]:
    """Register "benchmark", with 2.4 instances an image on average; return its records."""
    codes = [mask_util.encode(np.asfortranarray(group[0], dtype=np.uint8)) for group in masks.numpy()]
    boxes = [mask_util.toBbox(code).tolist() for code in codes]
    records = []
    for image in range(num_images):
        objects = generator.choice(OBJECTS, size=1 + generator.poisson(1.4), replace=False).tolist()
        annotations = [
            {"category_id": i % CLASSES, "segmentation": codes[i], "bbox": boxes[i], "bbox_mode": 1, "object": i}
            for i in objects
        ]
        records.append({"image_id": image, "height": HEIGHT, "width": WIDTH, "annotations": annotations})
    DatasetCatalog.register("benchmark", lambda: records)
    MetadataCatalog.get("benchmark").set(thing_classes=[f"class {i}" for i in range(CLASSES)])
    return records


def predict(
    records: list[dict], masks: torch.Tensor, number: int, generator: np.random.Generator
) -> Iterator[tuple[int, Instances]]:
    """Yield image ids and predictions: half of them of instances of the image, half of anything."""
    boxes = BitMasks(masks.flatten(0, 1)).get_bounding_boxes()
    for record in records:
        present = [x["object"] for x in record["annotations"]]
        right = generator.random(number) < 0.5
        objects = np.where(right, generator.choice(present, number), generator.integers(0, OBJECTS, number))
        rows = torch.from_numpy(VARIANTS * objects + generator.integers(0, VARIANTS, number))
        result = Instances((HEIGHT, WIDTH))
        result.pred_masks = masks.flatten(0, 1)[rows]
        result.pred_boxes = boxes[rows]
        result.pred_classes = torch.from_numpy(objects % CLASSES)
        result.scores = torch.from_numpy(generator.random(number) * np.where(right, 1, 0.7))
        yield record["image_id"], result


def dense_loop(records: list[dict], predictions: dict[int, tuple]) -> dict[str, float]:
    """mAP^r with the masks of an image decoded and compared pixel by pixel, those of a class one by one.

    Args:
        records: the images.
        predictions: by image id: scores, classes and masks as RLE.
    """
    ranked, counts = defaultdict(list), defaultdict(int)
    for record in records:
        truth = defaultdict(list)
        for anno in record["annotations"]:
            truth[anno["category_id"]].append(mask_util.decode(anno["segmentation"]).astype(bool))
        for score, cls, code in zip(*predictions[record["image_id"]]):
            ious = []
            if truth[cls]:
                mask = mask_util.decode(code).astype(bool)
                ious = [(mask & other).sum() / (mask | other).sum() for other in truth[cls]]
            best = int(np.argmax(ious)) if ious else -1
            ranked[cls].append((score, ious[best] if ious else 0.0, counts[cls] + best if ious else -1))
        for cls, instances in truth.items():
            counts[cls] += len(instances)
    results = {}
    for threshold in THRESHOLDS:
        aps = []
        for cls in range(CLASSES):
            _, ious, instances = np.array(sorted(ranked[cls], reverse=True)).reshape(-1, 3).T
            flags = match(ious, instances.astype(int), np.zeros(counts[cls], dtype=bool), threshold)
            aps.append(100 * average_precision(*flags, counts[cls])[0])
        results[f"mAPr@{100 * threshold:g}"] = float(np.mean(aps))
    return results


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def evaluate(records: list[dict], masks: torch.Tensor, number: int) -> tuple:
    """Run the evaluator; return its results, seconds by step and MiB by step."""
    start, before = time.process_time(), peak_mib()
    evaluator = SDSEvaluator("benchmark", thresholds=THRESHOLDS)
    seconds, memory = {"load": time.process_time() - start}, {"load": peak_mib() - before}
    seconds["process"] = 0.0
    for image_id, found in predict(records, masks, number, np.random.default_rng(1)):
        start = time.process_time()
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
        seconds["process"] += time.process_time() - start
    memory["process"] = peak_mib() - before
    start = time.process_time()
    results = evaluator.evaluate()
    seconds["evaluate"] = time.process_time() - start
    memory["evaluate"] = peak_mib() - before
    return results, seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5732)
    parser.add_argument("--predictions", type=int, default=40, help="of each image")
    parser.add_argument("--dense-images", type=int, default=200, help="images of the dense loop, scaled to all")
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    masks = draw_masks(generator)
    records = draw_dataset(masks, options.images, generator)
    results, seconds, memory = evaluate(records, masks, options.predictions)
    row = {
        "what": "SDSEvaluator, masks and boxes",
        "images": options.images,
        "predictions": options.images * options.predictions,
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "peak memory beyond that before, MiB": memory,
        "mAPr@50": round(results["sds"]["mAPr@50"], 2),
    }
    print(json.dumps(row), flush=True)

    subset = records[: options.dense_images]
    predictions = {}
    for image_id, found in predict(subset, masks, options.predictions, np.random.default_rng(1)):
        codes = [mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in found.pred_masks.numpy()]
        predictions[image_id] = (found.scores.tolist(), found.pred_classes.tolist(), codes)
    start = time.process_time()
    dense = dense_loop(subset, predictions)
    measured = time.process_time() - start
    scaled = measured * options.images / len(subset)
    row = {
        "what": "dense loop, masks only",
        "measured on images": len(subset),
        "seconds": round(measured, 2),
        "seconds scaled to all images": round(scaled, 1),
        "SDSEvaluator.evaluate / dense loop": round(seconds["evaluate"] / scaled, 4),
        "bar": BAR,
    }
    print(json.dumps(row), flush=True)

    # Both are the same evaluation.
    DatasetCatalog.remove("benchmark")
    DatasetCatalog.register("benchmark", lambda: subset)
    same, *_ = evaluate(subset, masks, options.predictions)
    difference = max(abs(same["sds"][key] - value) for key, value in dense.items())
    print(json.dumps({"what": "difference of mAP^r on these images, in percent", "largest": difference}))


if __name__ == "__main__":
    main()
