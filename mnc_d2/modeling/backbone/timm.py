"""Convolutional networks of the package timm as backbones, with ImageNet weights from a file that is already there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from ...pretrained import find_weights, load_weights


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

        def build(**kwargs) -> Any:
            return timm.create_model(name, pretrained=False, in_chans=in_channels, **kwargs)

        infos = {_feature_name(x["reduction"]): x for x in build(features_only=True).feature_info.get_dicts()}
        unknown = set(out_features) - set(infos)
        if freeze_at > 0:
            unknown |= {f"res{freeze_at}"} - set(infos)
        if unknown or not out_features:
            raise ValueError(
                f"{name} has the features {sorted(infos)}. {list(out_features)} with MODEL.BACKBONE.FREEZE_AT "
                f"{freeze_at} asks for {sorted(unknown) or 'none'}."
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
    """Build the network of MODEL.TIMM with the features that MODEL.RPN and MODEL.ROI_HEADS name."""
    return _build(cfg, input_shape, {*cfg.MODEL.RPN.IN_FEATURES, *cfg.MODEL.ROI_HEADS.IN_FEATURES})


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's feature pyramid, MODEL.FPN, on the network of MODEL.TIMM: "p2" to "p6" of "res2" to "res5"."""
    return FPN(
        bottom_up=_build(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build(cfg, input_shape: ShapeSpec, out_features: Iterable[str]) -> TimmBackbone:
    return TimmBackbone(
        name=cfg.MODEL.TIMM.NAME,
        out_features=out_features,
        norm=cfg.MODEL.TIMM.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        # A checkpoint of the whole detector holds the backbone, too: it needs no file of ImageNet weights.
        weights="" if cfg.MODEL.WEIGHTS else cfg.MODEL.TIMM.WEIGHTS,
        in_channels=input_shape.channels,
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
