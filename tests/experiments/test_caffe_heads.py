"""The cascade and mask voting as released, each against a slow, obvious computation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from modeling.caffe_reference import random_boxes, slow_decode, slow_iou

from mnc_d2.experiments.caffe import CaffeMNCROIHeads, InclusiveBoxTransform
from mnc_d2.experiments.caffe.boxes import NetworkInputSize
from mnc_d2.experiments.caffe.roi_heads import CaffeCascadePooler, resize_masks
from mnc_d2.experiments.caffe.voting import vote_masks
from mnc_d2.layers import roi_warp
from mnc_d2.modeling import RoIWarpPooler
from mnc_d2.modeling.roi_heads.output_layers import Predictions
from mnc_d2.modeling.roi_heads.outputs import PassOutput


@pytest.fixture
def make_heads(make_roi_heads):
    def make():
        warp = RoIWarpPooler(4, [1 / 4], sampling_ratio=2, sampling="caffe")
        heads = make_roi_heads(
            roi_heads=CaffeMNCROIHeads,
            pooler=CaffeCascadePooler(warp, ["map"]),
            vote=vote_masks,
            next_box_background=True,
        ).eval()
        heads.passes[0].classifier.predictor.box2box_transform = InclusiveBoxTransform((10.0, 10.0, 5.0, 5.0))
        return heads

    return make


SIZE = NetworkInputSize((64, 48), 1.3, (49, 37))


def make_output(boxes, num_classes=2, seed=0):
    """What a pass might make of boxes of one image."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(len(boxes), *shape, generator=generator)

    cls_logits, seg_cls_logits = 2 * random(num_classes + 1), 2 * random(num_classes + 1)
    masks, deltas = random(4, 4).sigmoid(), 2 * random(4 * num_classes + 4)
    rois = torch.cat((torch.zeros(len(boxes), 1), boxes), dim=1)
    return PassOutput(0, rois, masks, Predictions(cls_logits, seg_cls_logits, deltas))


def test_next_boxes_are_those_of_the_best_class_of_all_with_the_background(make_heads, make_map):
    heads, output = make_heads(), make_output(random_boxes(30, limit=40.0))
    heads.passes[0].classifier.predictor.register_forward_hook(lambda *_: output.predictions)
    with torch.no_grad():
        _, after = heads.run_passes(make_map(), output.rois, [SIZE])
    background = 0
    for i, box in enumerate(output.boxes.tolist()):
        logits = output.predictions.seg_cls_logits[i].tolist()
        cls = logits.index(max(logits))
        background += cls == 2
        deltas = output.predictions.deltas[i, 4 * cls : 4 * cls + 4].tolist()
        decoded = slow_decode(box, [d / w for d, w in zip(deltas, (10, 10, 5, 5))])
        expected = [min(max(v, 0), limit - 1) for v, limit in zip(decoded, (48, 64, 48, 64))]
        assert after.boxes[i].tolist() == pytest.approx(expected, abs=1e-4)
    assert 0 < background < 30
    assert (after.boxes[:, 2] == 47).any()


@pytest.mark.parametrize("length, size", [(21, 14), (28, 14), (14, 14), (5, 7)])
def test_masks_are_sampled_from_the_top_left_corner(length, size):
    masks = torch.rand(3, length, length, generator=torch.Generator().manual_seed(0))
    result = resize_masks(masks, size)
    assert result.shape == (3, size, size)
    for i in range(size):
        for j in range(size):
            y, x = min(i * length / size, length - 1), min(j * length / size, length - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, length - 1), min(left + 1, length - 1)
            upper = masks[:, top, left] * (1 - x + left) + masks[:, top, right] * (x - left)
            lower = masks[:, bottom, left] * (1 - x + left) + masks[:, bottom, right] * (x - left)
            expected = upper * (1 - y + top) + lower * (y - top)
            torch.testing.assert_close(result[:, i, j], expected, rtol=0, atol=1e-6)


def test_only_the_first_pass_takes_the_maximum_of_samples(make_heads, make_map, random_boxes):
    heads = make_heads()
    features, boxes = make_map(), random_boxes(5)
    rois = torch.cat((torch.zeros(5, 1), boxes), dim=1)
    for index in range(3):
        pooled, same = heads.pooler(features, rois, index)
        assert pooled is same
        assert torch.equal(pooled, roi_warp(features["map"], rois, 4, 1 / 4, "caffe", max_pool=index == 0))


def original_boxes(output):
    """Boxes of a pass in the original image."""
    rows = [[v / 1.3 for v in box] for box in output.boxes.tolist()]
    return torch.tensor([[min(max(v, 0), limit - 1) for v, limit in zip(row, (37, 49) * 2)] for row in rows])


def test_voting_is_in_the_original_image(make_heads):
    outputs = [make_output(random_boxes(12, limit=50.0, seed=i), seed=i) for i in range(2)]
    (result,) = make_heads().reduce(outputs, [SIZE], ["instances"])["instances"]
    expected = vote_masks(
        torch.cat([original_boxes(x) for x in outputs]),
        torch.cat([x.predictions.seg_cls_logits.softmax(dim=1)[:, :2] for x in outputs]),
        torch.cat([x.masks for x in outputs]),
        (49, 37),
        nms_threshold=0.5,
    )
    assert result.image_size == (49, 37) and len(result) > 5
    assert torch.equal(result.pred_classes, expected.pred_classes)
    torch.testing.assert_close(result.scores, expected.scores)
    # Detectron2 takes x2 as where the last pixel ends, not as which it is.
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor + torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(result.pred_masks, expected.pred_masks, rtol=0, atol=1e-5)


def test_boxes_of_full_masks_hold_their_last_pixels(make_heads):
    output = make_output(torch.tensor([[13.0, 26.0, 26.0, 52.0]]))
    output.masks = torch.ones(1, 4, 4)
    (result,) = make_heads().reduce([output], [SIZE], ["instances"])["instances"]
    # Pixels 10 to 20 and 20 to 40 of the original image.
    assert result.pred_boxes.tensor.tolist() == [[10.0, 20.0, 21.0, 41.0]] * len(result)


def test_box_level_results_are_regressed_in_the_original_image(make_heads):
    output = make_output(random_boxes(8, limit=50.0))
    (result,) = make_heads().reduce([output], [SIZE], ["box_instances"])["box_instances"]
    probabilities = output.predictions.cls_logits.softmax(dim=1)
    candidates = []
    for i, box in enumerate(original_boxes(output).tolist()):
        for cls in range(2):
            deltas = output.predictions.deltas[i, 4 * cls : 4 * cls + 4].tolist()
            decoded = slow_decode(box, [d / w for d, w in zip(deltas, (10, 10, 5, 5))])
            clipped = [min(max(v, 0), limit - 1) for v, limit in zip(decoded, (37, 49) * 2)]
            candidates.append((probabilities[i, cls].item(), cls, clipped))
    kept = []
    for score, cls, box in sorted(candidates, reverse=True):
        if all(cls != other or slow_iou(box, b) <= 0.5 for _, other, b in kept):
            kept.append((score, cls, box))
    assert result.image_size == (49, 37)
    assert result.pred_classes.tolist() == [cls for _, cls, _ in kept]
    expected = torch.tensor([box for *_, box in kept]) + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(result.pred_boxes.tensor, expected, rtol=0, atol=1e-4)


# ---- voting


GOLDEN = np.load(Path(__file__).with_name("golden_voting.npz"))


@pytest.mark.parametrize("case", ["b", "c1", "c2", "c3"])
def test_voting_is_what_the_released_code_computes(case):
    """Results of an independent re-creation of the released code, its GPU flavour: clusters, borders, tiny boxes."""
    expected = {name: GOLDEN[f"{case}_{name}"] for name in ("cls", "box", "mask", "n_voters", "source", "margin")}
    boxes, scores, masks = (torch.from_numpy(GOLDEN[f"{case}_{name}"]) for name in ("boxes", "scores", "masks"))
    size = int(GOLDEN[f"{case}_H"]), int(GOLDEN[f"{case}_W"])
    result = vote_masks(boxes, scores[:, 1:], masks, size)
    # Theirs are by class, best first; class 0 is the background.
    order = np.lexsort((-result.scores.numpy(), result.pred_classes.numpy()))
    result = result[torch.from_numpy(order)]
    assert result.pred_classes.add(1).tolist() == expected["cls"].tolist()
    assert result.candidates.tolist() == expected["source"].tolist()
    assert result.num_voters.tolist() == expected["n_voters"].tolist()
    np.testing.assert_allclose(result.scores.numpy(), expected["box"][:, 4], rtol=0, atol=1e-6)
    # Where the threshold is met by less than rounding, one pixel more or less belongs to the mask.
    safe = expected["margin"] >= 1e-4
    assert (~safe).sum() <= 3
    assert np.array_equal(result.pred_boxes.tensor.numpy()[safe], expected["box"][safe, :4])
    np.testing.assert_allclose(result.pred_masks[:, 0].numpy()[safe], expected["mask"][safe], rtol=0, atol=1e-5)
