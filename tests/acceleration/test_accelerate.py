"""The accelerated copy beside the model that it is of."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.engine import DefaultPredictor
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from torch import nn

from mnc_d2.acceleration import accelerate
from mnc_d2.acceleration.layers import ConstantLinear, FoldedConv2d
from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.modeling import MultitaskNetworkCascade
from mnc_d2.predictor import MNCPredictor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MNC, MASK_RCNN = "quickstart/mnc_R_18_FPN.yaml", "quickstart/mask_rcnn_R_18_FPN.yaml"
HALF = [torch.bfloat16, torch.float16]


def make_model(cfg):
    """Build a model whose scores differ from box to box."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.8, 1.2)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
    return model


@pytest.fixture(params=[MNC, MASK_RCNN], ids=["MNC", "Mask R-CNN"])
def model(request, small_config):
    return make_model(small_config(request.param, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}))


@torch.no_grad()
def detect(model, count=1, size=64, **options):
    generator = torch.Generator().manual_seed(0)
    images = [{"image": 255 * torch.rand(3, size, size, generator=generator)} for _ in range(count)]
    return [output["instances"] for output in model.inference(images, **options)]


def assert_near(found, expected, atol):
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=atol)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1000 * atol)


# ---- whole models


def test_detections_are_those_of_the_model(model):
    copied = accelerate(model)
    assert type(copied) is type(model) and any(isinstance(x, FoldedConv2d) for x in copied.modules())
    for found, expected in zip(detect(copied, 2), detect(model, 2)):
        assert_near(found, expected, 1e-5)
        assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_near_the_model(model, dtype):
    copied, dtypes = accelerate(model, dtype), []
    copied.backbone.bottom_up.stem.conv1.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    (found,), (expected,) = detect(copied), detect(model)
    assert dtypes == [dtype] and found.pred_boxes.tensor.dtype == torch.float32
    if isinstance(model, MultitaskNetworkCascade):
        assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores[:5].float(), expected.scores[:5], rtol=0, atol=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_the_model_is_left_alone(model):
    model.backbone.register_forward_hook(lambda *_: None)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    modules, gradients = list(model.modules()), [x.requires_grad for x in model.parameters()]
    (before,) = detect(model)
    for dtype in (None, *HALF):
        copied = accelerate(model, dtype)
        detect(copied)
        copied.train()
    (after,) = detect(model)
    assert torch.equal(before.scores, after.scores) and torch.equal(before.pred_masks, after.pred_masks)
    assert all(x is y for x, y in zip(modules, model.modules())) and not any(x.training for x in modules)
    assert [x.requires_grad for x in model.parameters()] == gradients
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_what_is_not_converted_shares_its_memory(model):
    addresses = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
    copied = accelerate(model)
    converted = {x.data_ptr() for layer in copied.modules() if isinstance(layer, FoldedConv2d) for x in layer.buffers()}
    reordered = {layer.mask_head.fc1.weight.data_ptr() for layer in getattr(copied.roi_heads, "passes", ())}
    assert {x.data_ptr() for x in (*copied.parameters(), *copied.buffers())} <= addresses | converted | reordered
    assert any(isinstance(layer, ConstantLinear) for layer in copied.modules())


def test_it_is_a_snapshot(model):
    first, (before,) = accelerate(model), detect(model)
    with torch.no_grad():
        model.backbone.bottom_up.stem.conv1.weight.mul_(-1)
    assert_near(detect(first)[0], before, 1e-5)
    (changed,) = detect(model)
    assert not torch.allclose(changed.scores[:5], before.scores[:5], rtol=0, atol=1e-4)
    assert_near(detect(accelerate(model))[0], changed, 1e-5)


def test_a_copy_of_the_copy_gives_the_same(model):
    copied = accelerate(model, torch.bfloat16)
    second, third = copy.deepcopy(copied), accelerate(copied, torch.bfloat16)
    assert second.inference.args[0].__self__ is second
    for other in (second, third):
        assert torch.equal(detect(other)[0].scores, detect(copied)[0].scores)


def test_training_mode_and_other_dtypes_are_refused(model):
    with pytest.raises(ValueError, match="not in torch.int8"):
        accelerate(model, torch.int8)
    model.backbone.train()
    with pytest.raises(ValueError, match="in training mode"):
        accelerate(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_without_onednn_pytorchs_operators_do_it(model, dtype, tolerance, monkeypatch):
    (expected,) = detect(accelerate(model, dtype))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    (found,) = detect(accelerate(model, dtype))
    torch.testing.assert_close(found.scores[:5], expected.scores[:5], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_image_without_proposals_has_no_detections(model, dtype):
    model.proposal_generator.post_nms_topk = {True: 0, False: 0}
    (found,) = detect(accelerate(model, dtype))
    assert len(found) == 0 and found.pred_masks.shape == (0, 64, 64)


def test_threads_call_it_at_once(model):
    copied, found = accelerate(model, torch.bfloat16), []
    (expected,) = detect(copied)
    threads = [threading.Thread(target=lambda: found.extend(detect(copied))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(x.scores, expected.scores) for x in found)


# ---- layers

GEOMETRIES = [{"bias": False}, {"groups": 4}, {"dilation": 2}, {"padding": (2, 1), "stride": 2}, {"kernel_size": 1}]
NORMS = [None, FrozenBatchNorm2d, nn.BatchNorm2d, lambda channels: nn.GroupNorm(4, channels)]
ACTIVATIONS = {
    **{"none": None, "relu": F.relu, "relu_": F.relu_, "gelu": F.gelu},
    **{"ReLU": nn.ReLU(), "ReLU in place": nn.ReLU(inplace=True), "Hardswish": nn.Hardswish()},
}


def make_conv(norm, activation, **geometry):
    """Return a convolution whose normalisation is not the identity, and where it has one."""
    torch.manual_seed(0)
    norm = norm and norm(8)
    for name, x in norm.state_dict().items() if norm else ():
        x.uniform_(0.5, 1.5) if "num" not in name else None
    return Conv2d(4, 8, **{"kernel_size": 3, **geometry}, norm=norm, activation=activation).eval()


IMAGES = torch.rand(2, 4, 11, 9, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize("norm", NORMS, ids=["none", "FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@torch.no_grad()
def test_a_convolution_with_what_follows(norm, activation, geometry):
    layer = make_conv(norm, activation, **geometry)
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.1)):
        copied = accelerate(layer, dtype)
        for images in (IMAGES, IMAGES.contiguous(memory_format=torch.channels_last), IMAGES[:0]):
            torch.testing.assert_close(copied(images).float(), layer(images), rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_other_padding_stays_as_it_is(options):
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, **options)).eval()
    assert type(accelerate(layer)[0]) is nn.Conv2d and torch.equal(accelerate(layer)(IMAGES), layer(IMAGES))


@pytest.mark.parametrize("part", ["layer", "norm", "activation"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_stays_as_it_is(part, kind):
    layer, calls = make_conv(FrozenBatchNorm2d, nn.ReLU()), []
    getattr(layer if part == "layer" else getattr(layer, part), kind)(lambda *_: calls.append(part))
    copied = accelerate(nn.Sequential(layer).eval())
    copied(IMAGES)
    assert type(copied[0]) is Conv2d and calls == [part]


def test_a_shared_layer_is_replaced_once_and_others_of_its_kind_are_not():
    class Standardised(nn.Linear):
        """Changes its weight before use."""

    shared = nn.Linear(9, 9)
    copied = accelerate(nn.Sequential(shared, Standardised(9, 9), shared).eval())
    assert copied[0] is copied[2] and type(copied[0]) is ConstantLinear and type(copied[1]) is Standardised


def test_shapes_on_the_meta_device():
    model = nn.Sequential(make_conv(FrozenBatchNorm2d, F.relu), nn.Flatten(), nn.Linear(8 * 9 * 7, 3)).eval().to("meta")
    for dtype in (None, torch.bfloat16):
        assert accelerate(model, dtype)(IMAGES.to("meta")).shape == (2, 3)


# ---- who uses it


def test_our_predictor_uses_it_and_detectron2s_does_not(small_config, tmp_path):
    cfg = small_config(**{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "MODEL.MNC.INFERENCE_PRECISION": "bfloat16"})
    cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS = (), str(tmp_path / "model.pth")
    torch.save({"model": make_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    ours, theirs = MNCPredictor(cfg), DefaultPredictor(cfg)
    dtypes = [x.backbone.bottom_up.stem.conv1.weight.dtype for x in (ours.model, theirs.model)]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert not any(isinstance(x, FoldedConv2d) for x in theirs.model.modules())
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    assert len(ours(image)["instances"]) > 0
    # Its test-time augmentation calls the method inference.
    inputs = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 50, "width": 61}]
    with torch.no_grad():
        assert len(GeneralizedRCNNWithTTA(cfg, ours.model)(inputs)[0]["instances"]) > 0
    cfg.MODEL.MNC.INFERENCE_PRECISION = "int8"
    with pytest.raises(ValueError, match="MODEL.MNC.INFERENCE_PRECISION is 'int8'. It must be one of float32, "):
        MNCPredictor(cfg)


def test_evaluations_of_a_training_have_the_weights_of_their_time(
    small_config, coco_dataset, clean_catalogs, tmp_path, monkeypatch
):
    register_coco_dataset("drawn", *coco_dataset)
    overrides = {"DATASETS.TRAIN": ("drawn",), "DATASETS.TEST": ("drawn",), "OUTPUT_DIR": str(tmp_path)}
    overrides |= {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 1, "DATALOADER.NUM_WORKERS": 0, "INPUT.CROP.ENABLED": False}
    trainer, evaluated = MNCTrainer(small_config(**overrides)), []

    def remember(model, *_):
        layer, trained = model.roi_heads.passes[0].mask_head.fc2, trainer.model.roi_heads.passes[0].mask_head.fc2
        assert type(layer) is ConstantLinear and torch.equal(layer.weight, trained.weight)
        folded = model.backbone.fpn_lateral5.weight
        assert torch.equal(folded, trainer.model.backbone.fpn_lateral5.weight)
        evaluated.append(folded.clone())
        return {}

    monkeypatch.setattr("detectron2.engine.defaults.inference_on_dataset", remember)
    trainer.train()
    assert len(evaluated) >= 2 and not torch.equal(evaluated[0], evaluated[-1])
    assert trainer.model.training
