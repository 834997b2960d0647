"""Mask voting: time with the number of candidates and of classes. One JSON line a row; see README.md here."""

import argparse
import json
from functools import partial

import torch
from measure import median_seconds

from mnc_d2.experiments.caffe import voting as caffe_voting
from mnc_d2.modeling import vote_masks

IMAGE = (375, 500)
OBJECTS = 12


def make_candidates(boxes: int, classes: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes, scores and masks of 21 x 21 around a dozen objects of 60 to 220 pixels, as two passes yield them."""
    generator = torch.Generator().manual_seed(0)
    size = 60 + 160 * torch.rand(OBJECTS, 2, generator=generator)
    start = torch.rand(OBJECTS, 2, generator=generator) * (torch.tensor([IMAGE[1], IMAGE[0]]) - size)
    of_object = torch.arange(boxes) % OBJECTS
    jitter = 0.08 * torch.randn(boxes, 4, generator=generator) * size.repeat(1, 2)[of_object]
    corners = torch.cat((start, start + size), dim=1)[of_object] + jitter
    # Each object looks like a few classes more than like the others.
    likeness = 3 * torch.randn(OBJECTS, classes, generator=generator)[of_object]
    scores = (likeness + torch.randn(boxes, classes, generator=generator)).softmax(dim=1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 21), torch.linspace(-1, 1, 21), indexing="ij")
    masks = (4 * (1 - x**2 - y**2) + torch.randn(boxes, 21, 21, generator=generator)).sigmoid()
    return corners.to(device), scores.to(device), masks.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="runs of which the median is printed")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cases = [(600, 20), *((boxes, 20) for boxes in (100, 300, 1000, 2000)), *((600, classes) for classes in (80, 1203))]
    conventions = {"detectron2": (vote_masks, 0.03), "caffe": (caffe_voting.vote_masks, 0.1)}
    for name, (function, bar) in conventions.items():
        for boxes, classes in cases:
            candidates = make_candidates(boxes, classes, options.device)
            vote = partial(function, *candidates, IMAGE, score_threshold=0.001)
            row = {"conventions": name, "boxes": boxes, "classes": classes, "results": len(vote())}
            row["seconds"] = round(median_seconds({"vote": vote}, options.repeats)["vote"], 4)
            if (boxes, classes) == (600, 20):
                row["bar"] = bar
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
