"""Train a model on your data.

The number of classes and their names come from the data. The folder of the output gets model_final.pth, model_best.pth
by the validation set, which also ends the training early where --patience says so, the log and the metrics.
"""

from __future__ import annotations

import argparse
import math
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..config import check_config
from ..data import num_classes_from_datasets, prepare_dataset
from ..engine import check_device, check_folder, check_solver, leave_process_group, run_processes, train
from ..engine.watching import ProgressLine
from ..evaluation import evaluation_protocol, summarize
from ..model_zoo import load_config
from .common import add_images_argument, add_overrides, overrides, register_split, set_up_log, without_prints

EXAMPLE = "  mnc train quickstart/mnc_efficientnet_lite0_FPN.yaml --data nuclei/ --output output/nuclei"

# How often a training is evaluated at most where the config does not say it.
_MAX_EVALUATIONS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or one of ours by name")
    parser.add_argument(
        "--data", required=True, help="a folder with annotations in COCO format for train and val, or a file for train"
    )
    parser.add_argument("--val", metavar="DATA", help="the validation set, where it is not in the folder of --data")
    add_images_argument(parser)
    parser.add_argument("--output", metavar="FOLDER", help="by default that of the config, OUTPUT_DIR")
    parser.add_argument("--patience", type=int, help="evaluations without a better one after which training ends")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes, each on a GPU of its own")
    add_overrides(parser)
    # One machine: train_net.py is for more.
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto", dist_timeout=1800.0)


def run(args: argparse.Namespace) -> None:
    """Check the input, then train in as many processes as asked for."""
    cfg = build_config(args)
    check_config(cfg)
    check_folder(cfg.OUTPUT_DIR, args.resume)
    run_processes(_train, args, find_input_error=lambda _: None)


def build_config(args: argparse.Namespace, check_files: bool = True) -> CfgNode:
    """Register the data and return the frozen config of the training.

    Args:
        args: the command line.
        check_files: whether to read the header of every image.

    Raises:
        ValueError, OSError: the data, the config or a key is wrong; the message says which.
    """
    cfg = load_config(args.config, overrides(args))
    train_set = register_split(args.data, "train", args.images, check_files)
    val_set = None
    if args.val is not None or os.path.isdir(args.data):
        val_set = register_split(args.val or args.data, "val", args.images, check_files)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train_set,), () if val_set is None else (val_set,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
    cfg.OUTPUT_DIR = args.output or cfg.OUTPUT_DIR
    if args.patience is not None:
        cfg.SOLVER.PATIENCE = args.patience
    if cfg.TEST.EVAL_PERIOD == 0 and val_set is not None:
        cfg.TEST.EVAL_PERIOD = evaluation_period(cfg, len(DatasetCatalog.get(val_set)))
    check_device(cfg, args.num_gpus)
    check_solver(cfg, args.num_gpus)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        evaluation_protocol(cfg, name)
        prepare_dataset(name)
    cfg.freeze()
    return cfg


def evaluation_period(cfg: CfgNode, num_images: int) -> int:
    """Iterations between evaluations on so many images, which all together are to take less time than the training.

    An image takes about as long in an evaluation as in the training. So evaluations see half as many images as the
    training at most, unless one alone is more, or the early end of the training depends on them.
    """
    solver = cfg.SOLVER
    trained = solver.MAX_ITER * solver.IMS_PER_BATCH * solver.ACCUMULATE
    evaluations = min(_MAX_EVALUATIONS, trained // (2 * max(num_images, 1)))
    if solver.PATIENCE > 0:
        evaluations = _MAX_EVALUATIONS
    # Rounded up: an evaluation just before the last iteration would be followed by another after it.
    return max(math.ceil(solver.MAX_ITER / max(evaluations, 1)), 1)


def _train(args: argparse.Namespace) -> None:
    """Run one process of the training."""
    cfg = build_config(args, check_files=False)
    set_up_log(cfg, args)
    with without_prints():
        hooks = [ProgressLine()] if comm.is_main_process() else []
        results = train(cfg, args.resume, hooks, command_words=2)
    if comm.is_main_process():
        print(summarize(cfg, results, os.path.join(cfg.OUTPUT_DIR, "model_final.pth")))
        if not cfg.DATASETS.TEST:
            print("There was no validation set, so nothing was measured: --val names one.")
    leave_process_group()
