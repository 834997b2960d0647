"""A model in one file, as a training writes it."""

from dataclasses import asdict

import pytest
import torch
from detectron2.modeling import build_model

from mnc_d2.checkpoint import ModelDescription


@pytest.fixture(scope="session")
def model_file(small_config, tmp_path_factory):
    """An untrained model of discs and squares, ids 1 and 2, which finds something everywhere."""
    torch.manual_seed(0)
    cfg = small_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    description = ModelDescription(cfg.dump(), ["disc", "square"], [], [1, 2], "drawn", "0", {"segm/AP": 12.5})
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    torch.save({"model": build_model(cfg).state_dict(), "description": asdict(description)}, path)
    return path
