"""add_mnc_config: every key with its default, and the switches that reach the model."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from mnc_d2 import add_mnc_config
from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import MNCROIHeads

# Config keys that MNCROIHeads takes as they are, its argument of each, and a value that is not the default.
KEYS = {
    "NUM_PASSES_TRAIN": ("num_passes_train", 3),
    "NUM_PASSES_TEST": ("num_passes_test", 1),
    "APPEND_GT_TO_LATER_PASSES": ("append_gt_to_later_passes", True),
    "NEXT_BOX_BACKGROUND": ("next_box_background", False),
    "NEXT_PASS_MIN_SCORE": ("next_pass_min_score", 0.1),
}

# Those that reach an argument of its parts: how the part is found, its argument, and a value that is not the default.
KEYS_OF_PARTS = {
    "REFILL_BACKGROUND": (lambda heads: heads.sample.keywords, "refill", False),
    "BACKGROUND_IOU_BANDS": (lambda heads: heads.sample.keywords, "bands", [[0.0, 0.5]]),
    "BACKGROUND_FRACTIONS": (lambda heads: heads.sample.keywords, "band_fractions", [1.0]),
    "DETECTION_BOX": (lambda heads: heads.vote.keywords, "detection_box", "tight"),
    "VOTING_IOU_THRESHOLD": (lambda heads: heads.vote.keywords, "voting_iou_threshold", 0.7),
    "MASK_THRESHOLD": (lambda heads: heads.vote.keywords, "mask_threshold", 0.45),
    "MASK_TARGET_THRESHOLD": (lambda heads: vars(heads.mask_supervision), "target_threshold", 0.4),
    "MASK_IOU_THRESHOLD": (lambda heads: vars(heads.mask_supervision), "iou_threshold", 0.6),
    "MASK_LOSS_WEIGHT": (lambda heads: vars(heads.mask_supervision), "loss_weight", 2.0),
}

# Those of the causal gradients.
GRADIENT_KEYS = {
    "PROPOSAL_GRADIENT": False,
    "BOX_GRADIENT": False,
    "MASK_GRADIENT": "all",
    "COORDINATE_GRADIENT": "none",
    "MASK_COORDINATE_GRADIENT": True,
    "MOVING_TARGETS": False,
    "SCALE_FEATURE_GRADIENT": False,
    "DELTA_GRADIENT_CLIP": 0.25,
    "BORDER_GRADIENT": True,
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
    assert (mnc.MASK_THRESHOLD, mnc.VOTING_IOU_THRESHOLD, mnc.MASK_LOSS_WEIGHT) == (0.4, 0.5, 1.0)
    assert mnc.DELTA_GRADIENT_CLIP == 1 / 512


@pytest.mark.parametrize("cuda", [True, False])
def test_the_device_is_the_cpu_where_there_is_no_gpu(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    cfg = get_cfg()
    add_mnc_config(cfg)
    assert cfg.MODEL.DEVICE == ("cuda" if cuda else "cpu")


@pytest.mark.parametrize(("key", "argument", "value"), [(key, *x) for key, x in KEYS.items()], ids=KEYS.keys())
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


def test_an_unknown_detection_box_is_an_error_that_names_the_key(cfg):
    cfg.MODEL.MNC.DETECTION_BOX = "loose"
    with pytest.raises(ValueError, match="MODEL.MNC.DETECTION_BOX must be.*loose"):
        build(cfg)


@pytest.mark.parametrize(("key", "value"), GRADIENT_KEYS.items(), ids=GRADIENT_KEYS.keys())
def test_every_switch_of_the_causal_gradients_reaches_the_cascade(cfg, key, value):
    assert getattr(build(cfg).gradients, key.lower()) == cfg.MODEL.MNC[key] != value
    cfg.MODEL.MNC[key] = value
    assert getattr(build(cfg).gradients, key.lower()) == value


def test_sizes_reach_the_heads(cfg):
    cfg.MODEL.MNC.MASK_SIZE, cfg.MODEL.MNC.MASK_FC_DIM = 21, 12
    cfg.MODEL.MNC.ROI_WARP_SAMPLING = "caffe"
    heads = build(cfg)
    assert heads.pooler.pooler.sampling == "caffe"
    assert heads.passes[0].mask_head.fc1.weight.shape == (12, 4 * 14 * 14)
    assert heads.passes[0].mask_head(torch.zeros(1, 4, 14, 14)).shape == (1, 21, 21)


def test_the_two_paths_have_weights_of_their_own(cfg):
    heads = build(cfg)
    assert heads.passes[0].classifier.mask_path_head is not heads.passes[0].classifier.box_path_head
    assert heads.passes[0].classifier.predictor.cls_score.in_features == 16


@pytest.mark.parametrize("shape", [ShapeSpec(channels=4, stride=8), ShapeSpec(channels=8, stride=16)], ids=str)
def test_masks_from_features_of_another_shape_are_an_error_that_names_the_keys(cfg, shape):
    cfg.MODEL.MNC.MASK_IN_FEATURES = ["other"]
    with pytest.raises(ValueError, match="MASK_IN_FEATURES.*other.*must have the strides and channels of.*res4"):
        MNCROIHeads(cfg, {"res4": ShapeSpec(channels=4, stride=16), "other": shape})


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
        {
            "MODEL.MNC.PROPOSAL_GRADIENT": (True, False),
            "MODEL.MNC.BOX_GRADIENT": (True, False),
            "MODEL.MNC.MASK_GRADIENT": ("foreground", "none"),
        },
        {
            "MODEL.BACKBONE.NAME": ("build_vgg_backbone", "build_unshared_backbone"),
            "MODEL.RPN.IN_FEATURES": (["conv5"], ["boxes.conv5"]),
            "MODEL.ROI_HEADS.IN_FEATURES": (["conv5"], ["categories.conv5"]),
            "MODEL.MNC.UNSHARED_BACKBONE": ("build_resnet_backbone", "build_vgg_backbone"),
            "MODEL.MNC.MASK_IN_FEATURES": ([], ["masks.conv5"]),
        },
    ]


@pytest.mark.parametrize("key", ["NUM_PASSES_TRAIN", "NUM_PASSES_TEST"])
def test_the_number_of_passes_does_not_change_the_parameters(cfg, key):
    expected = {name: x.shape for name, x in build(cfg).state_dict().items()}
    cfg.MODEL.MNC[key] = 5
    assert {name: x.shape for name, x in build(cfg).state_dict().items()} == expected


def test_every_key_is_used(cfg):
    package = Path(__file__).parents[1] / "mnc_d2"
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "config.py")
    assert [key for key in cfg.MODEL.MNC if not re.search(rf"\b{key}\b", code)] == []
