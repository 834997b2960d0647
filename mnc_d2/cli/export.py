"""Write a trained model as a file for onnxruntime or for torch.export.

The network is exported up to the boxes, masks and scores of every pass, for images of any size. Beside an ONNX file
comes client.py, which predicts with numpy, Pillow and onnxruntime alone. See docs/export.md.
"""

from __future__ import annotations

import argparse

from ..export import FORMATS, WEIGHTS, export_model
from .common import add_overrides, overrides

EXAMPLE = (
    "  mnc export output/nuclei/model_best.pth --format onnx --output nuclei/model.onnx\n"
    "  python nuclei/client.py nuclei/model.onnx photograph.jpg --output results.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, such as model_final.pth")
    parser.add_argument("--config", help="of a checkpoint that does not say it itself: a file, or one of ours by name")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="such as model.onnx, or model.pt2 of torch.export"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="float32",
        help="of the fully connected layers; int8, for onnx, makes a smaller and faster file at the same AP",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Export; say what was written."""
    export_model(
        args.model, args.output, args.format, weights=args.weights, config=args.config, overrides=overrides(args)
    )
    beside = ", and client.py beside it" if args.format == "onnx" else ""
    print(f"Wrote {args.output}{beside}.")
