"""Memory and time of voting and of masks for photographs of 8000 x 6000 pixels. One JSON line a row; see README.md.

What is measured is the largest resident memory of the process beyond what it had before: candidates to detections
(``vote_masks``), and detections to masks of the image, as run lengths (MODEL.MNC.PRED_MASK_FORMAT "rle").
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from measure import peak_process_memory

from mnc_d2.modeling import vote_masks
from mnc_d2.modeling.mask_pasting import encode_masks

HEIGHT, WIDTH = 6000, 8000
BAR = 1024  # MiB


def make_candidates(objects: int, boxes: int, smallest: int, largest: int) -> tuple[torch.Tensor, ...]:
    """Boxes, scores and round masks of 28 x 28 around objects whose sides are uniform between two sizes, in pixels."""
    generator = torch.Generator().manual_seed(0)
    size = smallest + (largest - smallest) * torch.rand(objects, 2, generator=generator)
    start = torch.rand(objects, 2, generator=generator) * (torch.tensor([WIDTH, HEIGHT]) - size).clamp(min=0)
    of_object = torch.arange(boxes) % objects
    jitter = 0.05 * torch.randn(boxes, 4, generator=generator) * size.repeat(1, 2)[of_object]
    corners = torch.cat((start, start + size), dim=1)[of_object] + jitter
    corners = corners.clamp(min=0).minimum(torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    likeness = 3 * torch.randn(objects, 20, generator=generator)[of_object]
    scores = (likeness + torch.randn(boxes, 20, generator=generator)).softmax(dim=1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    masks = (4 * (1 - x**2 - y**2) + torch.randn(boxes, 28, 28, generator=generator)).sigmoid()
    return corners, scores, masks


def detect(candidates: tuple[torch.Tensor, ...]) -> int:
    """Vote and encode; return the number of masks."""
    size = (HEIGHT, WIDTH)
    found = vote_masks(*candidates, size, score_threshold=0.001)
    frames = found.pred_boxes[found.pred_boxes.nonempty()]
    return len(encode_masks(found.pred_masks[found.pred_boxes.nonempty(), 0], frames.tensor, size, 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=600, help="candidates")
    options = parser.parse_args()
    for name, objects, boxes, sides in (
        ("100 to 1500 pixels", 40, options.boxes, (100, 1500)),
        ("half the image", 3, 15, (4000, 6000)),
    ):
        candidates = make_candidates(objects, boxes, *sides)
        seconds = []

        def call(candidates=candidates, seconds=seconds):
            start = time.perf_counter()
            masks = detect(candidates)
            seconds.append(time.perf_counter() - start)
            return masks

        row = {"objects of": name, "candidates": boxes}
        peaks = peak_process_memory({"before": lambda: None, "call": call})
        row["peak MiB"] = (peaks["call"] - peaks["before"]) // 2**20
        print(json.dumps({**row, "bar": BAR, "seconds": round(seconds[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
