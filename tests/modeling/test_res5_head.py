"""conv5 as the head of both paths of the classifier."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import Res5ROIHeads

from mnc_d2 import add_mnc_config
from mnc_d2.modeling import MNCROIHeads, Res5BoxHead


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.ROI_BOX_HEAD.NAME = "Res5BoxHead"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRegressionHead"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
    return cfg


def test_it_is_detectron2s_res5_and_the_average(cfg):
    torch.manual_seed(0)
    head = Res5BoxHead(cfg, ShapeSpec(channels=64, height=14, width=14))
    expected, channels = Res5ROIHeads._build_res5_block(cfg)
    expected.load_state_dict(head.res5.state_dict())
    features = torch.rand(3, 64, 14, 14)
    assert head.output_shape.channels == channels == 128
    torch.testing.assert_close(head(features), expected(features).mean(dim=(2, 3)))
    assert expected(features).shape[2:] == (7, 7)


def test_both_paths_have_one_and_the_classifier_joins_them(cfg):
    heads = MNCROIHeads(cfg, {"res4": ShapeSpec(channels=64, stride=16)})
    classifier = heads.passes[0].classifier
    paths = classifier.mask_path_head, classifier.box_path_head
    assert all(isinstance(path, Res5BoxHead) for path in paths) and paths[0] is not paths[1]
    assert classifier.predictor.cls_score.in_features == 2 * 128
    pooled, masks = torch.rand(3, 64, 14, 14), torch.rand(3, 28, 28)
    assert classifier(pooled, masks).cls_logits.shape == (3, 3)


def test_features_of_another_stage_are_an_error_that_names_the_key(cfg):
    with pytest.raises(ValueError, match="Res5BoxHead takes the 64 channels of res4.*IN_FEATURES.*have 32"):
        MNCROIHeads(cfg, {"res4": ShapeSpec(channels=32, stride=16)})
