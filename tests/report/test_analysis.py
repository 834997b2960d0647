"""The numbers of a report, on cases that can be counted by hand."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from mnc_d2.evaluation.ground_truth import Annotation, GroundTruth, ImageTruth
from mnc_d2.report.analysis import analyse_coco, confusion_matrix, match_image, match_images, reliability

SIZE = 100
NAMES, IDS = ["disc", "square"], [7, 3]


def rle(box):
    x, y, w, h = box
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_util.encode(mask)


def annotated(category, box, crowd=False):
    return Annotation("x", category, tuple(map(float, box)), rle(box), False, crowd)


def predicted(image_id, category, box, score):
    return {
        "image_id": image_id,
        "category_id": IDS[category],
        "bbox": list(box),
        "score": score,
        "segmentation": rle(box),
    }


A, B, C, D = (0, 0, 10, 10), (40, 0, 40, 40), (0, 50, 10, 10), (60, 60, 20, 20)
# Image 1: both found, the disc as a square, and one of nothing. Image 2: one disc found, one missed; a crowd.
TRUTH = GroundTruth(
    {
        1: ImageTruth(SIZE, SIZE, [annotated(0, A), annotated(1, B)]),
        2: ImageTruth(SIZE, SIZE, [annotated(0, A), annotated(0, C), annotated(0, D, crowd=True)]),
        3: ImageTruth(SIZE, SIZE, []),
    },
    NAMES,
    IDS,
    [],
)
PREDICTIONS = [
    predicted(1, 1, A, 0.9),
    predicted(1, 1, B, 0.8),
    predicted(1, 0, D, 0.6),
    predicted(2, 0, A, 0.95),
    predicted(2, 0, D, 0.7),  # in the crowd
    predicted(2, 0, C, 0.4),  # below the score that counts
]


def test_the_confusion_matrix_counts_what_is_taken_for_what():
    counts = confusion_matrix(match_images(TRUTH, PREDICTIONS), 2)
    #            disc square none
    assert counts.tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_quality_is_the_share_of_what_is_right():
    qualities = {i: x.quality for i, x in match_images(TRUTH, PREDICTIONS).items()}
    assert qualities[1] == pytest.approx(1 / 3) and qualities[2] == pytest.approx(1 / 2)
    assert np.isnan(qualities[3])


def test_an_instance_is_found_once_by_the_best_prediction():
    image = ImageTruth(SIZE, SIZE, [annotated(0, A)])
    predictions = [predicted(1, 0, A, 0.6), predicted(1, 1, A, 0.9)]
    assert match_image(image, predictions, {7: 0, 3: 1}).pairs == [(0, 1), (2, 0)]


@pytest.mark.parametrize("task", ["segm", "bbox"])
def test_ap_by_class_and_size(task):
    analysis = analyse_coco(TRUTH, PREDICTIONS, task)
    # Discs: right, wrong, and one of three at 0.4: precision 1 up to 1/3, then 2/3; 34 and 33 of 101 recall levels.
    disc = 100 * (34 + 33 * 2 / 3) / 101
    square = 50.0  # a wrong one comes first
    assert analysis.ap[:, 0] == pytest.approx([(disc + square) / 2, disc, square])
    for column in (1, 2):  # AP50 and AP75: what is right is exactly so
        assert analysis.ap[:, column] == pytest.approx(analysis.ap[:, 0])
    assert np.isnan(analysis.ap[1, 4]) and np.isnan(analysis.ap[2, 3])  # no medium discs, no small squares
    assert analysis.ap[2, 4] == pytest.approx(100)  # COCO leaves out predictions of other sizes
    assert sorted(zip(analysis.scores.tolist(), analysis.correct.tolist())) == [
        *[(0.4, True), (0.6, False), (0.8, True), (0.9, False), (0.95, True)]  # that in the crowd does not count
    ]


def test_nothing_found_is_no_error():
    analysis = analyse_coco(TRUTH, [], "segm")
    assert (analysis.ap == 0).all() and analysis.ap.shape == (3, 6)
    assert reliability(analysis.scores, analysis.correct) == []


def test_reliability_is_the_share_of_right_ones_by_score():
    scores, correct = np.array([0.05, 0.25, 0.27, 0.95, 1.0]), np.array([False, True, False, True, True])
    rows = reliability(scores, correct)
    assert [x[1:] for x in rows] == [(0.0, 1), (0.5, 2), (1.0, 2)]
    assert [x[0] for x in rows] == pytest.approx([0.05, 0.26, 0.975])
