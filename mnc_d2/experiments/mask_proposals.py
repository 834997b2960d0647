"""Precomputed mask proposals, one .npz file per image: what convolutional feature masking (CFM) classifies."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from ..data import DATASET_MAPPER_REGISTRY, MNCDatasetMapper
from ..files import open_atomically

MAX_BYTES = 2**30  # of an array: a small file can claim, and unpack to, any size
_SUPPORTED_TRANSFORMS = (T.NoOpTransform, T.ResizeTransform, T.HFlipTransform, T.VFlipTransform, T.CropTransform)


@DATASET_MAPPER_REGISTRY.register()
class MaskProposalMapper(MNCDatasetMapper):
    """The project's mapper, with the mask proposals of each image as "proposals"."""

    @configurable
    def __init__(self, is_train: bool, *, folder: str, limit: int, **kwargs: Any) -> None:
        """
        Args:
            is_train: as for :class:`~mnc_d2.data.MNCDatasetMapper`.
            folder: of the mask proposals, see :func:`mask_proposals_path`.
            limit: at most this many of them are given, the best.
            kwargs: as for :class:`~mnc_d2.data.MNCDatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.folder = folder
        self.limit = limit

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        datasets = cfg.DATASETS
        limits = datasets.PRECOMPUTED_PROPOSAL_TOPK_TEST, datasets.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
        return {**super().from_config(cfg, is_train), "folder": datasets.MASK_PROPOSALS, "limit": limits[is_train]}

    @classmethod
    def check_files(cls, cfg: CfgNode, dataset_names: Iterable[str]) -> None:
        """Check, without reading them, that the mask proposals of all images of datasets are there and whole.

        On a terminal a bar shows the progress.

        Raises:
            FileNotFoundError, ValueError: as of :func:`load_mask_proposals`, of the first file that is missing or bad.
        """
        for name in dataset_names:
            for record in tqdm(DatasetCatalog.get(name), f"{name}, mask proposals", unit=" images", disable=None):
                check_mask_proposals_file(mask_proposals_path(cfg.DATASETS.MASK_PROPOSALS, record["file_name"]))

    def add_proposals(self, record: dict[str, Any], transforms: T.TransformList, image_size: tuple[int, int]) -> None:
        """As :meth:`MNCDatasetMapper.add_proposals`, see :func:`transform_mask_proposals`.

        Raises:
            FileNotFoundError, ValueError: as of :func:`load_mask_proposals`.
        """
        proposals = load_mask_proposals(mask_proposals_path(self.folder, record["file_name"]), self.limit)
        record["proposals"] = transform_mask_proposals(proposals, transforms, image_size)


def mask_proposals_path(folder: str | os.PathLike, image_file: str | os.PathLike) -> Path:
    """Where the mask proposals of an image lie: in ``folder``, under the image's name without its extension."""
    return Path(folder) / f"{Path(image_file).stem}.npz"


def save_mask_proposals(path: str | os.PathLike, boxes: np.ndarray, masks: np.ndarray, scores: np.ndarray) -> None:
    """Write the mask proposals of one image; the file is there completely or not at all.

    Args:
        path: see :func:`mask_proposals_path`.
        boxes: (P, 4), float32, x1, y1, x2, y2 in pixels of the image as it is on disk.
        masks: (P, m, m), bool or uint8 (0 to 255 for probabilities of 0 to 1), in the frame of the box.
        scores: (P,), higher is better.

    Raises:
        ValueError: a shape, or the dtype of the masks, is another; a box has no area, or a number is not finite.
    """
    arrays = {
        "boxes": np.asarray(boxes, np.float32),
        "masks": np.asarray(masks),
        "scores": np.asarray(scores, np.float32),
    }
    _check(arrays, path)
    with open_atomically(path) as file:
        np.savez_compressed(file, boxes=arrays["boxes"], masks=arrays["masks"], scores=arrays["scores"])


def load_mask_proposals(path: str | os.PathLike, limit: int | None = None) -> Instances:
    """Read the mask proposals of one image, best first.

    Args:
        path: see :func:`mask_proposals_path`.
        limit: the largest number to return.

    Returns:
        Instances without an image size, (0, 0), with ``proposal_boxes``, ``objectness_logits`` (P,), float32, and
        ``proposal_masks`` (P, m, m), float32, in [0, 1].

    Raises:
        FileNotFoundError, ValueError: the file is not there, or not what :func:`save_mask_proposals` writes.
    """
    check_mask_proposals_file(path)
    with _named(path), np.load(path, allow_pickle=False) as file:
        arrays = {
            "boxes": file["boxes"].astype(np.float32),
            "masks": file["masks"],
            "scores": file["scores"].astype(np.float32),
        }
    _check(arrays, path)
    order = np.argsort(-arrays["scores"], kind="stable")[:limit]
    masks = torch.from_numpy(arrays["masks"][order])
    proposals = Instances((0, 0))
    proposals.proposal_boxes = Boxes(torch.from_numpy(arrays["boxes"][order]))
    proposals.objectness_logits = torch.from_numpy(arrays["scores"][order])
    proposals.proposal_masks = masks.float() if masks.dtype == torch.bool else masks.float() / 255
    return proposals


def check_mask_proposals_file(path: str | os.PathLike) -> None:
    """Check what a file says of its arrays, before memory is taken for them.

    Raises:
        FileNotFoundError, ValueError: as of :func:`load_mask_proposals`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Mask proposals {path} do not exist. DATASETS.MASK_PROPOSALS must be a folder with one file per image, "
            "named after the image."
        )
    with _named(path), zipfile.ZipFile(path) as archive:
        boxes, masks, scores = (_read_header(archive, f"{name}.npy") for name in ("boxes", "masks", "scores"))
    if not all(np.issubdtype(dtype, np.number) and dtype.kind != "c" for dtype in (boxes[1], scores[1])):
        raise ValueError(f"Mask proposals {path}: boxes and scores must be numbers, got {boxes[1]} and {scores[1]}")
    _check_shapes(boxes[0], masks[0], scores[0], masks[1], path)


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of an array that is as long as its header says."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
        # In Python's integers, which do not wrap.
        claimed, found = math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not loaded: allow_pickle=False")
    if claimed != found or claimed > MAX_BYTES:
        raise ValueError(f"{name} claims {claimed} bytes, has {found}, and may have {MAX_BYTES}")
    return shape, dtype


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile, zlib and NumPy raise all kinds on damaged files
        raise ValueError(f"Mask proposals {path} cannot be read: {error}") from error


def transform_mask_proposals(
    proposals: Instances, transforms: T.TransformList, image_size: tuple[int, int]
) -> Instances:
    """Move mask proposals along with their image.

    Args:
        proposals: as returned by :func:`load_mask_proposals`.
        transforms: resizing, flips and crops. Boxes that a crop cuts reach out of the image afterwards, so that their
            masks remain masks of the whole box.
        image_size: (height, width) after the transforms.

    Returns:
        those of them that overlap the image, of this size.

    Raises:
        ValueError: any other transform.
    """
    flip_x = flip_y = False
    for transform in transforms.transforms:
        if not isinstance(transform, _SUPPORTED_TRANSFORMS):
            raise ValueError(f"Mask proposals cannot follow {type(transform).__name__}; use resizing, flips and crops.")
        flip_x ^= isinstance(transform, T.HFlipTransform)
        flip_y ^= isinstance(transform, T.VFlipTransform)
    height, width = image_size
    boxes = Boxes(torch.from_numpy(transforms.apply_box(proposals.proposal_boxes.tensor.numpy())).float())
    x1, y1, x2, y2 = boxes.tensor.unbind(dim=1)
    result = Instances(image_size)
    result.proposal_boxes = boxes
    result.objectness_logits = proposals.objectness_logits
    result.proposal_masks = proposals.proposal_masks.flip([axis for axis, flip in ((1, flip_y), (2, flip_x)) if flip])
    return result[(x1.clamp(min=0) < x2.clamp(max=width)) & (y1.clamp(min=0) < y2.clamp(max=height))]


def _check(arrays: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    boxes, masks, scores = arrays["boxes"], arrays["masks"], arrays["scores"]
    _check_shapes(boxes.shape, masks.shape, scores.shape, masks.dtype, path)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(f"Mask proposals {path}: boxes and scores must be finite")
    bad = ((boxes[:, 2:] <= boxes[:, :2]).any(axis=1)).nonzero()[0]
    if len(bad):
        raise ValueError(f"Mask proposals {path}: box {bad[0]} has no area: {boxes[bad[0]].tolist()}")


def _check_shapes(
    boxes: tuple[int, ...], masks: tuple[int, ...], scores: tuple[int, ...], dtype: np.dtype, path: str | os.PathLike
) -> None:
    if len(boxes) != 2 or boxes[1] != 4 or scores != boxes[:1] or len(masks) != 3 or masks[:1] != boxes[:1]:
        raise ValueError(
            f"Mask proposals {path}: expected boxes (P, 4), masks (P, m, m) and scores (P,), "
            f"got {boxes}, {masks} and {scores}"
        )
    if masks[1] != masks[2] or dtype not in (np.bool_, np.uint8):
        raise ValueError(f"Mask proposals {path}: masks must be square, bool or uint8, got {masks}, {dtype}")
