"""The cascade at inference: what it detects from, and what it returns."""

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import nn

from mnc_d2.modeling.roi_heads.labels import boxes_to_rois

SIZES = [(64, 64), (48, 60), (30, 64)]


def infer(heads, features, proposals):
    heads.eval()
    with torch.no_grad():
        return heads(None, features, proposals)[0]


@pytest.fixture
def proposals(make_proposals, random_boxes):
    return [make_proposals(random_boxes(12, i, (30, 48)), size) for i, size in enumerate(SIZES)]


def candidates_of(heads, features, proposals):
    """Return (boxes, scores, masks, image size) that mask voting gets for each image."""
    calls = []

    def vote(*args, **kwargs):
        calls.append(args)
        return Instances(args[3])

    heads.vote = vote
    infer(heads, features, proposals)
    return calls


def test_detections_have_the_fields_of_detectron2(make_roi_heads, make_map, proposals):
    results = infer(make_roi_heads(), make_map(n=3), proposals)
    assert [x.image_size for x in results] == SIZES
    for result in results:
        count = len(result)
        assert count > 0
        assert result.pred_boxes.tensor.shape == (count, 4)
        assert result.scores.shape == (count,) and (result.scores.diff() <= 0).all()
        assert result.pred_classes.dtype == torch.int64 and result.pred_classes.max() < 2
        assert result.pred_masks.shape == (count, 1, 4, 4) and result.pred_masks.dtype == torch.float32
        height, width = result.image_size
        boxes = result.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()


def test_a_batch_gives_what_each_image_gives(make_roi_heads, make_map, proposals):
    heads, features = make_roi_heads(), make_map(n=3)
    together = infer(heads, features, proposals)
    for i, result in enumerate(together):
        (alone,) = infer(heads, {"map": features["map"][i : i + 1]}, proposals[i : i + 1])
        # Matrix products of another size may round otherwise.
        torch.testing.assert_close(result.scores, alone.scores, rtol=0, atol=1e-6)
        assert torch.equal(result.pred_classes, alone.pred_classes)
        torch.testing.assert_close(result.pred_boxes.tensor, alone.pred_boxes.tensor)
        torch.testing.assert_close(result.pred_masks, alone.pred_masks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_on", [True, False])
@pytest.mark.parametrize("counts", [(0, 5, 0), (0, 0, 0)], ids=str)
def test_images_without_proposals(make_roi_heads, make_map, make_proposals, random_boxes, mask_on, counts):
    boxes = [make_proposals(random_boxes(count), size) for count, size in zip(counts, SIZES)]
    results = infer(make_roi_heads(mask_on=mask_on), make_map(n=3), boxes)
    assert [len(x) > 0 for x in results] == [count > 0 for count in counts]
    assert all(x.has("pred_masks") == mask_on for x in results)


def test_one_class(make_roi_heads, make_map, proposals):
    results = infer(make_roi_heads(num_classes=1), make_map(n=3), proposals)
    assert all((x.pred_classes == 0).all() for x in results)


# ---- passes


def test_candidates_are_scored_at_mask_level(make_roi_heads, make_map, proposals):
    heads = make_roi_heads(num_passes_test=1)
    outputs = []
    heads.passes[0].classifier.predictor.register_forward_hook(lambda module, args, output: outputs.append(output))
    calls = candidates_of(heads, make_map(n=3), proposals)
    probabilities = outputs[0][1].softmax(dim=1)[:, :2]
    assert torch.equal(torch.cat([scores for _, scores, *_ in calls]), probabilities)


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_candidates_of_all_passes_go_to_mask_voting(make_roi_heads, make_map, proposals, num_passes):
    heads = make_roi_heads(num_passes_train=1, num_passes_test=num_passes)
    calls = candidates_of(heads, make_map(n=3), proposals)
    assert [size for *_, size in calls] == SIZES
    for (boxes, scores, masks, _), proposal in zip(calls, proposals):
        count = 12 * num_passes
        assert (boxes.shape, scores.shape, masks.shape) == ((count, 4), (count, 2), (count, 4, 4))
        assert torch.equal(boxes[:12], proposal.proposal_boxes.tensor)


def test_first_pass_is_the_same_whatever_follows(make_roi_heads, make_map, proposals):
    first = candidates_of(make_roi_heads(num_passes_test=1), make_map(n=3), proposals)
    more = candidates_of(make_roi_heads(num_passes_test=3), make_map(n=3), proposals)
    for a, b in zip(first, more):
        assert all(torch.equal(x, y[:12]) for x, y in zip(a[:3], b[:3]))


def test_next_pass_starts_from_the_regressed_boxes_of_its_image(make_roi_heads, make_map, proposals):
    """Two passes on the proposals are, in their second half, one pass on the boxes that the first one regressed."""
    heads = make_roi_heads(num_passes_test=2)
    calls = candidates_of(heads, make_map(n=3), proposals)
    heads.num_passes_test = 1
    again = []
    for (boxes, *_), size in zip(calls, SIZES):
        again.append(Instances(size, proposal_boxes=Boxes(boxes[12:])))
    repeated = candidates_of(heads, make_map(n=3), again)
    for a, b in zip(calls, repeated):
        assert all(torch.equal(x[12:], y) for x, y in zip(a[:3], b[:3]))


def test_boxes_that_are_surely_background_go_no_further(make_roi_heads, make_map, proposals):
    heads = make_roi_heads(num_passes_test=2).eval()
    with torch.no_grad():
        every = heads.predict(make_map(n=3), proposals)
        scores = [
            x.softmax(dim=1)[:, :-1].sum(dim=1)
            for x in (every[0].predictions.cls_logits, every[0].predictions.seg_cls_logits)
        ]
        foreground = torch.maximum(*scores)  # of any class, at either level
        heads.next_pass_min_score = foreground.median().item()
        some = heads.predict(make_map(n=3), proposals)
    torch.testing.assert_close(every[0].foreground_probabilities, foreground)
    keep = every[0].foreground_probabilities >= heads.next_pass_min_score
    assert len(some[0].rois) == 36 and 0 < len(some[1].rois) < 36
    assert torch.equal(some[1].rois, every[1].rois[keep])
    torch.testing.assert_close(some[1].predictions.seg_cls_logits, every[1].predictions.seg_cls_logits[keep])
    assert len(infer(heads, make_map(n=3), proposals)) == 3


def test_no_box_may_go_further(make_roi_heads, make_map, proposals):
    heads = make_roi_heads(num_passes_test=3, next_pass_min_score=1.1).eval()
    with torch.no_grad():
        outputs = heads.predict(make_map(n=3), proposals)
    assert [len(x.masks) for x in outputs] == [36, 0, 0]
    assert all(len(x) > 0 for x in infer(heads, make_map(n=3), proposals))


BIAS = {"class 0": (3.0, 0.0, 0.0), "class 1": (0.0, 3.0, 0.0), "background": (0.0, 1.0, 3.0)}


@pytest.mark.parametrize(
    ("best", "allow_background", "shift"),
    [
        ("class 0", True, (1.0, 0.0)),
        ("class 1", True, (2.0, 0.0)),
        ("class 1", False, (2.0, 0.0)),
        ("background", True, (0.0, 3.0)),
        ("background", False, (2.0, 0.0)),
    ],
)
def test_next_boxes_take_the_deltas_of_the_best_mask_level_class(
    make_roi_heads, make_map, make_proposals, best, allow_background, shift
):
    heads = make_roi_heads(next_box_background=allow_background)
    fix_outputs(heads.passes[0].classifier.predictor, BIAS[best])
    calls = candidates_of(heads, make_map(), [make_proposals([[20, 10, 40, 50]])])
    expected = torch.tensor([20.0, 10.0, 40.0, 50.0]) + torch.tensor(shift * 2)
    torch.testing.assert_close(calls[0][0][1], expected)


def fix_outputs(predictor, seg_cls_bias):
    """Make the mask-level logits constant and the deltas shift a box of 20 x 40 by (1, 0), (2, 0), (0, 3) by class."""
    for layer in (predictor.seg_cls_score, predictor.bbox_pred):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        predictor.seg_cls_score.bias[:] = torch.tensor(seg_cls_bias)
        shifts = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        predictor.bbox_pred.bias.view(3, 4)[:, :2] = shifts / torch.tensor([20.0, 40.0]) * 10


def test_background_never_regresses_a_box_in_training(make_roi_heads, make_map, make_proposals, make_target):
    heads = make_roi_heads(next_box_background=True, proposal_append_gt=False)
    fix_outputs(heads.passes[0].classifier.predictor, BIAS["background"])
    pooled_boxes = []
    heads.pooler.register_forward_pre_hook(lambda module, args: pooled_boxes.append(args[1][:, 1:].detach()))
    target = make_target([[20, 10, 40, 50]], [0])
    heads(None, make_map(), [make_proposals([[20, 10, 40, 50]])], [target])
    torch.testing.assert_close(pooled_boxes[1][0], torch.tensor([22.0, 10.0, 42.0, 50.0]))


def test_next_boxes_are_clipped_to_their_image(make_roi_heads, make_map, make_proposals):
    heads = make_roi_heads()
    fix_outputs(heads.passes[0].classifier.predictor, BIAS["class 1"])
    proposals = [make_proposals([[20, 10, 40, 50]], size) for size in ((50, 41), (64, 64))]
    calls = candidates_of(heads, make_map(n=2), proposals)
    torch.testing.assert_close(calls[0][0][1], torch.tensor([22.0, 10.0, 41.0, 50.0]))
    torch.testing.assert_close(calls[1][0][1], torch.tensor([22.0, 10.0, 42.0, 50.0]))


# ---- the classifier sees the mask


def test_mask_level_path_sees_masked_features_and_box_path_plain_ones(make_roi_heads, make_map, proposals):
    heads = make_roi_heads(num_passes_test=1)
    seen, classifier = {}, heads.passes[0].classifier
    for name in ("mask_path_head", "box_path_head"):
        getattr(classifier, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    pooled, masks = [], []
    heads.pooler.register_forward_hook(lambda module, args, output: pooled.append(output[1]))
    heads.passes[0].classifier.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    infer(heads, make_map(n=3), proposals)
    masked = pooled[0] * masks[0][:, None]

    def slow_max(x):  # (R, C, 4, 4) -> (R, C, 2, 2)
        return torch.stack(
            [torch.stack([x[:, :, i : i + 2, j : j + 2].amax(dim=(2, 3)) for j in (0, 2)], -1) for i in (0, 2)], -2
        )

    assert torch.equal(seen["mask_path_head"], slow_max(masked))
    assert torch.equal(seen["box_path_head"], slow_max(pooled[0]))


# ---- boxes only


def test_without_masks_the_detections_are_class_boxes_with_box_level_scores(make_roi_heads, make_map, proposals):
    heads = make_roi_heads(mask_on=False, num_passes_test=1)
    outputs = []
    heads.passes[0].classifier.predictor.register_forward_hook(lambda module, args, output: outputs.append(output))
    results = infer(heads, make_map(n=3), proposals)
    scores, _, deltas = outputs[0]
    boxes = heads.passes[0].classifier.predictor.predict_class_boxes(
        torch.cat([x.proposal_boxes.tensor for x in proposals]), deltas
    )
    expected, _ = fast_rcnn_inference(boxes.split(12), scores.softmax(1).split(12), SIZES, 0.0, 0.5, 100)
    for result, other in zip(results, expected):
        assert not result.has("pred_masks")
        assert torch.equal(result.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(result.scores, other.scores)


def test_masks_can_be_switched_off_and_on_again(make_roi_heads, make_map, proposals):
    heads = make_roi_heads()
    before = infer(heads, make_map(n=3), proposals)
    heads.mask_on = False  # as Detectron2's test-time augmentation does
    infer(heads, make_map(n=3), proposals)
    heads.mask_on = True
    after = infer(heads, make_map(n=3), proposals)
    assert all(torch.equal(a.pred_masks, b.pred_masks) for a, b in zip(before, after))


# ---- given boxes


def test_masks_in_given_boxes_are_those_of_the_mask_head(make_roi_heads, make_map, random_boxes):
    heads, features = make_roi_heads().eval(), make_map(n=2)
    instances = [
        Instances((64, 64), pred_boxes=Boxes(random_boxes(n, n)), pred_classes=torch.zeros(n, dtype=torch.long))
        for n in (3, 0)
    ]
    with torch.no_grad():
        results = heads.forward_with_given_boxes(features, instances)
        pooled, _ = heads.pooler(features, boxes_to_rois([x.pred_boxes for x in instances]), 1)
        expected = heads.passes[0].mask_head.layers(pooled).sigmoid()
    assert torch.equal(results[0].pred_masks, expected)
    assert results[1].pred_masks.shape == (0, 1, 4, 4)


def test_given_boxes_get_no_masks_where_masks_are_off(make_roi_heads, make_map, random_boxes):
    instances = [Instances((64, 64), pred_boxes=Boxes(random_boxes(3)))]
    (result,) = make_roi_heads(mask_on=False).eval().forward_with_given_boxes(make_map(), instances)
    assert not result.has("pred_masks")
