"""One HTML page about a run, which needs nothing beside it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..checkpoint import ModelDescription
from ..data import read_image
from ..evaluation.ground_truth import GroundTruth, load_ground_truth
from ..evaluation.predictions import instances_from_results
from ..files import open_atomically
from ..predictor import load_predictor
from ..visualizer import draw_predictions, draw_record
from .analysis import IOU, SCORE, analyse_coco, confusion_matrix, match_images, reliability
from .passes import draw_passes
from .plots import (
    embed_figure,
    embed_picture,
    plot_confusion,
    plot_learning_curves,
    plot_precision_recall,
    plot_reliability,
)

AP_COLUMNS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
_NUM_IMAGES = 4  # best and worst
_NUM_PASS_IMAGES = 2
_INFERENCE_TIME = re.compile(r"pure compute time: \S+ \(([\d.]+) s / iter per device, on (\d+) devices\)")


def write_report(run: str, dataset: str, model: str, description: ModelDescription, output: str) -> None:
    """Write a page about a run.

    Args:
        run: its folder: ``inference/<dataset>`` has the predictions; ``metrics.json`` and ``log.txt`` may be there.
        dataset: a registered dataset.
        model: the checkpoint that shows what the passes do.
        description: what it says of itself.
        output: the HTML file; its folder is made if need be.

    Raises:
        FileNotFoundError: there are no predictions.
    """
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    predictions = read_predictions(run, dataset)
    truth = load_ground_truth(dataset)
    task = "segm" if not truth.without_mask and all("segmentation" in x for x in predictions) else "bbox"
    analyses = {name: analyse_coco(truth, predictions, name) for name in dict.fromkeys((task, "bbox"))}
    analysis = analyses[task]
    matches = match_images(truth, predictions)
    ranked = sorted((i for i, x in matches.items() if not math.isnan(x.quality)), key=lambda i: matches[i].quality)
    worst = ranked[:_NUM_IMAGES]
    best = [i for i in reversed(ranked) if i not in worst][:_NUM_IMAGES]
    metrics = read_metrics(run)
    names = truth.class_names
    content = {
        "title": f"{os.path.basename(os.path.abspath(run))}: {dataset}",
        "description": description,
        "num_images": len(truth.images),
        "num_instances": sum(not x.crowd for image in truth.images.values() for x in image.annotations),
        "ap_columns": AP_COLUMNS,
        "ap_tables": {name: list(zip(("all classes", *names), x.ap.tolist())) for name, x in analyses.items()},
        "task": task,
        "score": SCORE,
        "iou": IOU,
        "curves": embed_figure(plot_learning_curves(metrics)) if metrics else None,
        "precision_recall": embed_figure(plot_precision_recall(analysis, names)),
        "confusion": embed_figure(plot_confusion(confusion_matrix(matches, len(names)), names)),
        "reliability": embed_figure(plot_reliability(reliability(analysis.scores, analysis.correct))),
        "worst": draw_images(dataset, truth, predictions, {i: matches[i].quality for i in worst}),
        "best": draw_images(dataset, truth, predictions, {i: matches[i].quality for i in best}),
        "passes": draw_passes_of(dataset, model, ranked),
        "speed": read_speed(run, metrics),
    }
    page = _environment().get_template("page.html").render(content)
    with open_atomically(output, "w", encoding="utf-8") as file:
        file.write(page)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mnc_d2.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def read_predictions(run: str, dataset: str) -> list[dict[str, Any]]:
    """Return the predictions that an evaluation wrote, in COCO's format of results."""
    path = os.path.join(run, "inference", dataset, "coco_instances_results.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The run has no predictions, {path}. Evaluate its model: mnc eval.")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.json``; none where only an evaluation was run."""
    path = os.path.join(run, "metrics.json")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_speed(run: str, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the log says of the time and memory of training and inference, as rows of a table."""
    rows = []
    times = [line["time"] for line in metrics if "time" in line]
    if times:
        rows.append(("training", f"{np.median(times):.3g} s an iteration (median)"))
    log = os.path.join(run, "log.txt")
    if os.path.isfile(log):
        with open(log, encoding="utf-8") as file:
            text = file.read()
        found = _INFERENCE_TIME.findall(text)
        if found:
            rows.append(("inference", f"{found[-1][0]} s an image, in {found[-1][1]} process(es)"))
        memory = [int(x) for x in re.findall(r"max_mem: (\d+)M", text)]
        if memory:
            rows.append(("GPU memory", f"{max(memory)} MiB at most in training"))
    return rows


def draw_images(
    dataset: str, truth: GroundTruth, predictions: Sequence[dict[str, Any]], qualities: dict[Any, float]
) -> list[dict[str, Any]]:
    """Draw ground truth and predictions of some images, given with their quality by image id."""
    records = {x["image_id"]: x for x in DatasetCatalog.get(dataset)}
    metadata = MetadataCatalog.get(dataset)
    drawn = []
    for image_id, quality in qualities.items():
        record = records[image_id]
        image = read_image(record["file_name"])
        found = [x for x in predictions if x["image_id"] == image_id and x["score"] >= SCORE]
        instances = instances_from_results(found, truth.category_ids, image.shape[:2])
        drawn.append(
            {
                "name": os.path.basename(record["file_name"]),
                "quality": quality,
                "truth": embed_picture(draw_record(image, record, metadata)),
                "predicted": embed_picture(draw_predictions(image, instances, metadata)),
            }
        )
    return drawn


def draw_passes_of(dataset: str, model: str, ranked: Sequence[Any]) -> list[dict[str, Any]]:
    """Draw what every pass makes of some images, of middling quality; nothing for models without passes."""
    predictor = load_predictor(model)
    if predictor.cfg.MODEL.META_ARCHITECTURE != "MultitaskNetworkCascade":
        return []
    predictor.model.outputs = ["instances", "passes"]
    records = {x["image_id"]: x for x in DatasetCatalog.get(dataset)}
    middle = ranked[max(len(ranked) - _NUM_PASS_IMAGES, 0) // 2 :][:_NUM_PASS_IMAGES]
    drawn = []
    for image_id in middle:
        file = records[image_id]["file_name"]
        pictures = [(caption, embed_picture(x)) for caption, x in draw_passes(predictor, read_image(file, "BGR"))]
        drawn.append({"name": os.path.basename(file), "pictures": pictures})
    return drawn
