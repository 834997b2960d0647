"""The predictor beside Detectron2's; tests/checkpoint/test_description.py has how it is made of one file."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from mnc_d2.predictor import MNCPredictor


@pytest.fixture
def cfg(small_config, tmp_path):
    """The config of a small model that has not been trained, with its weights."""
    torch.manual_seed(0)
    cfg = small_config()
    cfg.DATASETS.TEST = ()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


IMAGE = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)


def test_the_predictor_gives_what_detectron2s_does(cfg):
    ours, theirs = (predictor(cfg)(IMAGE)["instances"] for predictor in (MNCPredictor, DefaultPredictor))
    assert len(ours) > 0
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
    assert (ours.pred_masks != theirs.pred_masks).float().mean() < 1e-3


def test_the_predictor_resizes_as_the_config_says(cfg):
    cfg.INPUT.EXACT_SCALE_TEST = True
    predictor = MNCPredictor(cfg)
    given = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0]["image"]))
    predictor(IMAGE)
    expected = predictor.aug.get_transform(IMAGE).apply_image(IMAGE)
    assert cfg.INPUT.FORMAT == "RGB" and given[0].shape == (3, 64, 78)
    assert torch.equal(given[0], torch.from_numpy(expected[:, :, ::-1].transpose(2, 0, 1).copy()))
    assert not torch.equal(given[0], given[0].round())


def test_an_image_format_that_predictors_do_not_know_is_named(cfg):
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(ValueError, match="INPUT.FORMAT must be .*'YUV-BT.601'"):
        MNCPredictor(cfg)
