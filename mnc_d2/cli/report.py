"""Write a report of a run as one HTML page.

RUN is the folder of a training or an evaluation, with the predictions on its validation set. The page has AP by class
and size, learning curves, what is confused, the best and worst images, and what each pass of the cascade changed.
"""

from __future__ import annotations

import argparse
import glob
import os

from detectron2.data import DatasetCatalog

from ..checkpoint import read_description
from ..model_zoo import parse_config
from ..report import write_report
from .common import add_images_argument, register_recorded, register_split

EXAMPLE = "  mnc report output/nuclei"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a training or an evaluation")
    parser.add_argument("--data", help="where it is not where it was: a file in COCO format, or a folder")
    add_images_argument(parser)
    parser.add_argument("--model", help="the checkpoint, where it is not model_final.pth in the run")
    parser.add_argument("--output", metavar="FILE.html", help="by default report.html in the run")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    folder, config = args.run_folder, os.path.join(args.run_folder, "config.yaml")
    if not os.path.isfile(config):
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.yaml.")
    with open(config, encoding="utf-8") as file:
        cfg = parse_config(file.read(), config)
    model = args.model or os.path.join(folder, "model_final.pth")
    if not args.model and not os.path.isfile(model):
        model = cfg.MODEL.WEIGHTS  # of an evaluation
    description = read_description(model)
    register_recorded(folder)
    evaluated = [name for name in cfg.DATASETS.TEST if glob.glob(os.path.join(folder, "inference", name))]
    if not evaluated:
        raise FileNotFoundError(f"{folder} has no predictions. Evaluate the model first: mnc eval.")
    name = evaluated[0]
    if args.data:
        registered = register_split(args.data, "val", args.images)
        if registered != name:
            raise ValueError(f"The run was evaluated on '{name}', and {args.data} is '{registered}'.")
    if name not in DatasetCatalog:
        raise ValueError(f"The run was evaluated on '{name}', which is not registered. Add --data.")
    output = args.output or os.path.join(folder, "report.html")
    write_report(folder, name, model, description, output)
    print(f"report: {output}")
