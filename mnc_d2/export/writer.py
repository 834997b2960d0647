"""Writing a trained model to one file, with what a client has to know of it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch.fx.experimental import _config as symbolic_config
from torch.utils._config_module import ConfigModule

from .. import __version__
from ..checkpoint import ModelDescription
from ..files import open_atomically
from ..predictor import load_model, load_model_config
from .network import CANDIDATES, CandidateNetwork

# Name of what a file says of its model, JSON: an entry of ONNX's metadata, or an extra file of torch.export's.
METADATA_KEY = "mnc_d2"
# The longest side of an image, in pixels.
_MAX_SIDE = 2**14
CLIENT = Path(__file__).with_name("client.py")
FORMATS = ("onnx", "torch")
# What the weights of fully connected layers may be stored as.
WEIGHTS = ("float32", "int8")


def export_model(
    path: str | os.PathLike,
    output: str | os.PathLike,
    format: str,
    *,
    weights: str = "float32",
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Write a trained model as a program from an image to the candidates of every pass.

    Beside an ONNX file comes ``client.py``, which predicts from it with numpy, Pillow and onnxruntime.

    Args:
        path, config, overrides: as :func:`~mnc_d2.predictor.load_predictor` takes them.
        output: the file; its folder is made if need be.
        format: one of ``FORMATS``: "onnx", or "torch" for ``torch.export``.
        weights: one of ``WEIGHTS``, of the fully connected layers. "int8" only for "onnx".

    Raises:
        FileNotFoundError, ValueError: as :func:`~mnc_d2.predictor.load_predictor` does; the model has a part that
            cannot be exported; or a package for ONNX is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"The format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if weights not in WEIGHTS:
        raise ValueError(f"The weights must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
    if weights == "int8" and format != "onnx":
        raise ValueError(f"Only the format onnx can have int8 weights, not {format}.")
    output = Path(output)
    if format == "onnx":
        _check_packages(["onnx", "onnxscript"] + (["onnxruntime"] if weights == "int8" else []))
    cfg, description = load_model_config(path, device="cpu", config=config, overrides=overrides)
    if cfg.INPUT.EXACT_SCALE_TEST:
        raise ValueError("Models with INPUT.EXACT_SCALE_TEST cannot be exported: the client resizes to whole pixels.")
    output.parent.mkdir(parents=True, exist_ok=True)
    network = CandidateNetwork(load_model(cfg)).eval()
    metadata = json.dumps(describe(cfg, description, network))
    program = trace(network)
    if format == "onnx":
        _write_onnx(program, metadata, output, weights)
    else:
        _write_torch(program, metadata, output)


def describe(cfg: CfgNode, description: ModelDescription, network: CandidateNetwork) -> dict:
    """Return what a client has to know of a model; plain values, which docs/export.md lists."""
    predictor = network.roi_heads.get_pass(0).classifier.predictor
    voting = inspect.signature(network.roi_heads.vote).parameters
    classes = description.metadata(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return {
        "version": __version__,
        "class_names": classes.thing_classes,
        "category_ids": list(classes.thing_dataset_id_to_contiguous_id),
        "stages": 1 + 2 * network.roi_heads.num_passes_test,
        "input": {
            "format": cfg.INPUT.FORMAT,
            "short_side": cfg.INPUT.MIN_SIZE_TEST,
            "long_side": cfg.INPUT.MAX_SIZE_TEST,
        },
        "voting": {
            "score_threshold": predictor.test_score_thresh,
            "nms_threshold": predictor.test_nms_thresh,
            "voting_iou_threshold": voting["voting_iou_threshold"].default,
            "mask_threshold": cfg.MODEL.MNC.MASK_THRESHOLD,
            "max_detections": predictor.test_topk_per_image,
            "detection_box": cfg.MODEL.MNC.DETECTION_BOX,
        },
    }


@torch.no_grad()
def trace(network: CandidateNetwork) -> torch.export.ExportedProgram:
    """Trace a network for images of any size."""
    side = {"min": 1, "max": _MAX_SIDE}
    sizes = {"image": {1: torch.export.Dim("height", **side), 2: torch.export.Dim("width", **side)}}
    # Sizes of this image that differ from each other, from 1 and from what padding makes of them, at every level.
    image = torch.zeros(3, 100, 75)
    assert isinstance(symbolic_config, ConfigModule)  # PyTorch turns the module into one when it is imported
    # Else the file would refuse images of which a feature map is one row or one column.
    with symbolic_config.patch("backed_size_oblivious", True):
        return torch.export.export(network, (image,), dynamic_shapes=sizes)


def _write_torch(program: torch.export.ExportedProgram, metadata: str, output: Path) -> None:
    with open_atomically(output) as file:
        torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": metadata})


def _write_onnx(program: torch.export.ExportedProgram, metadata: str, output: Path, weights: str) -> None:
    onnx_program = torch.onnx.export(
        program, dynamo=True, output_names=list(CANDIDATES), verbose=False, external_data=False
    )
    assert onnx_program is not None  # it is one with dynamo=True
    model = onnx_program.model_proto
    model.metadata_props.add(key=METADATA_KEY, value=metadata)
    # For those who look at the file; the exporter names sizes s62, u10 + u5, ...
    _, height, width = model.graph.input[0].type.tensor_type.shape.dim
    height.dim_param, width.dim_param = "height", "width"
    for output_value in model.graph.output:
        output_value.type.tensor_type.shape.dim[0].dim_param = "candidates"
    content = _with_int8_weights(model) if weights == "int8" else model.SerializeToString()
    with open_atomically(output) as file:
        file.write(content)
    shutil.copyfile(CLIENT, output.with_name(CLIENT.name))


def _with_int8_weights(model) -> bytes:
    """Return the file of an ``onnx.ModelProto`` whose fully connected layers compute in int8.

    Their inputs are scaled to 8 bits as they come, by their range: it takes no images to calibrate with. Not so
    convolutions, which lose an AP and take longer (docs/export.md).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it asks for a preparation that is for static quantisation
        try:
            quantize_dynamic(model, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
        finally:
            logging.disable(disabled)
        return path.read_bytes()


def _check_packages(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs the package {' and '.join(missing)}: pip install 'mnc_d2[export]'")
