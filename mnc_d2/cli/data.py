"""Check annotations, count and split them, and see what training makes of them.

Annotations that cannot be trained on are named. With --split, images are divided into train.json and val.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from PIL import Image
from tabulate import tabulate

from ..data import MNCDatasetMapper
from ..data.coco import read_coco_file
from ..files import open_atomically
from ..model_zoo import load_config
from ..visualizer import InstanceVisualizer
from .common import add_images_argument, register_split

EXAMPLE = """  mnc data nuclei/annotations.json --split 0.2 --output nuclei/
  mnc data nuclei/train.json --augmentations 8 --output pictures/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file in COCO format")
    add_images_argument(parser)
    parser.add_argument("--split", type=float, metavar="SHARE", help="of the images that go into val.json")
    parser.add_argument("--augmentations", type=int, metavar="N", help="pictures of images as training sees them")
    parser.add_argument("--config", default="quickstart/mnc_efficientnet_lite0_FPN.yaml", help="of these augmentations")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the augmentations")
    parser.add_argument("--output", metavar="FOLDER", help="for the split and the pictures")


def run(args: argparse.Namespace) -> None:
    """Check, count, split and draw."""
    if (args.split is not None or args.augmentations) and not args.output:
        raise ValueError("Add --output and a folder for the files.")
    name = register_split(args.data, "train", args.images)
    if name is None:
        raise FileNotFoundError(f"{args.data} has no annotations of a training set, such as train.json.")
    print(count(name))
    if args.output:
        os.makedirs(args.output, exist_ok=True)
    if args.split is not None:
        for part, images in split(args.data, args.output, args.split, args.seed).items():
            print(f"{part}: {images} images")
    if args.augmentations:
        draw_augmentations(name, args.config, args.augmentations, args.seed, args.output)
        print(f"{args.output}: pictures of {args.augmentations} images as training sees them")


def count(name: str) -> str:
    """Return a table of the instances of each class of a registered dataset."""
    records, classes = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
    annotations = [anno for record in records for anno in record["annotations"]]
    instances = Counter(anno["category_id"] for anno in annotations if not anno.get("iscrowd", 0))
    images = Counter(i for record in records for i in {anno["category_id"] for anno in record["annotations"]})
    rows = [(label, instances[i], images[i]) for i, label in enumerate(classes)]
    rows.append(("all", sum(instances.values()), sum(bool(record["annotations"]) for record in records)))
    boxes = sum(not anno.get("segmentation") for anno in annotations)
    crowds = sum(bool(anno.get("iscrowd", 0)) for anno in annotations)
    text = tabulate(rows, headers=["class", "instances", "images with some"])
    return f"{text}\n{len(records)} images; {crowds} crowd regions; {boxes} annotations with a box and no mask"


def split(file: str, output: str, share: float, seed: int) -> dict[str, int]:
    """Write train.json and val.json, with the images of a file divided at random.

    Returns:
        the number of images by path.

    Raises:
        ValueError: a part would be empty.
    """
    dataset = read_coco_file(file)
    order = np.random.default_rng(seed).permutation(len(dataset["images"]))
    number = round(share * len(order))
    if not 0 < number < len(order):
        raise ValueError(f"--split {share:g} of {len(order)} images leaves a part empty.")
    written = {}
    for part, rows in (("train", order[number:]), ("val", order[:number])):
        images = [dataset["images"][i] for i in sorted(rows)]
        ids = {image["id"] for image in images}
        annotations = [anno for anno in dataset["annotations"] if anno["image_id"] in ids]
        path = os.path.join(output, f"{part}.json")
        with open_atomically(path, "w", encoding="utf-8") as target:
            json.dump({**dataset, "images": images, "annotations": annotations}, target)
        written[path] = len(images)
    return written


def draw_augmentations(name: str, config: str, number: int, seed: int, output: str) -> None:
    """Draw the first images of a dataset, with their instances, as a training by a config would see them."""
    seed_all_rng(seed)
    cfg, metadata = load_config(config), MetadataCatalog.get(name)
    mapper = MNCDatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get(name)[:number]:
        result = mapper(record)
        image = result["image"].permute(1, 2, 0).to(torch.uint8).numpy()
        instances = result["instances"]
        visualizer = InstanceVisualizer(image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1], metadata)
        labels = [metadata.thing_classes[i] for i in instances.gt_classes]
        visualizer.overlay_instances(boxes=instances.gt_boxes, masks=instances.gt_masks, labels=labels)
        path = os.path.join(output, os.path.splitext(os.path.basename(record["file_name"]))[0] + "_augmented.png")
        with open_atomically(path) as file:
            Image.fromarray(visualizer.output.get_image()).save(file, format="PNG")
