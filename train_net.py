#!/usr/bin/env python
"""Train and evaluate Multi-task Network Cascades.

    python train_net.py --config-file configs/quickstart/mnc_R_18_FPN.yaml --num-gpus 1
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    torchrun --nproc_per_node 8 train_net.py --config-file ...

The arguments are those of Detectron2's own train_net.py, --dataset, which registers a dataset in COCO format, and
--dist-timeout.
--config-file is a file, or the name of one of this project's configs, such as quickstart/mnc_R_18_FPN.yaml.
"""

from __future__ import annotations

import argparse
import os

import mnc_d2  # noqa: F401  (before Detectron2, whose import is quiet then)

# isort: split
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mnc_d2.checkpoint import CompleteCheckpointer
from mnc_d2.engine import (
    MNCTrainer,
    argument_parser,
    build_config,
    exit_on_error,
    find_input_error,
    leave_process_group,
    run_processes,
    train,
)
from mnc_d2.evaluation import summarize
from mnc_d2.model_zoo import get_config_file


def main(args: argparse.Namespace) -> None:
    """Run one process of the training or evaluation, which has joined the others, and part from them."""
    cfg = build_config(args, check_files=False)  # find_input_error has
    args.config_file = args.config_file and get_config_file(args.config_file)  # of which Detectron2 logs the text
    default_setup(cfg, args)
    # That gives handlers to Detectron2's loggers only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mnc_d2")
    if args.eval_only:
        results, weights = evaluate(cfg, args.resume), cfg.MODEL.WEIGHTS
    else:
        results, weights = train(cfg, args.resume), os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if comm.is_main_process():
        print(summarize(cfg, results, weights))
    leave_process_group()


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate a checkpoint; return the results, empty in all processes but the main one."""
    model = MNCTrainer.build_model(cfg)
    with exit_on_error(ValueError, OSError):
        CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = MNCTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    run_processes(main, argument_parser().parse_args(), find_input_error)
