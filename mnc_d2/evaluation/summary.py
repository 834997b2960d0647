"""The end of a run in a few lines."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from tabulate import tabulate


def print_summary(cfg: CfgNode, results: dict, weights: str) -> None:
    """Print the AP or mAP^r of each task, and where the pictures, the log and the checkpoint are."""
    per_dataset = results if len(cfg.DATASETS.TEST) > 1 else {name: results for name in cfg.DATASETS.TEST}
    scores = {(name, task): x for name, tasks in per_dataset.items() for task, x in (tasks or {}).items()}
    # Of mAP^r what all classes have in common, in the paper's interpolation.
    regions = [key for x in scores.values() for key in x if key.startswith(("mAPr@", "mAPr_vol")) and "-" not in key]
    columns = ["AP", "AP50", "AP75", *dict.fromkeys(regions)]
    rows = [[*names, *(x.get(column) for column in columns)] for names, x in scores.items()]
    print(tabulate(rows, headers=["dataset", "task", *columns], floatfmt=".1f"))
    if cfg.TEST.NUM_PICTURES > 0:
        for name in cfg.DATASETS.TEST:
            print("pictures:  ", os.path.join(cfg.OUTPUT_DIR, "inference", name, "pictures"))
    print("log:       ", os.path.join(cfg.OUTPUT_DIR, "log.txt"))
    print("checkpoint:", weights)
