"""RoI warp against RoIAlign: time, growth and memory. One JSON line a row; see README.md beside this file."""

import argparse
import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from measure import median_seconds, peak_memory

from mnc_d2.modeling import RoIWarpPooler
from mnc_d2.modeling.roi_heads.labels import boxes_to_rois

SIZE = 14
# Of an image of about 600 x 800 (VGG-16, stride 16) and of one of 800 x 1024 (FPN).
WORK = {
    "VGG": {"scales": [1 / 16], "maps": [(38, 50)], "channels": 512, "rois": 300},
    "FPN": {
        "scales": [1 / 4, 1 / 8, 1 / 16, 1 / 32],
        "maps": [(200, 256), (100, 128), (50, 64), (25, 32)],
        "channels": 256,
        "rois": 512,
    },
}


class Case:
    """Feature maps, boxes and the gradient of the pooled features: everything that one piece of work needs."""

    def __init__(
        self,
        scales: Sequence[float],
        maps: Sequence[tuple[int, int]],
        channels: int,
        rois: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        height, width = (side / scales[0] for side in maps[0])
        centre = torch.rand(rois, 2, generator=generator) * torch.tensor([width, height])
        side = 16 * 40 ** torch.rand(rois, 2, generator=generator)  # 16 to 640 pixels
        boxes = Boxes(torch.cat((centre - side / 2, centre + side / 2), dim=1))
        boxes.clip((int(height), int(width)))
        self.scales = scales
        self.boxes = boxes.tensor.to(device).requires_grad_()
        self.features = [
            torch.randn(1, channels, *size, generator=generator).to(device, dtype).requires_grad_() for size in maps
        ]
        self.gradient = torch.randn(rois, channels, SIZE, SIZE, generator=generator).to(device, dtype)

    def warp(self) -> torch.Tensor:
        rois = boxes_to_rois([Boxes(self.boxes)])
        return RoIWarpPooler(SIZE, self.scales, sampling_ratio=2)(self.features, rois)

    def align_and_pool(self) -> torch.Tensor:
        """The same samples and the same maximum, but without a gradient to the boxes."""
        pooler = ROIPooler(2 * SIZE, self.scales, sampling_ratio=1, pooler_type="ROIAlignV2")
        return F.max_pool2d(pooler(self.features, [Boxes(self.boxes)]), kernel_size=2)

    def align_average(self) -> torch.Tensor:
        """As many samples, averaged."""
        pooler = ROIPooler(SIZE, self.scales, sampling_ratio=2, pooler_type="ROIAlignV2")
        return pooler(self.features, [Boxes(self.boxes)])

    def train(self, pool, with_boxes: bool) -> None:
        inputs = [*self.features, self.boxes] if with_boxes else self.features
        torch.autograd.grad(pool(), inputs, self.gradient)


def compare_times(case: Case, repeats: int) -> list[dict]:
    with torch.no_grad():
        forward = median_seconds(
            {
                "warp": case.warp,
                "warp, copied to NCHW": lambda: case.warp().contiguous(),
                "align and pool": case.align_and_pool,
                "align average": case.align_average,
            },
            repeats,
        )
    both = median_seconds(
        {
            "warp": lambda: case.train(case.warp, with_boxes=True),
            "align and pool": lambda: case.train(case.align_and_pool, with_boxes=False),
        },
        max(3, repeats // 3),
    )
    limits = {"align and pool": 0.5, "align average": 1.5}
    rows = [
        {"measure": f"forward, {name} / {other}", "seconds": forward[name], "ratio": forward[name] / forward[other]}
        | ({"bar": limits[other]} if name == "warp" else {})
        for other in limits
        for name in ("warp", "warp, copied to NCHW")
    ]
    ratio = both["warp"] / both["align and pool"]
    measure = "forward and backward, warp with box gradients / align and pool without"
    return [*rows, {"measure": measure, "seconds": both["warp"], "ratio": ratio, "bar": 0.8}]


def exponent(key: str, sizes: Sequence[int], work: dict, backward: bool, repeats: int, **options) -> dict:
    """Fit seconds = a * size ** exponent."""
    cases = {str(size): Case(**{**work, key: size}, **options) for size in sizes}
    if backward:
        calls = {name: lambda case=case: case.train(case.warp, with_boxes=True) for name, case in cases.items()}
    else:
        calls = {name: torch.no_grad()(case.warp) for name, case in cases.items()}
    seconds = median_seconds(calls, repeats)
    slope, _ = np.polyfit(np.log(sizes), np.log([seconds[str(size)] for size in sizes]), 1)
    return {
        "measure": f"{'forward and backward' if backward else 'forward'}, growth with {key}",
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "exponent": slope,
    }


def memory(case: Case) -> dict:
    with torch.no_grad():
        result = case.warp()
        output = result.numel() * result.element_size()
        peak = peak_memory(case.warp)
    return {
        "measure": "forward, peak memory / output, the output included",
        "megabytes": peak / 2**20,
        "ratio": peak / output,
        "bar": 2.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="runs of which the median is printed")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    def report(name: str, dtype: torch.dtype, row: dict) -> None:
        row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps({"work": name, "dtype": str(dtype).removeprefix("torch."), **row}), flush=True)

    for name, work in WORK.items():
        for row in compare_times(Case(**work, device=options.device), options.repeats):
            report(name, torch.float32, row)
        for dtype in (torch.float32, torch.bfloat16):
            for key in ("rois", "channels"):
                sizes = [work[key] * 2**i // 4 for i in range(4)]
                for backward in (False, True):
                    row = exponent(
                        key, sizes, work, backward, max(3, options.repeats // 3), dtype=dtype, device=options.device
                    )
                    report(name, dtype, row)
            if options.device == "cpu":
                report(name, dtype, memory(Case(**work, dtype=dtype)))


if __name__ == "__main__":
    main()
