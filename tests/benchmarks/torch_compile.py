"""Inference of the quickstart model beside that with its network compiled. One JSON line; see README.md here.

With --accelerate the other is the accelerated copy: compiled and accelerated are two ways to the same end.
"""

import argparse
import copy
import json
import time
from functools import partial

import torch
from inference import detect, make_inputs, prepare
from measure import median_seconds

from mnc_d2.acceleration import accelerate
from mnc_d2.model_zoo import get_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="runs of which the median is printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--parts", nargs="+", choices=["backbone", "heads"], default=["backbone", "heads"])
    parser.add_argument("--accelerate", action="store_true", help="the model that is not compiled")
    options = parser.parse_args()

    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model, image = prepare(cfg, options.device, tuple(options.size)), make_inputs(1, tuple(options.size))
    compiled = copy.deepcopy(model)
    if "backbone" in options.parts:
        compiled.backbone.compile()
        compiled.proposal_generator.rpn_head.compile()
    if "heads" in options.parts:
        for heads in compiled.roi_heads.passes:
            # Images and passes have different numbers of boxes.
            heads.mask_head.compile(dynamic=True)
            heads.classifier.compile(dynamic=True)

    other = accelerate(model) if options.accelerate else model
    start = time.perf_counter()
    detect(compiled, image)
    first = time.perf_counter() - start
    seconds = median_seconds(
        {"compiled": partial(detect, compiled, image), "other": partial(detect, other, image)}, options.repeats
    )
    row = {
        "parts": options.parts,
        "other": "accelerated" if options.accelerate else "as it is",
        "first call, seconds": round(first, 1),
        "ratio": round(seconds["compiled"] / seconds["other"], 3),
    }
    row["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    print(json.dumps({**row, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
