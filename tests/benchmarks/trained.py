"""Inference of trained models side by side, part by part: MNC first, then for example Mask R-CNN.

    python tests/benchmarks/trained.py MNC.pth MASK_RCNN.pth --images FOLDER [--threads 1] [--limit 40] [--accelerate]

The models are as they are, or with --accelerate their accelerated copies, in MODEL.MNC.INFERENCE_PRECISION. Each image
goes through all models before the next one does. One JSON line a model: the median over repeats of the seconds for all
images, of the whole call, the backbone, stage 1 (RPN), and the rest: heads, voting or NMS, and pasting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from detectron2.data.detection_utils import read_image

from mnc_d2 import load_predictor
from mnc_d2.predictor import load_model


class Stopwatch:
    """Adds up the seconds that modules of a model take."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = defaultdict(float)
        for name in ("backbone", "proposal_generator"):
            module = getattr(model, name)
            module.register_forward_pre_hook(lambda *_, name=name: self._add(name, -time.perf_counter()))
            module.register_forward_hook(lambda *_, name=name: self._add(name, time.perf_counter()))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds


def measure(predictors: dict, images: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Seconds of one round over all images, by model and part."""
    watches = {name: predictor.stopwatch for name, predictor in predictors.items()}
    for watch in watches.values():
        watch.seconds.clear()
    for image in images:
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor(image)
            watches[name].seconds["whole call"] += time.perf_counter() - start
    for watch in watches.values():
        parts = watch.seconds
        parts["heads and masks"] = parts["whole call"] - parts["backbone"] - parts["proposal_generator"]
    return {name: dict(watch.seconds) for name, watch in watches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.pth")
    parser.add_argument("--images", type=Path, required=True, help="folder")
    parser.add_argument("--limit", type=int, default=40, help="number of images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerate", action="store_true", help="all models, see mnc_d2.acceleration")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs for models that know the keys")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = sorted(x for x in options.images.iterdir() if x.suffix in (".png", ".jpg"))[: options.limit]
    images = [read_image(str(x), "BGR") for x in files]
    predictors = {}
    for path in options.models:
        predictors[path] = load_predictor(path, overrides=options.opts)
        if not options.accelerate:
            predictors[path].model = load_model(predictors[path].cfg)
        predictors[path].stopwatch = Stopwatch(predictors[path].model)
    measure(predictors, images[:2])
    rounds = [measure(predictors, images) for _ in range(options.repeats)]
    for path in options.models:
        parts = {x: statistics.median(seconds[path][x] for seconds in rounds) for x in rounds[0][path]}
        row = {"model": path, "accelerated": options.accelerate, "images": len(images)}
        print(json.dumps({**row, **{x: round(y, 3) for x, y in parts.items()}}))


if __name__ == "__main__":
    main()
