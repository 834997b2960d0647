"""`shapes`: a synthetic instance segmentation dataset, drawn on first use from a fixed seed."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import uuid
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from PIL import Image

from .drawing import DRAWING_VERSION, SHAPES_CLASSES, ShapesSpec, draw_image
from .files import datasets_root

__all__ = ["SHAPES_CLASSES", "SHAPES_SPLITS", "ShapesSpec", "prepare_shapes", "register_shapes"]

logger = logging.getLogger(__name__)

SHAPES_SPLITS = {
    "shapes_train": ShapesSpec("train", num_images=500, seed=1),
    "shapes_val": ShapesSpec("val", num_images=80, seed=2),
}


def prepare_shapes(root: str, spec: ShapesSpec) -> tuple[str, str]:
    """Draw the dataset `spec` under `root` unless it is there already.

    The dataset appears in one step, by renaming a finished folder, so a run that is interrupted leaves nothing that
    looks complete, and of several processes that draw it at the same time one wins and the others use its files.

    Returns:
        Paths of the COCO annotation file and of the image folder.

    Raises:
        RuntimeError: the folder exists without an annotation file, so somebody else's files are in the way.
    """
    folder = os.path.join(root, spec.folder)
    json_file, image_root = _paths(root, spec)
    if os.path.isfile(json_file):
        return json_file, image_root

    # The name keeps the prefix `shapes_`, which git ignores.
    scratch = f"{folder}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    logger.info(f"Drawing {spec.num_images} images into {folder} ...")
    try:
        _write(scratch, spec)
        try:
            os.rename(scratch, folder)
        except OSError as e:  # the folder is there and not empty
            if not os.path.isfile(json_file):
                raise RuntimeError(f"{folder} exists without annotations.json. Remove the folder and run again.") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return json_file, image_root


def register_shapes(name: str, spec: ShapesSpec, root: str | None = None) -> None:
    """Register `spec` as dataset `name`; nothing is drawn before its first use.

    It is drawn when its records are asked for, or by :func:`mnc_d2.data.prepare_dataset`, which a program calls that
    opens the metadata's `json_file` before.

    Args:
        name: name in Detectron2's DatasetCatalog and MetadataCatalog.
        spec: what to draw.
        root: folder under which the cache folder lies; None takes `datasets_root()`.

    Raises:
        AssertionError: the name is taken, from DatasetCatalog.
    """
    prepare = functools.partial(prepare_shapes, root or datasets_root(), spec)
    DatasetCatalog.register(name, lambda: load_coco_json(*prepare(), name))
    json_file, image_root = _paths(root or datasets_root(), spec)
    MetadataCatalog.get(name).set(
        prepare=prepare,
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(SHAPES_CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(SHAPES_CLASSES))},
    )


def _paths(root: str, spec: ShapesSpec) -> tuple[str, str]:
    folder = os.path.join(root, spec.folder)
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _write(folder: str, spec: ShapesSpec) -> None:
    """Write all images of `spec` and their annotations into the new folder `folder`."""
    image_root = os.path.join(folder, "images")
    os.makedirs(image_root)
    height, width = spec.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(spec.num_images):
        image, instances = draw_image(spec, index)
        image_id = index + 1
        file_name = f"{image_id:06d}.png"
        # The noise hardly compresses; a higher level would only take longer.
        Image.fromarray(image).save(os.path.join(image_root, file_name), compress_level=1)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for label, mask in instances:
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "area": int(mask_util.area(rle)),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES_CLASSES)]
    info = {"description": f"mnc_d2 synthetic shapes, {spec}, drawing version {DRAWING_VERSION}"}
    dataset = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    with open(os.path.join(folder, "annotations.json"), "w", encoding="utf-8") as file:
        json.dump(dataset, file)
