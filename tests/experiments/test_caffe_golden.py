"""The released network against an independent re-creation of it, on a photograph and seeded weights of its size."""

import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.data import build_test_resize, exact_scale, scaled_size
from mnc_d2.experiments.caffe.boxes import clip_to_pixels
from mnc_d2.experiments.caffe.pasting import paste_masks
from mnc_d2.experiments.caffe.roi_heads import resize_masks
from mnc_d2.experiments.caffe.voting import vote_masks
from mnc_d2.experiments.convert_caffe import main as convert
from mnc_d2.model_zoo import get_config

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
CONFIG = "PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage_caffe.yaml"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not there")

# What float32 convolutions and matrix products of other orders may differ by; measured: 2.5e-5.
NOISE = 1e-4


def load(name):
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def golden():
    return load("forward_2008_000533.npz")


@pytest.fixture(scope="module")
def model():
    """The network with the seeded weights, written as the released file is and converted by the command."""
    pytest.importorskip("h5py", reason="h5py is an optional extra")
    spec = importlib.util.spec_from_file_location("make_weights", FOLDER / "make_weights.py")
    make_weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_weights)
    cfg = get_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    # Not pytest's folders, which stay: these files are 2 GB.
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "model.caffemodel.h5"), os.path.join(folder, "model.pth")
        make_weights.write(source)
        convert([source, target])
        rest = MNCCheckpointer(model).load(target)
    assert rest.keys() == {"description"}
    return model


def make_input(image):
    resized = build_test_resize(get_config(CONFIG)).get_transform(image).apply_image(image)
    height, width = image.shape[:2]
    return {"image": torch.from_numpy(resized.transpose(2, 0, 1).copy()), "height": height, "width": width}


@pytest.fixture(scope="module")
def images(model, golden):
    return model.preprocess_image([make_input(golden["image_bgr"])])


@pytest.fixture(scope="module")
def features(model, images):
    with torch.no_grad():
        return model.backbone(images.tensor)


@pytest.fixture(scope="module")
def passes(model, images, features, golden):
    """The cascade on the golden proposals."""
    with torch.no_grad():
        return model.roi_heads.run_passes(features, torch.from_numpy(golden["rois"]), images.image_sizes)


def largest_difference(ours, theirs):
    ours = ours.numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(np.float64) - theirs).max()


def statistics(data):
    """Mean and standard deviation of each channel of (3, H, W)."""
    data = data.numpy().astype(np.float64)
    return np.stack((data.mean(axis=(1, 2)), data.std(axis=(1, 2))))


@pytest.mark.slow
def test_preparation_of_the_image(images, golden):
    (size,) = images.image_sizes
    assert size.scale == golden["im_scale"] and size == (600, 840) and size.original == (357, 500)
    assert images.tensor.shape == tuple(golden["data_shape"])
    assert largest_difference(images.tensor[0, :, 100:108, 100:108], golden["data_slice"]) < 1e-3
    assert largest_difference(statistics(images.tensor[0]), np.stack((golden["data_mean"], golden["data_std"]))) < 1e-3


def test_scale_of_an_image_that_the_long_side_limits():
    """The photograph is not among the golden data, its size is."""
    cap = load("preproc_cap.npz")
    first, last = cap["crop_rows"].tolist()
    size = last - first, 500
    scale = exact_scale(size, 600, 1000)
    assert scale == cap["im_scale"]
    assert (*scaled_size(size, scale), 2.0) == tuple(cap["im_info"][0])


@pytest.mark.slow
def test_features(features, golden):
    conv5 = features["conv5"]
    assert conv5.shape == tuple(golden["conv5_3_shape"])
    assert largest_difference(conv5[0, :16, 10:18, 10:18], golden["conv5_3_slice"]) < NOISE
    assert largest_difference(conv5[0].mean(dim=(1, 2)), golden["conv5_3_channel_mean"]) < NOISE
    assert abs(conv5.double().mean() - golden["conv5_3_mean"]) < NOISE
    assert abs(conv5.double().std() - golden["conv5_3_std"]) < NOISE


@pytest.mark.slow
def test_rpn_maps(model, features, golden):
    with torch.no_grad():
        (logits,), (deltas,) = model.proposal_generator.rpn_head([features["conv5"]])
    assert largest_difference(logits.sigmoid(), golden["rpn_cls_prob"][:, 9:]) < NOISE
    assert largest_difference(deltas, golden["rpn_bbox_pred"]) < NOISE


@pytest.mark.slow
def test_proposals_of_the_golden_rpn_maps(model, images, features, golden):
    rpn = model.proposal_generator
    scores = torch.from_numpy(golden["rpn_cls_prob"][:, 9:]).permute(0, 2, 3, 1)  # (1, h, w, 9)
    deltas = torch.from_numpy(golden["rpn_bbox_pred"]).unflatten(1, (9, 4)).permute(0, 3, 4, 1, 2)  # (1, h, w, 9, 4)
    # Probabilities in place of logits: only their order matters, and this one has no rounding of ours in it.
    (proposals,) = rpn.predict_proposals(
        rpn.anchor_generator([features["conv5"]]), [scores.flatten(1)], [deltas.flatten(1, 3)], images.image_sizes
    )
    assert np.array_equal(proposals.objectness_logits, golden["roi_scores"])
    assert largest_difference(proposals.proposal_boxes.tensor, golden["rois"][:, 1:]) < 1e-3


@pytest.mark.slow
def test_proposals_of_the_image(model, images, features, golden):
    with torch.no_grad():
        ((proposals,), _) = model.proposal_generator(images, features)
    ours, theirs = proposals.proposal_boxes.tensor.numpy(), golden["rois"][:, 1:]
    distances = np.abs(ours[:, None] - theirs).max(axis=2)
    # Scores differ by as little as 4e-7: noise may change the order, and with it what NMS suppresses.
    assert len(ours) == 300
    assert (distances.min(axis=0) < 0.02).mean() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("index, suffix", [(0, ""), (1, "_ext")])
def test_features_of_boxes(model, features, golden, index, suffix):
    rois = torch.from_numpy(golden[f"rois{suffix}"][golden["sub_rois"]])
    with torch.no_grad():
        pooled, _ = model.roi_heads.pooler(features, rois, index)
    assert largest_difference(pooled[:, :32], golden[f"warp_sub{suffix}"]) < NOISE


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "_ext"])
def test_resizing_of_masks(golden, suffix):
    masks = torch.from_numpy(golden[f"mask_proposal{suffix}"][:64])
    assert largest_difference(resize_masks(masks, 14), golden[f"mask_resize_first64{suffix}"]) < 1e-6


def check_pass(output, golden, suffix):
    """Compare with the golden arrays, where the background comes first."""
    cls_logits, seg_cls_logits, deltas = output.predictions
    assert largest_difference(output.masks, golden[f"mask_proposal{suffix}"]) < NOISE
    assert largest_difference(cls_logits.softmax(dim=1).roll(1, dims=1), golden[f"cls_prob{suffix}"]) < NOISE
    assert largest_difference(seg_cls_logits.softmax(dim=1).roll(1, dims=1), golden[f"seg_cls_prob{suffix}"]) < NOISE
    assert largest_difference(deltas.roll(4, dims=1), golden[f"bbox_pred{suffix}"]) < NOISE


@pytest.mark.slow
def test_first_pass_on_the_golden_proposals(passes, golden):
    check_pass(passes[0], golden, "")


@pytest.mark.slow
def test_boxes_of_the_second_pass(passes, golden):
    assert largest_difference(passes[1].boxes, golden["rois_ext"][:, 1:]) < 0.02


@pytest.mark.slow
def test_second_pass_on_the_golden_boxes(model, features, golden):
    joints, heads = [], model.roi_heads
    hook = heads.passes[0].classifier.predictor.register_forward_pre_hook(lambda _, inputs: joints.append(inputs[0]))
    try:
        with torch.no_grad():
            check_pass(heads.run_pass(1, features, torch.from_numpy(golden["rois_ext"])), golden, "_ext")
    finally:
        hook.remove()
    # The mask path comes first.
    joint = torch.cat((joints[0][:, :32], joints[0][:, 4096 : 4096 + 32]), dim=1)
    # Values up to 5, in float32, from sums of 25088 products.
    assert largest_difference(joint, golden["join_sub_ext"]) < 2 * NOISE


@pytest.mark.slow
def test_detections_of_the_image(model, golden):
    """From the image to masks, against mask voting of the golden candidates of both passes."""
    image = golden["image_bgr"]
    size = image.shape[:2]
    with torch.no_grad():
        result = model([make_input(image)])[0]["instances"]

    def both(name):
        return torch.from_numpy(np.concatenate((golden[name], golden[f"{name}_ext"])))

    boxes = clip_to_pixels(both("rois")[:, 1:] / float(golden["im_scale"]), size)
    expected = vote_masks(boxes, both("seg_cls_prob")[:, 1:], both("mask_proposal"), size)
    expected_boxes = expected.pred_boxes.tensor + torch.tensor([0, 0, 1, 1])
    expected_masks = paste_masks(expected.pred_masks[:, 0], expected_boxes, size, 0.4)
    assert len(result) == len(expected) == 100
    assert result.image_size == size

    same_class = result.pred_classes[:, None] == expected.pred_classes
    same_score = (result.scores[:, None] - expected.scores).abs() < NOISE
    # A pixel whose averaged probability is within the noise of the threshold may change sides.
    same_box = (result.pred_boxes.tensor[:, None] - expected_boxes).abs().amax(dim=2) <= 1
    same = same_class & same_score & same_box
    assert same.any(dim=0).all() and same.any(dim=1).all()
    for index, matches in enumerate(same):
        differences = (result.pred_masks[index] != expected_masks[matches]).sum(dim=(1, 2))
        assert differences.min() <= 0.005 * result.pred_masks[index].sum()


@pytest.mark.parametrize("file, case", [("voting_b.npz", ""), *(("voting_c.npz", f"c{i}_") for i in (1, 2, 3))])
def test_masks_in_the_image_are_those_of_the_authors_evaluation(file, case):
    voting = load(file)
    size = int(voting[f"{case}H"]), int(voting[f"{case}W"])
    boxes = torch.from_numpy(voting[f"{case}gpu_box"][:, :4]) + torch.tensor([0, 0, 1, 1])
    pasted = paste_masks(torch.from_numpy(voting[f"{case}gpu_mask"]), boxes, size, 0.4)
    expected = np.unpackbits(voting[f"{case}gpu_full_eval"], axis=2)[:, :, : size[1]]
    assert np.array_equal(pasted.numpy(), expected.astype(bool))
