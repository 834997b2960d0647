"""Evaluate a trained model on annotated images.

Prints AP, and writes predictions and pictures. The training set is not needed.
"""

from __future__ import annotations

import argparse
import os

from detectron2.data import MetadataCatalog

from ..data import prepare_dataset
from ..engine import MNCTrainer
from ..evaluation import summarize
from ..predictor import load_model, load_model_config
from .common import (
    add_images_argument,
    add_model_arguments,
    add_overrides,
    overrides,
    register_split,
    set_up_log,
    without_prints,
)

EXAMPLE = "  mnc eval output/nuclei/model_best.pth --data nuclei/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="a file in COCO format, or a folder with one for val or test")
    add_images_argument(parser)
    parser.add_argument("--output", metavar="FOLDER", help="by default the folder eval beside the model")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, and print the table."""
    cfg, description = load_model_config(args.model, device=args.device, config=args.config, overrides=overrides(args))
    name = register_split(args.data, "val", args.images)
    if name is None:
        raise FileNotFoundError(f"{args.data} has no annotations of a validation set, such as val.json.")
    check_classes(description.class_names, name, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    prepare_dataset(name)
    cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = args.output or os.path.join(os.path.dirname(os.path.abspath(args.model)), "eval")
    cfg.freeze()
    set_up_log(cfg, args)
    with without_prints():
        results = MNCTrainer.test(cfg, load_model(cfg))
    print(summarize(cfg, results, args.model))


def check_classes(class_names: list[str], dataset: str, num_classes: int) -> None:
    """Check that the classes of a dataset are those that a model knows.

    Args:
        class_names: of the model; empty where they are not known.
        dataset: a registered dataset.
        num_classes: of the model.

    Raises:
        ValueError: they differ.
    """
    names = list(MetadataCatalog.get(dataset).get("thing_classes", ()))
    if (names != class_names) if class_names else (len(names) != num_classes):
        known = ", ".join(class_names) or f"{num_classes} without names"
        raise ValueError(f"The classes of the data are {', '.join(names)}; those of the model are {known}.")
