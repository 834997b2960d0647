#!/usr/bin/env python
"""Train and evaluate Multi-task Network Cascades.

    python train_net.py --config-file configs/quickstart/mnc_R_18_FPN.yaml --num-gpus 1
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    torchrun --nproc_per_node 8 train_net.py --config-file ...

The arguments are those of Detectron2's own train_net.py, and --dataset, which registers a dataset in COCO format.
--config-file is a file, or the name of one of this project's configs, such as quickstart/mnc_R_18_FPN.yaml.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mnc_d2.checkpoint import CompleteCheckpointer
from mnc_d2.data import num_classes_from_datasets, prepare_dataset, register_coco_dataset
from mnc_d2.engine import (
    MNCTrainer,
    check_device,
    check_solver,
    join_torchrun,
    leave_process_group,
    started_by_torchrun,
)
from mnc_d2.evaluation import evaluation_protocol
from mnc_d2.evaluation.summary import summarize
from mnc_d2.model_zoo import get_config_file, load_config

EPILOG = """
several processes:
  %(prog)s --num-gpus 8 ...
      8 GPUs of this machine, a process each. On a machine without GPUs: 8 processes on the CPU, which talk over gloo.
  %(prog)s --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT ...
      the same on two machines; the other one has --machine-rank 1.
  torchrun --nproc_per_node 8 %(prog)s ...
  torchrun --nproc_per_node 8 --nnodes 2 --node_rank 0 --master_addr HOST --master_port PORT %(prog)s ...
      either, started by torchrun.

SOLVER.IMS_PER_BATCH is the number of images of all processes together, SOLVER.ACCUMULATE that of batches to one step of
the optimizer.
"""


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with --dataset added."""
    parser = default_argument_parser(epilog=EPILOG)
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
    cfg = load_config(args.config_file, args.opts)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only and not args.resume and not weights:
        raise ValueError("There is nothing to evaluate: add MODEL.WEIGHTS and the path of a checkpoint, or --resume.")
    if weights and "://" not in weights and not args.resume and not os.path.isfile(weights):
        raise FileNotFoundError(f"The checkpoint MODEL.WEIGHTS {weights} does not exist.")
    for dataset in args.dataset:
        register_coco_dataset(*dataset)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
    num_processes, num_local_processes = count_processes(args)
    check_device(cfg, num_local_processes)
    for name in cfg.DATASETS.TEST:
        evaluation_protocol(cfg, name)
    if not args.eval_only:
        check_solver(cfg, num_processes)
    cfg.freeze()
    return cfg


def count_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Return how many processes a run has on all machines and how many on this one, whether they are started or not.

    Raises:
        ValueError: both torchrun and the arguments give a number.
    """
    if not started_by_torchrun():
        return args.num_machines * args.num_gpus, args.num_gpus
    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError("torchrun starts the processes already. Leave out --num-gpus and --num-machines.")
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def find_mistake(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the input of a run, in one sentence, or None; draw the shapes if they are used."""
    try:
        cfg = build_config(args)
        for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            prepare_dataset(name)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def main(args: argparse.Namespace) -> None:
    """Run one process of the training or evaluation, which has joined the others, and part from them."""
    cfg = build_config(args)
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
    CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = MNCTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(cfg: CfgNode, resume: bool) -> dict:
    """Train, from the last checkpoint if ``resume``; return the results of the evaluation at the end, as above."""
    trainer = MNCTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train()


if __name__ == "__main__":
    args = argument_parser().parse_args()
    if started_by_torchrun():
        join_torchrun()
    # Wrong input ends here, in one sentence, whichever process found it and before others are started.
    mistakes = [mistake for mistake in comm.all_gather(find_mistake(args)) if mistake]
    if mistakes:
        if comm.is_main_process():
            print(f"train_net.py: {mistakes[0]}", file=sys.stderr, flush=True)
        # torchrun stops all processes when the first one ends: they end after the sentence is printed.
        leave_process_group()
        sys.exit(1)
    if started_by_torchrun():
        main(args)
    else:
        if args.num_gpus > 1 and not torch.cuda.is_available():
            # Processes share the cores; each would start a thread for every one of them.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.num_gpus)))
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
