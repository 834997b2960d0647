"""An exported model in onnxruntime with its client beside the model in PyTorch: seconds of the whole call, masks
included, and detections. One JSON line a row; see README.md here."""

from __future__ import annotations

import argparse
import glob
import json
import os
import runpy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import median_seconds
from PIL import Image

from mnc_d2.data import read_image
from mnc_d2.export import export_model
from mnc_d2.predictor import load_predictor


def compare_detections(expected: dict, found: dict) -> dict:
    """Return the largest differences of two results with the keys of the client's, and the share of equal pixels.

    A detection is compared with the nearest box: which of two comes first is chance where their scores are the same.
    """
    counts = len(expected["scores"]), len(found["scores"])
    if counts[0] != counts[1]:
        return {"same": False, "detections": counts}
    distances = np.abs(expected["boxes"][:, None] - found["boxes"]).max(axis=2, initial=0)
    distances[expected["classes"][:, None] != found["classes"]] = np.inf
    pairs = distances.argmin(axis=1) if counts[0] else np.arange(0)
    if len(np.unique(pairs)) < counts[0] or (expected["classes"] != found["classes"][pairs]).any():
        return {"same": False, "detections": counts}
    found = {key: values[pairs] for key, values in found.items()}
    difference = {key: float(np.abs(expected[key] - found[key]).max(initial=0)) for key in ("boxes", "scores")}
    # Of the pixels of either mask: most of an image is in neither.
    union = (expected["masks"] | found["masks"]).sum(axis=(1, 2))
    wrong = (expected["masks"] != found["masks"]).sum(axis=(1, 2))
    pixels = float(1 - wrong.sum() / max(union.sum(), 1))
    return {"same": True, "detections": counts[0], **difference, "mask pixels": pixels}


def to_numpy(output: dict) -> dict:
    """Return the instances of the model's output as the client returns them."""
    instances = output["instances"].to("cpu")
    return {
        "boxes": instances.pred_boxes.tensor.numpy(),
        "scores": instances.scores.numpy(),
        "classes": instances.pred_classes.numpy(),
        "masks": instances.pred_masks.numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("images", nargs="+", help="or one folder of them")
    parser.add_argument("--onnx", help="the exported model, with client.py beside it; made anew by default")
    parser.add_argument("--timed", type=int, default=5, help="number of images that are timed, of all sizes there are")
    parser.add_argument("--compared", type=int, default=20, help="number of images whose detections are compared")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = options.images
    if os.path.isdir(paths[0]):
        paths = sorted(glob.glob(os.path.join(paths[0], "*")))
    images = [read_image(path) for path in spread_sizes(paths)[: max(options.timed, options.compared)]]
    predictor = load_predictor(options.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        onnx = options.onnx or os.path.join(folder, "model.onnx")
        if not options.onnx:
            export_model(options.model, onnx, "onnx")
        client = runpy.run_path(str(Path(onnx).with_name("client.py")))
        exported = client["Predictor"](onnx, threads=1)

        rows = [compare_detections(to_numpy(predictor(x[:, :, ::-1])), exported(x)) for x in images[: options.compared]]
        print(json.dumps({"images": len(rows), "same": sum(x["same"] for x in rows), "worst": worst(rows)}), flush=True)
        for row, image in zip(rows, images):
            if not row["same"]:
                print(json.dumps({"size": image.shape[:2], **row}), flush=True)
        ratios = []
        for image in images[: options.timed]:
            network_input = exported.prepare(image)
            candidates = exported.run(network_input)
            vote = partial(client["vote_masks"], *candidates, network_input.shape[1:], **exported.settings["voting"])
            calls = {
                "PyTorch": partial(predictor, image[:, :, ::-1]),
                "onnxruntime and client": partial(exported, image),
                "of it, network": partial(exported.run, network_input),
                "of it, voting": vote,
            }
            seconds = median_seconds(calls, options.repeats)
            ratios.append(seconds["onnxruntime and client"] / seconds["PyTorch"])
            row = {"size": image.shape[:2], "candidates": len(candidates[0]), "ratio": round(ratios[-1], 3)}
            print(json.dumps({**row, **{key: round(x, 4) for key, x in seconds.items()}}), flush=True)
        print(json.dumps({"median ratio": round(statistics.median(ratios), 3), "bar": 1.0}), flush=True)


def worst(rows: list[dict]) -> dict:
    """Return the largest differences, and the smallest share of pixels, over images with the same detections."""
    same = [x for x in rows if x["same"]]
    largest = {key: max((x[key] for x in same), default=None) for key in ("boxes", "scores")}
    return {**largest, "mask pixels": min((x["mask pixels"] for x in same), default=None)}


def spread_sizes(paths: list[str]) -> list[str]:
    """Order images such that the first are of as many sizes as there are."""
    of_size = {}
    for path in paths:
        with Image.open(path) as image:
            of_size.setdefault(image.size, []).append(path)
    rounds = max(map(len, of_size.values()))
    return [group[i] for i in range(rounds) for group in of_size.values() if i < len(group)]


if __name__ == "__main__":
    main()
