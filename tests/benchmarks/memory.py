"""Resident memory of a long training of a tiny model, every so many iterations, and its slope.

    python tests/benchmarks/memory.py --iterations 10000

The model is the quickstart's, small and narrow, on drawn images of 64 x 64, with one process that loads them; it is
evaluated and saved on the way. What an iteration leaves behind, in this process or in the loader, shows as a slope.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from tabulate import tabulate

from mnc_d2.data import SHAPES_CLASSES, ShapesSpec, register_shapes
from mnc_d2.engine import MNCTrainer
from mnc_d2.model_zoo import get_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_backbone import build_small_fpn_backbone  # noqa: E402


class Memory(HookBase):
    """Records the resident memory of this process and of those it started, in MiB, every ``period`` iterations."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._began = time.monotonic()
        self.rows: list[tuple[int, float, float]] = []

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0:
            own, workers = resident(os.getpid()), sum(map(resident, children(os.getpid())))
            self.rows.append((done, own, workers))
            print(
                f"{done} iterations in {time.monotonic() - self._began:.0f} s: {own:.1f} + {workers:.1f} MiB",
                flush=True,
            )


def make_config(iterations: int, folder: str) -> CfgNode:
    """Return the config of the training, which writes into a folder."""
    register_shapes("memory", ShapesSpec("memory", num_images=20, seed=0, image_size=(64, 64)), root=folder)
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.merge_from_list(
        [
            *("DATALOADER.NUM_WORKERS", 1),
            *("DATASETS.TRAIN", ("memory",)),
            *("DATASETS.TEST", ("memory",)),
            *("INPUT.MIN_SIZE_TRAIN", (48, 64)),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("MODEL.BACKBONE.NAME", build_small_fpn_backbone.__name__),
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRegressionHead"),
            *("MODEL.MNC.MASK_FC_DIM", 32),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
            *("MODEL.ROI_HEADS.NUM_CLASSES", len(SHAPES_CLASSES)),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 10),
            *("OUTPUT_DIR", os.path.join(folder, "output")),
            *("SOLVER.BASE_LR", 1e-4),
            *("SOLVER.CHECKPOINT_PERIOD", max(1, iterations // 10)),
            *("SOLVER.IMS_PER_BATCH", 1),
            *("SOLVER.MAX_CHECKPOINTS", 1),
            *("SOLVER.MAX_ITER", iterations),
            *("SOLVER.STEPS", ()),
            *("TEST.EVAL_PERIOD", max(1, iterations // 10)),
            *("TEST.NUM_PICTURES", 0),
            *("VIS_PERIOD", 0),
        ]
    )
    return cfg


def resident(pid: int) -> float:
    """Return the resident memory of a process that is its own, not shared with others, in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        sizes = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Private")}
    return sum(map(int, sizes.values())) / 1024


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(x) for x in file.read().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10000)
    parser.add_argument("--period", type=int, default=1000, help="iterations between two rows of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = Memory(args.period)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MNCTrainer(make_config(args.iterations, folder))
        trainer.register_hooks([memory])
        trainer.train()
    print(
        tabulate(memory.rows, headers=["iterations", "training, MiB", "loader, MiB"], floatfmt=".1f", tablefmt="pipe")
    )
    # The first rows are of caches that fill.
    late = np.array(memory.rows[len(memory.rows) // 5 :])
    for name, column in (("training", 1), ("loader", 2)):
        slope = np.polyfit(late[:, 0], late[:, column], 1)[0] * 1000
        print(f"{name}: {slope:+.2f} MiB in 1000 iterations, of the last {len(late)} rows")


if __name__ == "__main__":
    main()
