#!/usr/bin/env python
"""Train and evaluate Multi-task Network Cascades.

    python train_net.py --config-file configs/quickstart/mnc_R_18_FPN.yaml --num-gpus 1
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

The arguments are those of Detectron2's own train_net.py, and --dataset, which registers a dataset in COCO format.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from mnc_d2 import add_mnc_config
from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.data import num_classes_from_datasets, prepare_dataset, register_coco_dataset
from mnc_d2.engine import MNCTrainer


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with --dataset added."""
    parser = default_argument_parser()
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_ROOT"),
        help="register a dataset in COCO format under NAME, for DATASETS.TRAIN and DATASETS.TEST; repeatable",
    )
    return parser


def build_config(args: argparse.Namespace) -> CfgNode:
    """Register the datasets and return the frozen config of a run, checked as far as that is possible beforehand.

    Raises:
        ValueError, FileNotFoundError: a dataset, the config file or a key is wrong; the message says which.
    """
    cfg = get_cfg()
    add_mnc_config(cfg)
    if args.config_file:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(f"The config file {args.config_file} does not exist.")
        _merge(cfg.merge_from_file, args.config_file, where=args.config_file)
    _merge(cfg.merge_from_list, args.opts, where="KEY VALUE overrides")
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not args.resume and not os.path.isfile(weights):
        raise FileNotFoundError(f"The checkpoint MODEL.WEIGHTS {weights} does not exist.")
    for dataset in args.dataset:
        register_coco_dataset(*dataset)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
    cfg.freeze()
    return cfg


def _merge(merge: Callable, source: str | list[str], where: str) -> None:
    """Call ``merge(source)``; what is wrong with the source becomes a ValueError that says where."""
    try:
        merge(source)
    except OSError:
        raise
    except Exception as error:  # yacs and yaml raise all kinds: a failed assertion, KeyError, YAMLError, ...
        raise ValueError(f"{where}: {error}") from error


def main(args: argparse.Namespace) -> dict:
    """Run one process of the training or evaluation; return the results of the evaluation."""
    cfg = build_config(args)
    default_setup(cfg, args)
    # That gives handlers to Detectron2's loggers only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mnc_d2")
    if args.eval_only:
        model = MNCTrainer.build_model(cfg)
        MNCCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = MNCTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
            print_summary(cfg, results, cfg.MODEL.WEIGHTS)
        return results
    trainer = MNCTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    if comm.is_main_process():
        print_summary(cfg, results, os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    return results


def print_summary(cfg: CfgNode, results: dict, weights: str) -> None:
    """Print the AP of each task, and where the pictures, the log and the checkpoint are."""
    per_dataset = results if len(cfg.DATASETS.TEST) > 1 else {name: results for name in cfg.DATASETS.TEST}
    columns = ["AP", "AP50", "AP75"]
    rows = [
        [name, task, *(scores[column] for column in columns)]
        for name, tasks in per_dataset.items()
        for task, scores in (tasks or {}).items()
    ]
    print(tabulate(rows, headers=["dataset", "task", *columns], floatfmt=".1f"))
    if cfg.TEST.NUM_PICTURES > 0:
        for name in cfg.DATASETS.TEST:
            print("pictures:  ", os.path.join(cfg.OUTPUT_DIR, "inference", name, "pictures"))
    print("log:       ", os.path.join(cfg.OUTPUT_DIR, "log.txt"))
    print("checkpoint:", weights)


if __name__ == "__main__":
    args = argument_parser().parse_args()
    try:
        # Wrong input ends here, in one sentence and before any process is started.
        cfg = build_config(args)
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            prepare_dataset(name)
    except (ValueError, OSError) as error:
        sys.exit(f"train_net.py: {error}")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
