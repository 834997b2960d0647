"""What is wrong with a config is said with the name of the key, before anything is started."""

import pickle

import pytest
from robustness.common import Code

from mnc_d2.config import check_config


@pytest.fixture
def config(small_config):
    cfg = small_config()
    check_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.CHECKPOINT_PERIOD", 0, "positive"),
        ("SOLVER.MAX_ITER", -5, "positive"),
        ("SOLVER.BASE_LR", float("nan"), "finite"),
        ("SOLVER.WEIGHT_DECAY", float("inf"), "finite"),
        ("SOLVER.WARMUP_ITERS", -1, "0 or more"),
        ("SOLVER.MAX_CHECKPOINTS", -1, "0 or more"),
        ("DATALOADER.NUM_WORKERS", -2, "0 or more"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "positive"),
        ("MODEL.PIXEL_MEAN", [1.0, float("nan"), 1.0], "finite"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0], "has 2 elements, so MODEL.PIXEL_STD must have 2, not 3"),
        ("MODEL.MNC.BACKGROUND_BANDS", [[0.0, 0.5]], "rows of"),
        ("MODEL.MNC.BACKGROUND_BANDS", [[0.0, 0.5, 1.5]], "between 0 and 1"),
        ("MODEL.MNC.GRADIENTS", "relesed", "Did you mean 'released'"),
        ("MODEL.MNC.OUTPUTS", ["passes"], '"instances"'),
        ("MODEL.MNC.MASK_THRESHOLD", 1.5, "between 0 and 1"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5], "MODEL.ROI_HEADS.IOU_LABELS must have 3, not 2"),
        ("SOLVER.STEPS", (20, 10), "ascending"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "one of WarmupMultiStepLR"),
        ("DATALOADER.SAMPLER_TRAIN", "None", "one of TrainingSampler"),
        ("INPUT.MIN_SIZE_TRAIN", (), "empty"),
        ("SEED", 2**40, "less than"),
    ],
)
def test_a_wrong_value_is_named(config, key, value, message):
    config.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message) as error:
        check_config(config)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "Mask2Former", "No object named 'Mask2Former'"),
        ("MODEL.ROI_HEADS.NAME", "Heads", "No object named 'Heads'"),
        ("MODEL.BACKBONE.NAME", "build_backbone", "No object named 'build_backbone'"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p7"], "p7"),
        ("MODEL.FPN.OUT_CHANNELS", 33, "divisible"),
    ],
)
def test_a_model_that_cannot_be_is_an_error(config, key, value, message):
    config.merge_from_list([key, value])
    with pytest.raises(ValueError, match=f"The config has no model: .*{message}"):
        check_config(config)


def test_proposals_that_would_run_code_are_refused(config, tmp_path):
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps({"boxes": Code(tmp_path / "made")}))
    config.MODEL.LOAD_PROPOSALS = True
    config.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "proposals.pkl"),)
    with pytest.raises(ValueError, match="proposals.pkl cannot be read: it names pathlib.Path.touch"):
        check_config(config)
    assert not (tmp_path / "made").exists()
