"""The command line of train_net.py, and the config of a run that it asks for."""

from __future__ import annotations

import argparse
import os

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from torch.nn import Identity

from ..checkpoint import MNCCheckpointer
from ..config import check_config
from ..data import DATASET_MAPPER_REGISTRY, num_classes_from_datasets, prepare_dataset, register_coco_dataset
from ..evaluation import evaluation_protocol
from ..model_zoo import load_config
from .folder import check_folder
from .launch import check_device, count_processes
from .step import check_solver

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
    """Return Detectron2's parser with --dataset and --dist-timeout added."""
    parser = default_argument_parser(epilog=EPILOG)
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_ROOT"),
        help="register a dataset in COCO format under NAME, for DATASETS.TRAIN and DATASETS.TEST; repeatable",
    )
    parser.add_argument(
        "--dist-timeout",
        type=_seconds,
        default=1800,
        metavar="SECONDS",
        help="of several processes, how long one waits for the others before the run ends (default 30 minutes)",
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e8:
        raise argparse.ArgumentTypeError(f"must be positive, and less than three years, got {text}")
    return value


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


def find_input_error(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the input of a run, in one sentence, or None; draw the shapes if they are used."""
    first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        cfg = build_config(args, check_files=first_of_machine)
        names = (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
        for name in names:
            prepare_dataset(name)
        if first_of_machine:
            DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME).check_files(cfg, names)
        if not args.eval_only and first_of_machine:
            check_folder(cfg.OUTPUT_DIR, args.resume)
    except (ValueError, OSError) as error:
        return str(error)
    return None
