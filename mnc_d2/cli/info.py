"""Say what a model is: stages, parameters, FLOPs, classes.

MODEL is a checkpoint; a config, by file or name, stands for the model that a training by it starts with.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from tabulate import tabulate

from ..checkpoint import ModelDescription
from ..checkpoint.checkpointer import module_of
from ..data import num_classes_from_datasets
from ..engine.watching import find_metric
from ..model_zoo import load_config
from ..predictor import load_model, load_model_config

EXAMPLE = "  mnc info output/nuclei/model_best.pth\n  mnc info quickstart/mnc_R_18_FPN.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint or a config")
    parser.add_argument(
        "--size", nargs=2, type=int, default=(600, 800), metavar=("HEIGHT", "WIDTH"), help="of the image of the FLOPs"
    )


def run(args: argparse.Namespace) -> None:
    """Print what there is to know."""
    if args.model.endswith((".yaml", ".yml")):
        cfg = load_config(args.model)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
        description, model = ModelDescription.of_config(cfg), build_model(cfg).eval()
    else:
        cfg, description = load_model_config(args.model, device="cpu")
        model = load_model(cfg)
    rows = [*describe(cfg, description), *count_parameters(model), ("FLOPs", count_flops(model, *args.size))]
    print(tabulate(rows, tablefmt="plain"))


def describe(cfg: CfgNode, description: ModelDescription) -> list[tuple[str, str]]:
    """Return what config and checkpoint say of a model, as rows of a table."""
    rows = [("architecture", f"{cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}")]
    if cfg.MODEL.META_ARCHITECTURE == "MultitaskNetworkCascade":
        trained, tested = (1 + 2 * x for x in (cfg.MODEL.MNC.NUM_PASSES_TRAIN, cfg.MODEL.MNC.NUM_PASSES_TEST))
        rows.append(("stages", f"{trained} in training, {tested} at inference"))
    names = ", ".join(description.class_names)
    rows.append(("classes", f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}{': ' if names else ''}{names}"))
    rows.append(("dataset", description.dataset))
    metric = find_metric(description.metrics)
    if metric:
        rows.append((metric, f"{description.metrics[metric]:.1f}, when it was saved"))
    if description.version:
        rows.append(("mnc_d2", description.version))
    return rows


def count_parameters(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Return the number of parameters, of all and of each part, as rows of a table."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[module_of(name)] += parameter.numel()
    rows = [("parameters", f"{sum(counts.values()):,}")]
    return rows + [(f"  {name}", f"{count:,}") for name, count in counts.items()]


def count_flops(model: torch.nn.Module, height: int, width: int) -> str:
    """Return the multiply-adds of one image of noise by fvcore, or why they are not known."""
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, height, width, generator=generator)
    try:
        flops = FlopCountAnalysis(model, [{"image": image}])
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        total = flops.total()
    except Exception as error:  # tracing raises whatever the model does
        return f"not counted: fvcore cannot trace this model ({error})"
    return f"{total / 1e9:,.1f} billion multiply-adds for {height} x {width} pixels, by fvcore"
