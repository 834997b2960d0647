"""Segmentations in COCO's forms: polygons, and run-length encodings (RLE) of either kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return polygons or an RLE of either kind as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(valid_polygons(segmentation), height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def valid_polygons(polygons: list[list[float]]) -> list[list[float]]:
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def find_mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    if isinstance(segmentation, list):
        if any(finite_numbers(polygon) is None for polygon in segmentation):
            return "with a polygon that is not a list of finite numbers"
        # COCO has polygons of many parts with a degenerate one among them: Detectron2 leaves such parts out.
        if not valid_polygons(segmentation):
            return "whose polygons all have fewer than three points or an odd number of coordinates"
        return None
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str)):
        return "whose segmentation is neither polygons nor an RLE with size and counts"
    if segmentation.get("size") != [height, width]:
        return "whose RLE size is not (height, width) of the image"
    runs = run_lengths(segmentation["counts"])
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return "whose RLE counts do not add up to the image"
    if runs[1::2].sum() == 0:
        return "whose RLE covers no pixel"
    return None


def finite_numbers(values: Any) -> np.ndarray | None:
    """Return a list of finite numbers as an array, None for anything else."""
    if not isinstance(values, list):
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    array = np.asarray(values, dtype=np.float64)
    return array if np.isfinite(array).all() else None


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def run_lengths(counts: Any) -> np.ndarray | None:
    """Return the run lengths of an RLE, None if it cannot be parsed.

    pycocotools decodes a compressed RLE that is too short into uninitialised memory, so its length is checked here. Its
    code: each number is little-endian groups of 5 bits, one character (from "0") a group, bit 5 set if another follows,
    bit 4 of the last one the sign; from the fourth number on it is the difference to the number two before.
    """
    if isinstance(counts, list):
        return np.asarray(counts, dtype=np.int64) if counts and all(is_integer(count) for count in counts) else None
    codes = np.frombuffer(counts.encode("utf-8"), dtype=np.uint8).astype(np.int64) - ord("0")
    if codes.size == 0 or codes.min() < 0 or codes.max() > 0x3F or codes[-1] & 0x20:
        return None
    last = np.flatnonzero(codes & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 7:  # no image has runs of more than 2 ** 34 pixels
        return None
    shift = 5 * (np.arange(codes.size) - np.repeat(first, groups))
    runs = np.add.reduceat((codes & 0x1F) << shift, first) - ((codes[last] & 0x10) >> 4 << 5 * groups)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
