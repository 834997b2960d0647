"""train_net.py on the drawn images: in the process of the tests, which saves the imports, or in one of its own."""

import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from mnc_d2.engine import argument_parser, run_processes

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_net.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
CONFIG = ROOT / "configs" / "quickstart" / "mnc_R_18_FPN.yaml"
# The quickstart model, small enough to learn two images by heart.
OVERRIDES = [
    *("DATASETS.TRAIN", "('drawn',)"),
    *("DATASETS.TEST", "('drawn',)"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.CROP.ENABLED", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(0,)"),
    *("INPUT.MIN_SIZE_TEST", "0"),
    *("INPUT.RANDOM_FLIP", "none"),
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "200"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "60"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "200"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "30"),
    *("SEED", "1"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.BASE_LR", "0.003"),
    *("SOLVER.WARMUP_ITERS", "10"),
    *("SOLVER.CHECKPOINT_PERIOD", "1000"),
    *("TEST.NUM_PICTURES", "1"),
    *("VIS_PERIOD", "100"),
]


def load_script(path):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net = load_script(SCRIPT)


def arguments_for(dataset, output, *arguments, iterations=1, overrides=()):
    """The command line of a run on the drawn images."""
    return [
        *("--config-file", CONFIG),
        *("--dataset", "drawn", *dataset),
        *arguments,
        *OVERRIDES,
        *("SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", output),
        *overrides,
    ]


def parse(arguments):
    return argument_parser().parse_args([str(x) for x in arguments])


def run_here(arguments):
    """Run train_net.py in this process; return what it printed."""
    with restored_catalogs(), restored_loggers(), redirect_stdout(io.StringIO()) as output:
        run_processes(train_net.main, parse(arguments), train_net.find_input_error)
    return output.getvalue()


def run(arguments, command=(sys.executable, SCRIPT)):
    """Run train_net.py in a process of its own, on the CPU, by a command that the arguments are appended to.

    Ten minutes are many times what it takes; they are there to end one that hangs.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(x) for x in (*command, *arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def read_metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@contextmanager
def restored_catalogs():
    """Forget the datasets that are registered inside."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    try:
        yield
    finally:
        for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
            for name in set(catalog) - names:
                catalog.remove(name)


@contextmanager
def restored_loggers():
    """Take back the handlers that a program gives its loggers."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "mnc_d2")]
    before = [(x.handlers[:], x.level, x.propagate) for x in loggers]
    try:
        yield
    finally:
        for logger, state in zip(loggers, before):
            logger.handlers[:], logger.level, logger.propagate = state
