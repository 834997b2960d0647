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
from torch.nn import Identity

from mnc_d2.checkpoint import CompleteCheckpointer, MNCCheckpointer
from mnc_d2.config import check_config
from mnc_d2.data import check_mask_proposals, num_classes_from_datasets, prepare_dataset, register_coco_dataset
from mnc_d2.engine import (
    MNCTrainer,
    argument_parser,
    check_device,
    check_folder,
    check_solver,
    count_processes,
    leave_process_group,
    one_sentence,
    run_processes,
    train,
)
from mnc_d2.evaluation import evaluation_protocol, summarize
from mnc_d2.model_zoo import get_config_file, load_config


def build_config(args: argparse.Namespace, check_files: bool = True) -> CfgNode:
    """Register the datasets and return the frozen config of a run, checked as far as that is possible beforehand.

    Args:
        args: the command line.
        check_files: whether to read the header of every image; one process of each machine does.

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
        register_coco_dataset(*dataset, check_files=check_files)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
    num_processes, num_local_processes = count_processes(args)
    check_device(cfg, num_local_processes)
    for name in cfg.DATASETS.TEST:
        evaluation_protocol(cfg, name)
    check_config(cfg)
    if not args.eval_only:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: there is nothing to train on.")
        check_solver(cfg, num_processes)
    elif args.resume and not weights and not MNCCheckpointer(Identity(), cfg.OUTPUT_DIR).has_checkpoint():
        raise ValueError(f"There is nothing to evaluate: OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint.")
    cfg.freeze()
    return cfg


def find_mistake(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the input of a run, in one sentence, or None; draw the shapes if they are used."""
    first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        cfg = build_config(args, check_files=first_of_machine)
        names = (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
        for name in names:
            prepare_dataset(name)
        if cfg.DATASETS.MASK_PROPOSALS and first_of_machine:
            check_mask_proposals(cfg.DATASETS.MASK_PROPOSALS, names)
        if not args.eval_only and first_of_machine:
            check_folder(cfg.OUTPUT_DIR, args.resume)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def main(args: argparse.Namespace) -> None:
    """Run one process of the training or evaluation, which has joined the others, and part from them."""
    cfg = build_config(args, check_files=False)  # find_mistake has
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
    with one_sentence(ValueError, OSError):
        CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = MNCTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    run_processes(main, argument_parser().parse_args(), find_mistake)
