"""From the parameter names of pretrained networks to this project's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch

# What a model may have several times. A box head: that of Detectron2's heads, or one of the classifier's two paths in
# each pass of the cascade. A backbone: one for each task, where tasks share nothing.
_COPY = re.compile(
    r"(?:roi_heads\.(?:passes\.\d+\.classifier\.(?:mask_path_head|box_path_head)|box_head)\.|"
    r"backbone\.backbones\.\w+\.)(?P<name>.+)"
)
# Names before the heads of a pass were one module; the number is that of the pass, unless all passes had one.
_BEFORE_PASSES = re.compile(r"roi_heads\.(mask_head|mask_path_head|box_path_head|predictor)\.(?:(\d+)\.)?(.+)")

# Torchvision numbers the layers of VGG-16, ReLU and pooling included.
_VGG16_CONVS = {
    "features.0": "conv1_1",
    "features.2": "conv1_2",
    "features.5": "conv2_1",
    "features.7": "conv2_2",
    "features.10": "conv3_1",
    "features.12": "conv3_2",
    "features.14": "conv3_3",
    "features.17": "conv4_1",
    "features.19": "conv4_2",
    "features.21": "conv4_3",
    "features.24": "conv5_1",
    "features.26": "conv5_2",
    "features.28": "conv5_3",
}
_VGG16_FCS = {"classifier.0": "fc1", "classifier.3": "fc2"}


def rename_heads_of_passes(state_dict: dict[str, torch.Tensor], model_keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Rename the parameters of a cascade that was saved before ``roi_heads.passes`` held the heads of each pass.

    Args:
        state_dict: tensors by name; other modules' keep their names.
        model_keys: the names in the model's state dict.
    """
    model_keys = set(model_keys)
    return {_rename_head(key, model_keys): value for key, value in state_dict.items()}


def _rename_head(key: str, model_keys: set[str]) -> str:
    match = _BEFORE_PASSES.fullmatch(key)
    if match is None:
        return key
    head, index, rest = match.groups()
    module = head if head == "mask_head" else f"classifier.{head}"
    of_shared = f"roi_heads.passes.0.{module}.{f'{index}.{rest}' if index else rest}"
    # A number may also be the name of a layer.
    return of_shared if index is None or of_shared in model_keys else f"roi_heads.passes.{index}.{module}.{rest}"


def convert_torchvision_vgg16(
    state_dict: dict[str, torch.Tensor], model_keys: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Rename the parameters of a torchvision VGG-16; any other state dict is returned as it is.

    conv1_1 to conv5_3 become those of every backbone. ``classifier.0`` and ``classifier.3``, the paper's fc6 and fc7,
    become fc1 and fc2 of every box head that the model has. Their inputs need no permutation: both sides flatten 7 x 7
    features as (C, 7, 7). ``classifier.6``, the ImageNet classes, keeps its name, which no model has.

    These weights expect RGB images in [0, 1], normalised with mean (0.485, 0.456, 0.406) and standard deviation (0.229,
    0.224, 0.225). For Detectron2, whose images go to 255, that is INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN
    [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].

    Args:
        state_dict: tensors by name.
        model_keys: the names in the model's state dict.

    Raises:
        ValueError: the state dict is of another VGG: of another depth or with batch normalisation.
    """
    # Networks trained with DataParallel carry "module." in front, or, as in PyTorch's ImageNet example, inside.
    plain = {key.replace("module.", "", 1): value for key, value in state_dict.items()}
    layers = {key[: -len(".weight")] for key in plain if re.fullmatch(r"features\.\d+\.weight", key)}
    if not layers:
        return state_dict
    if layers != set(_VGG16_CONVS):
        raise ValueError(
            "The checkpoint has torchvision's names (features.0.weight, ...) but is not torchvision's vgg16, the only "
            "one of these networks that can be loaded: VGG of 16 layers without batch normalisation. It has weights in "
            f"{', '.join(sorted(layers, key=lambda layer: int(layer.split('.')[1])))}."
        )
    copies = copied_parameters(model_keys)
    converted = {}
    for key, value in plain.items():
        layer, _, kind = key.rpartition(".")
        if layer in _VGG16_CONVS:
            name = f"{_VGG16_CONVS[layer]}.{kind}"
            names = copies.get(name, [f"backbone.{name}"])
        elif layer in _VGG16_FCS:
            names = copies.get(f"{_VGG16_FCS[layer]}.{kind}", [key])
        else:
            names = [key]
        converted.update(dict.fromkeys(names, value))
    return converted


def copy_to_all(state_dict: dict[str, torch.Tensor], model_keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Give every box head and backbone of the model an entry of its own of what the checkpoint has once.

    ResNet's res5, for example, is the head of both paths of the classifier.

    Args:
        state_dict: tensors by name, the names without what the model has in front of them: "res5.0.conv1.weight".
        model_keys: the names in the model's state dict.

    Returns:
        the state dict with such an entry under its full name in each copy, and under its own if the model has it
        elsewhere as well. The tensor is the same object.
    """
    copies = copied_parameters(model_keys)
    in_copies = {key for keys in copies.values() for key in keys}
    elsewhere = [key for key in model_keys if key not in in_copies]
    result = {}
    for key, value in state_dict.items():
        names = copies.get(key, [])
        result.update(dict.fromkeys(names, value))
        if not names or any(name == key or name.endswith(f".{key}") for name in elsewhere):
            result[key] = value
    return result


def copied_parameters(model_keys: Iterable[str]) -> dict[str, list[str]]:
    """Return, by name inside a copy ("fc1.weight"), the model's names of that parameter in all copies."""
    copies = defaultdict(list)
    for key in model_keys:
        if match := _COPY.fullmatch(key):
            copies[match["name"]].append(key)
    return dict(copies)
