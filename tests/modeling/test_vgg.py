"""VGG-16: its layers, outputs and sizes. That it computes what torchvision's does is in tests/checkpoint."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from mnc_d2 import add_mnc_config
from mnc_d2.modeling import VGG16

ALL = ["conv1", "conv2", "conv3", "conv4", "conv5"]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
    return cfg


def output_sizes(backbone, height, width):
    """Sizes of the outputs by name; on the meta device nothing is computed."""
    features = backbone.to("meta")(torch.zeros(2, 3, height, width, device="meta"))
    return {name: tuple(x.shape) for name, x in features.items()}


def test_layers_have_the_papers_names_and_sizes():
    shapes = {name: tuple(x.shape) for name, x in VGG16().state_dict().items()}
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    names = [f"conv{i}_{j}" for i, count in enumerate((2, 2, 3, 3, 3), start=1) for j in range(1, count + 1)]
    expected = {}
    for name, before, after in zip(names, channels, channels[1:]):
        expected[f"{name}.weight"] = (after, before, 3, 3)
        expected[f"{name}.bias"] = (after,)
    assert shapes == expected


def test_outputs_have_the_announced_channels_and_strides():
    backbone = VGG16(ALL)
    assert {name: (x.channels, x.stride) for name, x in backbone.output_shape().items()} == {
        "conv1": (64, 1),
        "conv2": (128, 2),
        "conv3": (256, 4),
        "conv4": (512, 8),
        "conv5": (512, 16),
    }
    expected = {name: (2, x.channels, 64 // x.stride, 96 // x.stride) for name, x in backbone.output_shape().items()}
    assert output_sizes(backbone, 64, 96) == expected


def test_only_the_wanted_outputs_are_made_and_no_layer_after_the_last():
    backbone = VGG16(["conv2", "conv3"])
    assert list(output_sizes(backbone, 32, 32)) == ["conv2", "conv3"] == list(backbone.output_shape())
    assert hasattr(backbone, "conv3_3") and not hasattr(backbone, "conv4_1")


@pytest.mark.parametrize(
    ("size", "down", "up"),
    [
        ((600, 840), (37, 52), (38, 53)),
        ((75, 113), (4, 7), (5, 8)),
        ((17, 16), (1, 1), (2, 1)),
        ((1, 40), (1, 3), (1, 3)),
    ],
)
def test_odd_sizes_round_down_or_as_caffe_does_up(size, down, up):
    assert output_sizes(VGG16(), *size)["conv5"][2:] == down
    assert output_sizes(VGG16(ceil_mode=True), *size)["conv5"][2:] == up


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_freeze_at_k_freezes_the_stages_up_to_k(freeze_at):
    for name, parameter in VGG16(freeze_at=freeze_at).named_parameters():
        assert parameter.requires_grad == (int(name[len("conv")]) > freeze_at), name


def test_gradient_reaches_what_is_not_frozen():
    torch.manual_seed(0)
    backbone = VGG16(["conv3"], freeze_at=2)
    backbone(torch.randn(1, 3, 8, 8))["conv3"].sum().backward()
    assert backbone.conv2_2.weight.grad is None
    assert backbone.conv3_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("names", [["conv5", "res5"], []], ids=["unknown", "none"])
def test_wrong_outputs_are_an_error_that_names_those_there_are(names):
    with pytest.raises(ValueError, match="VGG16 has the features conv1, .*conv5, not") as error:
        VGG16(names)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_wrong_freeze_at_is_an_error_that_names_the_key(cfg, freeze_at):
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    with pytest.raises(ValueError, match=rf"MODEL\.BACKBONE\.FREEZE_AT .*{freeze_at}"):
        build_backbone(cfg)


def test_the_config_reaches_the_backbone(cfg):
    backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == ["conv5"]
    assert not backbone.ceil_mode
    assert not backbone.conv2_2.weight.requires_grad  # Detectron2's FREEZE_AT is 2, as the paper's
    assert backbone.conv3_1.weight.requires_grad

    cfg.MODEL.BACKBONE.NAME = "build_caffe_vgg_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [1.0]
    backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == ["conv5"]
    assert backbone.ceil_mode
    assert backbone.conv1_1.weight.requires_grad
    assert backbone.conv1_1.in_channels == 1
