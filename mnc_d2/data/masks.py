"""Segmentations in COCO's forms: polygons, and run-length encodings (RLE) of either kind."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as mask_util

MAX_REACH = 4  # image sizes that coordinates may reach out of the image
NO_PIXEL = "whose segmentation covers no pixel"

_Polygon = TypeVar("_Polygon", bound=Sized)


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return polygons or an RLE of either kind as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(valid_polygons(segmentation), height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def valid_polygons(polygons: list[_Polygon]) -> list[_Polygon]:
    """Return those that Detectron2 takes: three points or more, an even number of coordinates."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def find_mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Return what is wrong with a segmentation, as the end of "annotations ...", or None.

    What passes can be given to pycocotools, which otherwise reads or writes where it must not.
    """
    if isinstance(segmentation, list):
        problem = _find_polygon_problem(segmentation, height, width)
    else:
        problem = _find_rle_problem(segmentation, height, width)
    if problem is None and mask_util.area(to_rle(segmentation, height, width)) == 0:
        problem = NO_PIXEL
    return problem


def _find_polygon_problem(polygons: list[Any], height: int, width: int) -> str | None:
    arrays = [array for array in map(finite_numbers, polygons) if array is not None]
    if len(arrays) < len(polygons):
        return "with a polygon that is not a list of finite numbers"
    # COCO has polygons of many parts with a degenerate one among them: Detectron2 leaves such parts out.
    if not valid_polygons(polygons):
        return "whose polygons all have fewer than three points or an odd number of coordinates"
    if any(reaches_far_out(array, height, width) for array in arrays):
        return f"with a polygon that reaches more than {MAX_REACH} image sizes out (coordinates are in pixels)"
    # pycocotools keeps every point of an outline in memory.
    corners = [array.reshape(-1, 2) for array in valid_polygons(arrays)]
    length = sum(np.abs(xy - np.roll(xy, 1, axis=0)).sum() for xy in corners)
    if length > 256 * (height + width) + 8 * sum(map(len, corners)):
        return "with a polygon whose outline is hundreds of times as long as the image's"
    return None


def _find_rle_problem(segmentation: Any, height: int, width: int) -> str | None:
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str)):
        return "whose segmentation is neither polygons nor an RLE with size and counts"
    size = segmentation.get("size")
    if size != [height, width] or not all(is_integer(side) for side in size):
        return "whose RLE size is not (height, width) of the image"
    runs = run_lengths(segmentation["counts"])
    # Each one is compared before their sum, which may wrap.
    if runs is None or ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
        return "whose RLE counts do not add up to the image"
    return None


def reaches_far_out(coordinates: np.ndarray, height: int, width: int) -> bool:
    """Whether a coordinate lies more than a few image sizes outside the image."""
    return coordinates.size > 0 and np.abs(coordinates).max() > MAX_REACH * max(height, width)


def finite_numbers(values: Any) -> np.ndarray | None:
    """Return a list of finite numbers as an array, None for anything else."""
    if not isinstance(values, list):
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    try:
        array = np.asarray(values, dtype=np.float64)
    except OverflowError:  # an integer beyond the largest float
        return None
    return array if np.isfinite(array).all() else None


def is_integer(value: Any) -> bool:
    """Whether a value of a JSON file is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def run_lengths(counts: Any) -> np.ndarray | None:
    """Return the run lengths of an RLE, None if it cannot be parsed.

    pycocotools decodes a compressed RLE that is too short into uninitialised memory, so its length is checked here. Its
    code: each number is little-endian groups of 5 bits, one character (from "0") a group, bit 5 set if another follows,
    bit 4 of the last one the sign; from the fourth number on it is the difference to the number two before.
    """
    if isinstance(counts, list):
        valid = counts and all(is_integer(count) and 0 <= count < 2**63 for count in counts)
        return np.asarray(counts, dtype=np.int64) if valid else None
    codes = np.frombuffer(counts.encode("ascii", errors="replace"), dtype=np.uint8).astype(np.int64) - ord("0")
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
