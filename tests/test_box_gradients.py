"""The benchmark of where gradients move boxes."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from modeling.inputs import make_inputs
from programs import load_script

GT = torch.tensor([[10.0, 20.0, 50.0, 80.0]])


@pytest.fixture(scope="module")
def box_gradients():
    return load_script(Path(__file__).parent / "benchmarks" / "box_gradients.py")


@pytest.mark.parametrize("sign", [1, -1])
def test_steps_towards_and_away_from_the_object(box_gradients, sign):
    boxes = GT + torch.tensor([[4.0, 3.0, 5.0, -6.0], [-5.0, 8.0, 3.0, 2.0]])
    gradient = sign * (boxes - GT)  # the negative gradient leads to the object
    for *rises, cosine, iou in box_gradients.measure(boxes, gradient, GT.expand(2, 4)).tolist():
        assert rises == [sign > 0] * 2 and cosine == pytest.approx(sign) and 0.5 < iou < 1


def test_ground_truth_background_and_boxes_without_gradient_are_left_out(box_gradients):
    boxes = torch.cat((GT, GT + 40, GT + 2, GT + 2))
    gradient = torch.tensor([[1.0], [1.0], [0.0], [1.0]]).expand(4, 4)
    assert len(box_gradients.measure(boxes, gradient, GT.expand(4, 4))) == 1


@pytest.mark.parametrize("append_gt", [False, True])
def test_own_regression_alone_moves_boxes_to_their_objects(box_gradients, small_config, append_gt):
    # Without gradients between stages what moves a box is its own regression loss.
    overrides = {"MODEL.MNC.GRADIENTS": "stepwise"}
    overrides |= {"MODEL.ROI_HEADS.NAME": "PaperMNCROIHeads" if append_gt else "MNCROIHeads"}
    # So many proposals that some are foreground.
    overrides |= {"MODEL.RPN.NMS_THRESH": 0.95, "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 1000}
    overrides |= {"MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64}
    torch.manual_seed(0)
    model = build_model(small_config(**overrides))
    model.vis_period = 0
    results = box_gradients.measure_batch(model, make_inputs())
    assert set(results) == {(1, "all"), (2, "all")}
    for values in results.values():
        rises, rises_little, cosine, _ = values.mean(dim=0).tolist()
        assert len(values) > 5 and rises == rises_little == 1 and cosine > 0.5


def test_every_loss_of_the_pass_is_measured_through_the_coordinates(box_gradients, small_config):
    torch.manual_seed(0)
    model = build_model(small_config())
    model.vis_period = 0
    results = box_gradients.measure_batch(model, make_inputs())
    losses = {"all", "all later", "loss_cls", "loss_seg_cls", "loss_box_reg"}
    assert set(results) == {(number, name) for number in (1, 2) for name in losses}
