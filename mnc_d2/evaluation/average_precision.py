"""Average precision as PASCAL VOC and SDS define it: from overlaps over true and false positives to a number.

Plain functions on arrays, without datasets. A prediction has one chance: the instance of its class and image that it
overlaps most. It is a true positive if that overlap reaches the threshold and no prediction with a higher score has
taken the instance; the second best instance is not tried. COCO's matching differs in just that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util

# Floating point products as in the VOC development kit and the authors' code: 0.1 * 3 is 0.30000000000000004, which a
# recall of 3 / 10 does not reach.
RECALL_LEVELS = 0.1 * np.arange(11)


def best_overlaps(
    predictions: Sequence[dict] | np.ndarray, instances: Sequence[dict] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the instance with the largest IoU for each prediction of one class in one image.

    Args:
        predictions: P masks as compressed RLE of the image's size, or boxes, float64 (P, 4), as x, y, width, height in
            pixels of the image.
        instances: G >= 1 of the same kind.

    Returns:
        the largest IoU, float64 (P,), and the index of its instance, int64 (P,); the first one if several are equal.
    """
    if len(predictions) == 0:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    ious = np.asarray(mask_util.iou(predictions, instances, [0] * len(instances)))  # (P, G)
    best = ious.argmax(axis=1)
    return ious[np.arange(len(best)), best], best


def crowd_shares(predictions: Sequence[dict] | np.ndarray, crowds: Sequence[dict] | np.ndarray) -> np.ndarray:
    """Return which part of each prediction lies in that crowd region which holds most of it.

    Args:
        predictions: P masks or boxes, see :func:`best_overlaps`.
        crowds: C >= 1 of the same kind.

    Returns:
        float64 (P,): intersection over the area of the prediction.
    """
    if len(predictions) == 0:
        return np.zeros(0)
    return np.asarray(mask_util.iou(predictions, crowds, [1] * len(crowds))).max(axis=1)


def match(
    ious: np.ndarray,
    instances: np.ndarray,
    difficult: np.ndarray,
    threshold: float,
    *,
    strict: bool = False,
    shares: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tell true from false positives among the predictions of one class.

    Args:
        ious: each prediction's largest IoU with an instance of its class and image, 0 where there is none; float (P,),
            in the order of descending scores.
        instances: that instance, an index into ``difficult``; -1 where there is none; int (P,).
        difficult: bool (G,): predictions of these instances are neither true nor false positives.
        threshold: the IoU from which on a prediction can match.
        strict: whether it has to be above the threshold, as for VOC's boxes.
        shares: for each prediction the part of it that lies in a crowd region of its class, (P,): from the threshold
            on, it is no false positive.

    Returns:
        true positives and false positives, bool (P,) each.
    """
    matched = (instances >= 0) & ((ious > threshold) if strict else (ious >= threshold))
    ignored = np.zeros(len(ious), dtype=bool)
    ignored[matched] = difficult[instances[matched]]
    rows = np.flatnonzero(matched & ~ignored)
    _, first = np.unique(instances[rows], return_index=True)
    true_positive = np.zeros(len(ious), dtype=bool)
    true_positive[rows[first]] = True
    if shares is not None:
        ignored |= shares >= threshold
    return true_positive, ~true_positive & ~ignored


def average_precision(true_positive: np.ndarray, false_positive: np.ndarray, num_instances: int) -> tuple[float, float]:
    """Return the average precision of one class, in both of VOC's definitions.

    Args:
        true_positive: bool (P,), in the order of descending scores.
        false_positive: bool (P,); predictions that are neither do not count.
        num_instances: the number of instances that can be found.

    Returns:
        the mean over eleven recall levels of the largest precision at that recall or a higher one (VOC 2007 to 2009,
        and mAP^r in the paper), and the area under that envelope (VOC since 2010); from 0 to 1. Without predictions or
        without instances both are 0.
    """
    if num_instances == 0 or len(true_positive) == 0:
        return 0.0, 0.0
    found = np.cumsum(true_positive)
    recall = found / num_instances
    precision = found / np.maximum(found + np.cumsum(false_positive), 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Where no prediction reaches a recall, precision is 0.
    at_levels = np.append(envelope, 0.0)[np.searchsorted(recall, RECALL_LEVELS)]
    area = np.sum(np.diff(recall, prepend=0.0) * envelope)
    return float(at_levels.mean()), float(area)
