"""The end of a run in words."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate


def summarize(cfg: CfgNode, results: dict[str, Any], weights: str) -> str:
    """Return a table of results, and where the pictures, the log and the checkpoint are.

    The table has AP or mAP^r of each task, and all metrics of a task that has neither.

    Args:
        cfg: the config of the run.
        results: by task and metric; by dataset before that, if there are several.
        weights: path of the checkpoint.
    """
    per_dataset = results if len(cfg.DATASETS.TEST) > 1 else {name: results for name in cfg.DATASETS.TEST}
    scores = {(name, task): x for name, tasks in per_dataset.items() for task, x in (tasks or {}).items()}
    # Of mAP^r what all classes have in common, in the paper's interpolation.
    regions = [key for x in scores.values() for key in x if key.startswith(("mAPr@", "mAPr_vol")) and "-" not in key]
    others = [key for x in scores.values() if not x.keys() & {"AP", "mAPr@50"} for key in x]
    columns = ["AP", "AP50", "AP75", *dict.fromkeys(regions + others)]
    rows = [[*names, *(x.get(column) for column in columns)] for names, x in scores.items()]
    lines = [tabulate(rows, headers=["dataset", "task", *columns], floatfmt=".1f")] if rows else []
    if cfg.TEST.NUM_PICTURES > 0:
        for name in cfg.DATASETS.TEST:
            lines.append(f"pictures:   {os.path.join(cfg.OUTPUT_DIR, 'inference', name, 'pictures')}")
    return "\n".join([*lines, f"log:        {os.path.join(cfg.OUTPUT_DIR, 'log.txt')}", f"checkpoint: {weights}"])
