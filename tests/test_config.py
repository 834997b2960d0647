"""add_mnc_config: every key with its default, and the keys that reach the model."""

import re
from functools import reduce
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from mnc_d2 import add_mnc_config
from mnc_d2.config import KEYS
from mnc_d2.experiments import UnsharedMNCROIHeads
from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import MNCROIHeads

# Config keys that MNCROIHeads takes as they are, its argument of each, and a value that is not the default.
HEADS_KEYS = {
    "NUM_PASSES_TRAIN": ("num_passes_train", 3),
    "NUM_PASSES_TEST": ("num_passes_test", 1),
    "NEXT_PASS_MIN_SCORE": ("next_pass_min_score", 0.1),
}

# Those that reach an argument of its parts: how the part is found, its argument, and a value that is not the default.
KEYS_OF_PARTS = {
    "DETECTION_BOX": (lambda heads: heads.vote.keywords, "detection_box", "tight"),
    "MASK_THRESHOLD": (lambda heads: heads.vote.keywords, "mask_threshold", 0.45),
    "MASK_LOSS_WEIGHT": (lambda heads: vars(heads.mask_supervision), "loss_weight", 2.0),
}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRegressionHead"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
    return cfg


def build(cfg):
    return MNCROIHeads(cfg, {"res4": ShapeSpec(channels=4, stride=16)})


def test_defaults_are_the_papers(cfg):
    mnc = cfg.MODEL.MNC
    assert (mnc.NUM_PASSES_TRAIN, mnc.NUM_PASSES_TEST, mnc.MASK_SIZE, mnc.MASK_FC_DIM) == (2, 2, 28, 256)
    assert (mnc.MASK_THRESHOLD, mnc.MASK_LOSS_WEIGHT) == (0.4, 1.0)


def test_keys_are_few_and_each_has_its_reason(cfg):
    assert len(KEYS) == len({key.name for key in KEYS}) <= 32
    for key in KEYS:
        assert key.reason.endswith("."), key.name
        assert reduce(getattr, key.name.split("."), cfg) == key.default, key.name


def test_a_change_of_a_config_does_not_reach_the_next(cfg):
    cfg.MODEL.MNC.OUTPUTS.append("passes")
    fresh = get_cfg()
    add_mnc_config(fresh)
    assert fresh.MODEL.MNC.OUTPUTS == ["instances"]


@pytest.mark.parametrize("cuda", [True, False])
def test_the_device_is_the_cpu_where_there_is_no_gpu(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cfg = get_cfg()
    add_mnc_config(cfg)
    assert cfg.MODEL.DEVICE == ("cuda" if cuda else "cpu")


@pytest.mark.parametrize(
    ("key", "argument", "value"), [(key, *x) for key, x in HEADS_KEYS.items()], ids=HEADS_KEYS.keys()
)
def test_every_switch_reaches_the_cascade(cfg, key, argument, value):
    assert getattr(build(cfg), argument) == cfg.MODEL.MNC[key] != value
    cfg.MODEL.MNC[key] = value
    assert getattr(build(cfg), argument) == value


@pytest.mark.parametrize(
    ("key", "part", "argument", "value"), [(key, *x) for key, x in KEYS_OF_PARTS.items()], ids=KEYS_OF_PARTS.keys()
)
def test_every_switch_reaches_the_parts_of_the_cascade(cfg, key, part, argument, value):
    assert part(build(cfg))[argument] == cfg.MODEL.MNC[key] != value
    cfg.MODEL.MNC[key] = value
    assert part(build(cfg))[argument] == value


def test_labels_of_masks_have_the_threshold_of_the_results(cfg):
    cfg.MODEL.MNC.MASK_THRESHOLD = 0.45
    assert build(cfg).mask_supervision.mask_threshold == 0.45


def test_gradients_reach_the_cascade(cfg):
    cfg.MODEL.MNC.GRADIENTS = "released, anchors=False"
    heads = build(cfg)
    assert str(heads.gradients) == "released, anchors=False"
    assert heads.roi_anchor_loss is None


def test_background_bands_reach_the_sampler(cfg):
    cfg.MODEL.MNC.BACKGROUND_BANDS = [[0.2, 0.5, 0.75], [0.0, 0.2, 0.25]]
    assert build(cfg).sample.keywords["bands"] == [[0.2, 0.5, 0.75], [0.0, 0.2, 0.25]]


@pytest.mark.parametrize(("name", "released"), [("MNCROIHeads", False), ("PaperMNCROIHeads", True)])
def test_rules_of_sampling_are_those_of_the_heads(cfg, name, released):
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, {"res4": ShapeSpec(channels=4, stride=16)})
    assert heads.append_gt_to_later_passes == heads.next_box_background == released
    assert heads.sample.keywords.get("refill", True) != released


def test_sizes_reach_the_heads(cfg):
    cfg.MODEL.MNC.MASK_SIZE, cfg.MODEL.MNC.MASK_FC_DIM = 21, 12
    heads = build(cfg)
    assert heads.passes[0].mask_head.fc1.weight.shape == (12, 4 * 14 * 14)
    assert heads.passes[0].mask_head.layers(torch.zeros(1, 4, 14, 14)).shape == (1, 1, 21, 21)


def test_the_two_paths_have_weights_of_their_own(cfg):
    heads = build(cfg)
    assert heads.passes[0].classifier.mask_path_head is not heads.passes[0].classifier.box_path_head
    assert heads.passes[0].classifier.predictor.cls_score.in_features == 16


def test_unshared_heads_pool_masks_from_features_of_their_own(cfg):
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["categories.res4"]
    heads = UnsharedMNCROIHeads(cfg, {"categories.res4": ShapeSpec(channels=4, stride=16)})
    features = {"masks.res4": torch.ones(1, 4, 4, 4), "categories.res4": torch.zeros(1, 4, 4, 4)}
    mask_features, box_features = heads.pooler(features, torch.tensor([[0.0, 8.0, 8.0, 40.0, 40.0]]), 0)
    assert (mask_features > 0.9).all() and (box_features == 0).all()


def test_unshared_heads_refuse_features_that_are_shared(cfg):
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.IN_FEATURES is \['res4'\]"):
        UnsharedMNCROIHeads(cfg, {"res4": ShapeSpec(channels=4, stride=16)})


def test_passes_that_share_nothing_have_heads_of_their_own(cfg):
    cfg.MODEL.MNC.SHARE_PASSES = False
    cfg.MODEL.MNC.NUM_PASSES_TRAIN = 3
    heads = build(cfg)
    of_each = [list(heads_of_pass.parameters()) for heads_of_pass in heads.passes]
    assert len(of_each) == 3 and len({id(x) for of_pass in of_each for x in of_pass}) == sum(map(len, of_each))


def flatten(node, prefix=""):
    """The keys of a config and their values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_rows_of_the_ablation_differ_only_in_their_switches():
    folder = "PascalVOC-InstanceSegmentation/mnc_VGG_16_"
    rows = [
        dict(flatten(get_config(f"{folder}{name}.yaml")))
        for name in ("5stage", "3stage", "3stage_stepwise", "3stage_unshared")
    ]
    changes = [
        {key: (first[key], second[key]) for key in first if first[key] != second[key]}
        for first, second in zip(rows, rows[1:])
    ]
    assert changes == [
        {"MODEL.MNC.NUM_PASSES_TRAIN": (2, 1)},
        {"MODEL.MNC.GRADIENTS": ("released", "released, proposals=False, boxes=False, masks=none")},
        {
            "MODEL.BACKBONE.NAME": ("build_vgg_backbone", "build_unshared_backbone"),
            "MODEL.RPN.IN_FEATURES": (["conv5"], ["boxes.conv5"]),
            "MODEL.ROI_HEADS.IN_FEATURES": (["conv5"], ["categories.conv5"]),
            "MODEL.ROI_HEADS.NAME": ("PaperMNCROIHeads", "UnsharedMNCROIHeads"),
        },
    ]


@pytest.mark.parametrize("key", ["NUM_PASSES_TRAIN", "NUM_PASSES_TEST"])
def test_the_number_of_passes_does_not_change_the_parameters(cfg, key):
    expected = {name: x.shape for name, x in build(cfg).state_dict().items()}
    cfg.MODEL.MNC[key] = 5
    assert {name: x.shape for name, x in build(cfg).state_dict().items()} == expected


def test_every_key_is_used():
    package = Path(__file__).parents[1] / "mnc_d2"
    tables = ("config.py", "removed_keys.py", "upgrade.py")
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name not in tables)
    names = [key.name.rpartition(".")[2] for key in KEYS]
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
