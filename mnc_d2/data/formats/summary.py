"""Counts of a dataset in COCO format, and its division into training and validation."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pycocotools.mask as mask_util

from ...files import open_atomically
from ...messages import first_few
from ..coco_checks import check_coco_dataset, read_coco_file
from ..masks import to_rle

__all__ = ["DatasetSummary", "describe_dataset", "split_dataset"]

# COCO's: pixels of the mask, or of the box where there is no mask.
SMALL, MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class DatasetSummary:
    """What is in a dataset.

    Attributes:
        num_images: number of images.
        num_empty_images: those without an instance.
        image_sizes: (width, height) of the smallest and of the largest image, by pixels.
        instances: number of instances by class, crowds not among them, in the order of the classes.
        instance_sizes: number of instances by COCO's sizes: "small" (under 32 x 32 pixels), "medium" and "large" (from
            96 x 96 on).
        num_box_only: instances that have a box and no mask.
        num_crowds: crowd regions.
    """

    num_images: int
    num_empty_images: int
    image_sizes: tuple[tuple[int, int], tuple[int, int]]
    instances: dict[str, int]
    instance_sizes: dict[str, int]
    num_box_only: int
    num_crowds: int

    def __str__(self) -> str:
        smallest, largest = (f"{width} x {height}" for width, height in self.image_sizes)
        rows = [
            ("images", self.num_images),
            ("  without an instance", self.num_empty_images),
            ("  smallest", smallest),
            ("  largest", largest),
            ("instances", sum(self.instances.values())),
            *((f"  {size}", count) for size, count in self.instance_sizes.items()),
            ("  with a box only", self.num_box_only),
            ("crowd regions", self.num_crowds),
            ("classes", len(self.instances)),
            *((f"  {name}", count) for name, count in self.instances.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>11}" for name, value in rows)


def describe_dataset(json_file: str | os.PathLike, image_root: str | os.PathLike) -> DatasetSummary:
    """Check a dataset in COCO format and count what is in it.

    Raises:
        FileNotFoundError, ValueError: as of :func:`mnc_d2.data.register_coco_dataset`.
    """
    dataset, _ = check_coco_dataset(os.fspath(json_file), os.fspath(image_root))
    images = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    names = {x["id"]: x["name"] for x in sorted(dataset["categories"], key=lambda x: x["id"])}
    real = [anno for anno in dataset["annotations"] if not anno.get("iscrowd", 0)]
    instances, sizes = dict.fromkeys(names.values(), 0), dict.fromkeys(("small", "medium", "large"), 0)
    for anno in real:
        instances[names[anno["category_id"]]] += 1
        if anno.get("segmentation"):
            area = mask_util.area(to_rle(anno["segmentation"], *images[anno["image_id"]]))
        else:
            area = anno["bbox"][2] * anno["bbox"][3]
        sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1
    by_pixels = sorted(images.values(), key=lambda size: size[0] * size[1])
    return DatasetSummary(
        num_images=len(images),
        num_empty_images=len(images) - len({anno["image_id"] for anno in real}),
        image_sizes=(by_pixels[0][::-1], by_pixels[-1][::-1]),
        instances=instances,
        instance_sizes=sizes,
        num_box_only=sum(not anno.get("segmentation") for anno in real),
        num_crowds=len(dataset["annotations"]) - len(real),
    )


def split_dataset(
    json_file: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    image_root: str | os.PathLike | None = None,
) -> tuple[str, str]:
    """Divide a dataset in COCO format into train.json and val.json.

    Images are drawn at random; the same images, fraction and seed give the same division, in whichever order they are.

    Args:
        json_file: the annotations; they stay as they are.
        output_dir: where the two files go, over an earlier division's; made if need be.
        val_fraction: share of the images for validation, between 0 and 1. Each part gets at least one.
        seed: of the drawing.
        image_root: folder of the images, which the new files name as ``info.image_root``; None to leave ``info``.

    Returns:
        Paths of train.json and val.json; the folder of the images is that of ``json_file``.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not valid, the fraction is not between 0 and 1, there are
            fewer than two images, or one of the two would overwrite the file; the message names it.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"The share of images for validation is {val_fraction}. It must be between 0 and 1.")
    dataset = read_coco_file(os.fspath(json_file))
    ids = sorted(image["id"] for image in dataset["images"])
    known = set(ids)
    image_ids = [anno.get("image_id") for anno in dataset["annotations"]]
    strays = [i for i in image_ids if not isinstance(i, (int, str)) or i not in known]
    if strays:
        raise ValueError(f"{json_file}: annotations of images that are not in it: {first_few(strays)}. Correct them.")
    if len(ids) < 2:
        raise ValueError(f"{json_file} has {len(ids)} images. Two or more can be divided.")
    if image_root is not None:
        dataset["info"] = {**dataset.get("info", {}), "image_root": os.path.abspath(image_root)}
    paths = {name: Path(output_dir, f"{name}.json") for name in ("train", "val")}
    if Path(json_file).resolve() in [path.resolve() for path in paths.values()]:
        raise ValueError(f"Dividing {json_file} into {output_dir} would overwrite it. Choose another folder.")
    num_val = min(max(round(val_fraction * len(ids)), 1), len(ids) - 1)
    in_val = set(random.Random(seed).sample(ids, num_val))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        images = [image for image in dataset["images"] if (image["id"] in in_val) == (name == "val")]
        kept = {image["id"] for image in images}
        annotations = [anno for anno in dataset["annotations"] if anno["image_id"] in kept]
        with open_atomically(path, "w", encoding="utf-8") as file:
            json.dump({**dataset, "images": images, "annotations": annotations}, file)
    return str(paths["train"]), str(paths["val"])
