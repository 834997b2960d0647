"""The authors' released 5-stage VGG-16 model, from Caffe to this project.

    python -m mnc_d2.experiments.convert_caffe mnc_model.caffemodel.h5 mnc_model.pth

The result is for configs/PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage_caffe.yaml, and says so: see
``mnc_d2.load_predictor``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from ..checkpoint.description import DESCRIPTION_KEY, ModelDescription
from ..files import open_atomically
from ..model_zoo import get_config
from .caffe_model import read_caffe_model

CONFIG = "PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage_caffe.yaml"

# Where the parameters of each layer belong, and the shape of its weight. A bias has one element per row of it.
_HEADS = "roi_heads.passes.0"
_RPN = "proposal_generator.rpn_head"
LAYERS = {
    "conv1_1": ("backbone.conv1_1", (64, 3, 3, 3)),
    "conv1_2": ("backbone.conv1_2", (64, 64, 3, 3)),
    "conv2_1": ("backbone.conv2_1", (128, 64, 3, 3)),
    "conv2_2": ("backbone.conv2_2", (128, 128, 3, 3)),
    "conv3_1": ("backbone.conv3_1", (256, 128, 3, 3)),
    "conv3_2": ("backbone.conv3_2", (256, 256, 3, 3)),
    "conv3_3": ("backbone.conv3_3", (256, 256, 3, 3)),
    "conv4_1": ("backbone.conv4_1", (512, 256, 3, 3)),
    "conv4_2": ("backbone.conv4_2", (512, 512, 3, 3)),
    "conv4_3": ("backbone.conv4_3", (512, 512, 3, 3)),
    "conv5_1": ("backbone.conv5_1", (512, 512, 3, 3)),
    "conv5_2": ("backbone.conv5_2", (512, 512, 3, 3)),
    "conv5_3": ("backbone.conv5_3", (512, 512, 3, 3)),
    "rpn_conv_3x3": (f"{_RPN}.conv", (512, 512, 3, 3)),
    "rpn_cls_score": (f"{_RPN}.objectness_logits", (18, 512, 1, 1)),
    "rpn_bbox_pred": (f"{_RPN}.anchor_deltas", (36, 512, 1, 1)),
    "fc6_maskest": (f"{_HEADS}.mask_head.fc1", (256, 512 * 14 * 14)),
    "mask_pred": (f"{_HEADS}.mask_head.fc2", (21 * 21, 256)),
    "fc6_mask": (f"{_HEADS}.classifier.mask_path_head.fc1", (4096, 512 * 7 * 7)),
    "fc7_mask": (f"{_HEADS}.classifier.mask_path_head.fc2", (4096, 4096)),
    "fc6": (f"{_HEADS}.classifier.box_path_head.fc1", (4096, 512 * 7 * 7)),
    "fc7": (f"{_HEADS}.classifier.box_path_head.fc2", (4096, 4096)),
    "cls_score": (f"{_HEADS}.classifier.predictor.cls_score", (21, 8192)),
    "seg_cls_score": (f"{_HEADS}.classifier.predictor.seg_cls_score", (21, 8192)),
    "bbox_pred": (f"{_HEADS}.classifier.predictor.bbox_pred", (84, 8192)),
}
# Layers of the second pass share the parameters of the first. HDF5 has them once, a binary model may repeat them.
_SHARED_SUFFIX = "_ext"


def convert_layers(
    layers: Mapping[str, Sequence[np.ndarray]],
    expected: Mapping[str, tuple[str, tuple[int, ...]]] = LAYERS,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename and reorder the parameters of the released model.

    Fully connected layers and convolutions have the same layout on both sides, inputs flattened in the order channel,
    row, column. What differs: Caffe's classes start with the background, here it is the last; and Caffe's RPN has a
    background and an object score for each anchor, here there is one logit, their difference, of which the sigmoid is
    the softmax of the two.

    Args:
        layers: as :func:`~mnc_d2.experiments.caffe_model.read_caffe_model` returns them.
        expected: by layer, the name of the module that gets its parameters, and the shape of its weight.

    Returns:
        the state dict, float32; and the parameters that are not used, "layer/index".

    Raises:
        ValueError: a layer is missing, its parameters have another shape, or a layer of the second pass does not
            share those of the first; the message names all such layers.
    """
    state, unused, problems = {}, [], []
    for layer, (module, shape) in expected.items():
        shapes = [shape, shape[:1]]
        arrays = [_drop_leading_ones(x, len(s)) for x, s in zip(layers.get(layer, []), shapes)]
        found = [tuple(x.shape) for x in arrays]
        if found != shapes:
            problems.append(
                f"{layer} must have a weight of shape {shapes[0]} and a bias of shape {shapes[1]}, it has "
                + (" and ".join(map(str, found)) or "none")
            )
            continue
        for kind, array in zip(("weight", "bias"), arrays):
            # A copy: the array may be a view of the file.
            state[f"{module}.{kind}"] = torch.tensor(_reorder(layer, array))
    for layer, parameters in layers.items():
        base = layer.removesuffix(_SHARED_SUFFIX)
        if base != layer and base in expected and parameters:
            same = len(parameters) == len(layers.get(base, [])) and all(map(np.array_equal, parameters, layers[base]))
            if not same:
                problems.append(f"{layer} must share the parameters of {base}, but it has others")
        else:
            unused += [f"{layer}/{index}" for index in range(2 if layer in expected else 0, len(parameters))]
    if problems:
        raise ValueError("This is not the released 5-stage VGG-16 model: " + "; ".join(problems) + ".")
    return state, unused


def _drop_leading_ones(array: np.ndarray, ndim: int) -> np.ndarray:
    """Drop the leading axes of length 1 beyond ``ndim``, which legacy files have: all their arrays have four axes."""
    extra = array.ndim - ndim
    return array.reshape(array.shape[extra:]) if extra > 0 and set(array.shape[:extra]) == {1} else array


def _reorder(layer: str, array: np.ndarray) -> np.ndarray:
    """Bring the rows of a weight or bias into this project's order."""
    if layer == "rpn_cls_score":  # backgrounds of all anchors, then objects
        background, objects = np.split(array, 2)
        return objects - background
    if layer in ("cls_score", "seg_cls_score"):
        return np.roll(array, -1, axis=0)
    if layer == "bbox_pred":  # four rows to a class
        return np.roll(array, -4, axis=0)
    return array


def convert_file(source: str, target: str, expected: Mapping[str, tuple[str, tuple[int, ...]]] = LAYERS) -> list[str]:
    """Convert a Caffe model to a checkpoint of this project, of tensors only.

    Args:
        source: the released model, HDF5 or binary protobuf.
        target: the file to write; it appears when it is complete. Its folder is made if need be.
        expected: as in :func:`convert_layers`.

    Returns:
        the parameters that are not used, "layer/index".

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`~mnc_d2.experiments.caffe_model.read_caffe_model` and
            :func:`convert_layers`; a ValueError names the file.
    """
    layers = read_caffe_model(source)
    try:
        state, unused = convert_layers(layers, expected)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    with open_atomically(target) as file:
        torch.save({"model": state, DESCRIPTION_KEY: asdict(ModelDescription.of_config(get_config(CONFIG)))}, file)
    return unused


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with the input ends it with one sentence."""
    parser = argparse.ArgumentParser(description="Convert the released Caffe model of MNC.")
    parser.add_argument("source", metavar="IN.caffemodel[.h5]", help="the released model: HDF5 or binary protobuf")
    parser.add_argument("target", metavar="OUT.pth", help="the checkpoint to write")
    args = parser.parse_args(arguments)
    if not args.target.endswith(".pth"):
        parser.error(f"{args.target} must end in .pth")
    try:
        unused = convert_file(args.source, args.target)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"convert_caffe: {error}")
    print(f"{args.target}: the parameters of {len(LAYERS)} layers. Not used: {', '.join(unused) or 'none'}.")


if __name__ == "__main__":
    main()
