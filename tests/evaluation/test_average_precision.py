"""Matching and average precision, against slow references and Detectron2's code for VOC."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap

from mnc_d2.evaluation.average_precision import average_precision, best_overlaps, crowd_shares, match


def rle(*rows):
    return mask_util.encode(np.asfortranarray(np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)))


def slow_match(ious, instances, difficult, threshold, strict):
    """The rules one prediction after the other."""
    taken, flags = set(), []
    for iou, instance in zip(ious, instances):
        enough = iou > threshold if strict else iou >= threshold
        if instance < 0 or not enough:
            flags.append((False, True))
        elif difficult[instance]:
            flags.append((False, False))
        else:
            flags.append((instance not in taken, instance in taken))
            taken.add(instance)
    return np.array(flags).T


# ---- overlaps


def test_best_overlap_is_the_first_of_equal_ones():
    instances = [rle("1100", "0000"), rle("0011", "0000"), rle("0000", "1111")]
    predictions = [rle("0110", "0000"), rle("0011", "0000"), rle("0000", "0000"), rle("0001", "0111")]
    ious, indices = best_overlaps(predictions, instances)
    assert ious.tolist() == [1 / 3, 1.0, 0.0, 3 / 5]
    assert indices.tolist() == [0, 1, 0, 2]


def test_boxes_overlap_from_corner_to_corner():
    # x, y, width, height: columns 0 to 9 and 5 to 14 share 5 of 15.
    ious, indices = best_overlaps(np.array([[5.0, 0, 10, 10]]), np.array([[50.0, 50, 1, 1], [0, 0, 10, 10]]))
    assert ious.tolist() == [5 / 15] and indices.tolist() == [1]


def test_share_in_a_crowd_is_of_the_area_of_the_prediction():
    predictions = [rle("1111", "0000"), rle("0000", "0001")]
    assert crowd_shares(predictions, [rle("0001", "0000"), rle("0111", "1111")]).tolist() == [3 / 4, 1.0]


def test_no_predictions_have_no_overlaps():
    ious, indices = best_overlaps(np.zeros((0, 4)), np.array([[0.0, 0, 1, 1]]))
    assert ious.shape == indices.shape == crowd_shares([], [rle("1")]).shape == (0,)


# ---- matching


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_match_follows_the_rules_one_by_one(seed, strict):
    generator = np.random.default_rng(seed)
    instances = generator.integers(-1, 12, size=60)
    ious = np.where(instances < 0, 0, generator.integers(0, 11, size=60) / 10)  # many of them equal to the threshold
    difficult = generator.random(12) < 0.3
    expected = slow_match(ious, instances, difficult, 0.5, strict)
    flags = match(ious, instances, difficult, 0.5, strict=strict)
    assert np.array_equal(flags, expected)
    assert 0 < flags[0].sum() < 12 and flags[1].any() and not (flags[0] | flags[1]).all()


def test_an_instance_that_is_taken_is_not_replaced_by_the_second_best():
    # Both predictions overlap instance 0 most; another instance is free.
    true, false = match(np.array([0.9, 0.8]), np.array([0, 0]), np.zeros(2, dtype=bool), 0.5)
    assert true.tolist() == [True, False] and false.tolist() == [False, True]


def test_false_positives_in_a_crowd_are_ignored_and_true_positives_are_not():
    ious, instances = np.array([0.9, 0.1, 0.1, 0.8]), np.array([0, 0, 0, 0])
    shares = np.array([1.0, 0.5, 0.4, 0.9])
    true, false = match(ious, instances, np.zeros(1, dtype=bool), 0.5, shares=shares)
    assert true.tolist() == [True, False, False, False]
    assert false.tolist() == [False, False, True, False]


def test_match_without_predictions_or_instances():
    nothing = np.zeros(0)
    assert [len(x) for x in match(nothing, nothing.astype(int), np.zeros(3, dtype=bool), 0.5)] == [0, 0]
    true, false = match(np.zeros(2), np.array([-1, -1]), np.zeros(0, dtype=bool), 0.5)
    assert not true.any() and false.all()


# ---- average precision


def slow_area(true, false, num_instances):
    """Step by step: each true positive adds 1 / G of recall at the best precision from there on."""
    precisions = [sum(true[: i + 1]) / (sum(true[: i + 1]) + sum(false[: i + 1])) for i in range(len(true)) if true[i]]
    return sum(max(precisions[i:]) for i in range(len(precisions))) / num_instances


def slow_eleven_points(true, false, num_instances):
    points = []
    for k in range(11):
        found = [0.0]
        for i in range(len(true)):
            if sum(true[: i + 1]) / num_instances >= k * 0.1:
                found.append(sum(true[: i + 1]) / max(sum(true[: i + 1]) + sum(false[: i + 1]), 1))
        points.append(max(found))
    return sum(points) / 11


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_against_slow_references_and_voc_ap(seed):
    generator = np.random.default_rng(seed)
    # Some predictions, of difficult instances, are neither.
    kind = generator.choice(3, size=40, p=[0.5, 0.3, 0.2])
    true, false = kind == 0, kind == 1
    num_instances = int(true.sum()) + seed
    eleven, area = average_precision(true, false, num_instances)
    assert area == pytest.approx(slow_area(true.tolist(), false.tolist(), num_instances), abs=1e-12)
    assert eleven == pytest.approx(slow_eleven_points(true.tolist(), false.tolist(), num_instances), abs=1e-12)
    recall = true.cumsum() / num_instances
    precision = true.cumsum() / np.maximum(true.cumsum() + false.cumsum(), 1e-12)
    assert eleven == pytest.approx(voc_ap(recall, precision, use_07_metric=True), abs=1e-12)
    assert area == pytest.approx(voc_ap(recall, precision, use_07_metric=False), abs=1e-12)


def test_recall_levels_are_floating_point_products():
    # 3 of 10 is below the level 0.1 * 3, so that this point, like the seven above, is 0.
    true = np.array([True, True, True])
    assert average_precision(true, ~true, 10)[0] == pytest.approx(3 / 11, abs=1e-12)
    assert average_precision(true, ~true, 3) == pytest.approx((1.0, 1.0), abs=1e-12)


@pytest.mark.parametrize(("predictions", "instances"), [(0, 5), (5, 0), (0, 0)])
def test_average_precision_without_predictions_or_instances_is_0(predictions, instances):
    false = np.ones(predictions, dtype=bool)
    assert average_precision(~false, false, instances) == (0.0, 0.0)
