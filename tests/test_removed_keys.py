"""Configs of before: what means the same loads; the rest is refused by a sentence that says what to write."""

import logging
from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg

from mnc_d2 import add_mnc_config
from mnc_d2.model_zoo import load_config, merge_overrides, parse_config
from mnc_d2.model_zoo.upgrade import upgrade
from mnc_d2.removed_keys import REPLACEMENTS

DUMPS = yaml.safe_load((Path(__file__).parent / "golden_removed_keys.yaml").read_text())
CASCADE = {"META_ARCHITECTURE": "MultitaskNetworkCascade", "ROI_HEADS": {"NAME": "MNCROIHeads"}}


@pytest.fixture
def warnings(caplog):
    """A function that returns the warnings so far."""
    return lambda: [x.message for x in caplog.records if x.levelno >= logging.WARNING]


def names_and_new_keys(cfg):
    """What of a config removed keys decide on."""
    model, mnc = cfg.MODEL, cfg.MODEL.MNC
    names = model.META_ARCHITECTURE, model.BACKBONE.NAME, model.ROI_HEADS.NAME, cfg.INPUT.DATASET_MAPPER_NAME
    return *names, mnc.GRADIENTS, mnc.BACKGROUND_BANDS, cfg.TEST.EVALUATORS


@pytest.mark.parametrize("name", DUMPS)
def test_the_dump_of_a_config_of_before_is_the_config_of_now(name, warnings):
    expected = load_config("" if name == "default" else name)
    assert names_and_new_keys(parse_config(yaml.safe_dump(DUMPS[name]), name)) == names_and_new_keys(expected)
    assert warnings() == []


def test_a_config_of_now_stays_as_it_is():
    config = yaml.safe_load(load_config("PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage.yaml").dump())
    assert upgrade(config) == config


def test_a_file_inherits_and_is_upgraded(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {MNC: {BACKGROUND_IOU_BANDS: [[0.0, 0.5]], GRADIENTS: released}}")
    text = "_BASE_: base.yaml\nMODEL: {MNC: {BACKGROUND_FRACTIONS: '(1.0,)', BOX_GRADIENT: False}}"
    (tmp_path / "mine.yaml").write_text(text)
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.MODEL.MNC.BACKGROUND_BANDS == [[0.0, 0.5, 1.0]]
    assert cfg.MODEL.MNC.GRADIENTS == "released, boxes=False"


def test_evaluators_of_both_keys_are_one_list():
    assert upgrade({"TEST": {"MORE_EVALUATORS": ["Count"]}}) == {"TEST": {"EVALUATORS": ["auto", "Count"]}}
    assert upgrade({"TEST": {"EVALUATOR": "sds"}}) == {"TEST": {"EVALUATORS": ["sds"]}}


def test_a_mixture_of_the_papers_rules_loads_with_a_warning(warnings):
    mnc = {"APPEND_GT_TO_LATER_PASSES": True, "REFILL_BACKGROUND": True, "NEXT_BOX_BACKGROUND": False}
    assert upgrade({"MODEL": {**CASCADE, "MNC": mnc}})["MODEL"]["ROI_HEADS"] == {"NAME": "MNCROIHeads"}
    (sentence,) = warnings()
    assert sentence == (
        "MNCROIHeads now does what APPEND_GT_TO_LATER_PASSES False did, which this config had set otherwise."
    )


def test_a_model_that_is_no_cascade_loads_without_a_warning(warnings):
    upgrade({"MODEL": {"META_ARCHITECTURE": "GeneralizedRCNN", "MNC": {"APPEND_GT_TO_LATER_PASSES": True}}})
    assert warnings() == []


def with_model(**sections):
    return {"MODEL": {**CASCADE, **sections}}


CAFFE = {"ROI_HEADS": {"NAME": "CaffeMNCROIHeads"}}
TIMM_PYRAMID = {"BACKBONE": {"NAME": "build_timm_fpn_backbone"}, "FPN": {"IN_FEATURES": ["res2", "res5"]}}
UNSHARED = {"BACKBONE": {"NAME": "build_unshared_backbone"}}
VGG = {"BACKBONE": {"NAME": "build_vgg_backbone"}}


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("MODEL.MNC.MASK_TARGET_THRESHOLD", with_model(MNC={"MASK_TARGET_THRESHOLD": 0.4})),
        ("MODEL.MNC.MASK_IOU_THRESHOLD", with_model(MNC={"MASK_IOU_THRESHOLD": 0.6})),
        ("MODEL.MNC.VOTING_IOU_THRESHOLD", with_model(MNC={"VOTING_IOU_THRESHOLD": 0.7})),
        ("MODEL.MNC.ROI_WARP_SAMPLING", with_model(MNC={"ROI_WARP_SAMPLING": "caffe"})),
        ("MODEL.MNC.ROI_WARP_SAMPLING", with_model(**CAFFE, MNC={"ROI_WARP_SAMPLING": "center"})),
        ("MODEL.MNC.MASK_IN_FEATURES", with_model(MNC={"MASK_IN_FEATURES": ["res3"]})),
        ("MODEL.MNC.UNSHARED_BACKBONE", with_model(**UNSHARED, MNC={"UNSHARED_BACKBONE": "build_resnet_backbone"})),
        ("MODEL.MNC.BACKGROUND_FRACTIONS", with_model(MNC={"BACKGROUND_FRACTIONS": [1.0]})),
        ("MODEL.VGG.OUT_FEATURES", with_model(**VGG, VGG={"OUT_FEATURES": ["conv4"]})),
        ("MODEL.VGG.CEIL_MODE", with_model(**UNSHARED, VGG={"CEIL_MODE": True})),
        ("MODEL.TIMM.OUT_FEATURES", with_model(**TIMM_PYRAMID, TIMM={"OUT_FEATURES": ["res2", "res4"]})),
    ],
)
def test_what_cannot_be_carried_over_is_refused_with_the_replacement(key, config):
    with pytest.raises(ValueError, match=f"{key} is no longer a config key. Use {REPLACEMENTS[key].partition('(')[0]}"):
        parse_config(yaml.safe_dump(config), "a file")


@pytest.mark.parametrize("key", REPLACEMENTS)
def test_a_removed_key_on_the_command_line_is_refused_with_the_replacement(key):
    with pytest.raises(ValueError) as error:
        merge_overrides(load_config(""), [key, "1"])
    sentence = f"{key} is no longer a config key. Use {REPLACEMENTS[key]} instead."
    assert str(error.value) == f"KEY VALUE overrides: {sentence}"


@pytest.mark.parametrize("key", REPLACEMENTS)
def test_detectron2_alone_names_the_replacement(key):
    cfg = get_cfg()
    add_mnc_config(cfg)
    with pytest.raises(KeyError, match=f"{key} was renamed to"):
        cfg.merge_from_list([key, 1])
    section, _, name = key.rpartition(".")
    config = {name: 1}
    for part in reversed(section.split(".")):
        config = {part: config}
    with pytest.raises(KeyError, match="was renamed to"):
        cfg.merge_from_other_cfg(type(cfg)(config))


def test_keys_are_registered_once():
    cfg = get_cfg()
    for _ in range(2):
        add_mnc_config(cfg)
    assert cfg.key_is_renamed("MODEL.MNC.BOX_GRADIENT")
