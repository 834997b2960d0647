"""Check annotations, count and split them, bring them to COCO format, and see what training makes of them.

Annotations that cannot be trained on are named. Folders of YOLO, labelme and Pascal VOC are converted, into a COCO file
in --output. With --split, images are divided into train.json and val.json.
"""

from __future__ import annotations

import argparse
import os

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from PIL import Image

from ..data import MNCDatasetMapper, convert_dataset, describe_dataset, register_coco_dataset, split_dataset
from ..files import open_atomically
from ..model_zoo import load_config
from ..visualizer import InstanceVisualizer
from .common import add_images_argument, dataset_name, find_images

EXAMPLE = """  mnc data nuclei/annotations.json --split 0.2 --output nuclei/
  mnc data yolo/data.yaml --subset train --subset val --output converted/
  mnc data nuclei/train.json --augmentations 8 --output pictures/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a COCO file, YOLO's data.yaml, or a folder of any of the formats")
    add_images_argument(parser)
    parser.add_argument(
        "--subset", action="append", metavar="NAME", help="a part of the data, such as train; repeatable"
    )
    parser.add_argument("--split", type=float, metavar="SHARE", help="of the images that go into val.json")
    parser.add_argument("--augmentations", type=int, metavar="N", help="pictures of images as training sees them")
    parser.add_argument("--config", default="quickstart/mnc_efficientnet_lite0_FPN.yaml", help="of these augmentations")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the augmentations")
    parser.add_argument("--output", metavar="FOLDER", help="for converted files, the split and the pictures")


def run(args: argparse.Namespace) -> None:
    """Convert, check, count, split and draw."""
    is_coco = args.data.endswith(".json")
    if (not is_coco or args.split is not None or args.augmentations) and not args.output:
        raise ValueError("Add --output and a folder for the files.")
    if args.split is not None and args.subset and len(args.subset) > 1:
        raise ValueError("--split divides one set: leave out --subset, or name one.")
    if args.augmentations is not None and args.augmentations < 1:
        raise ValueError(f"--augmentations must be at least 1, got {args.augmentations}.")
    for subset in args.subset or [None]:
        images = args.images or (find_images(args.data) if is_coco and os.path.isfile(args.data) else None)
        file, images = convert_dataset(args.data, args.output or "", image_root=images, subset=subset)
        print(f"{file}: images in {images}")
        print(describe_dataset(file, images))
        if args.split is not None:
            written = split_dataset(file, args.output, val_fraction=args.split, seed=args.seed, image_root=images)
            print("divided into", " and ".join(written))
        if args.augmentations:
            name = dataset_name(file)
            register_coco_dataset(name, file, images, check_files=False)
            os.makedirs(args.output, exist_ok=True)
            draw_augmentations(name, args.config, args.augmentations, args.seed, args.output)
            print(f"{args.output}: pictures of {args.augmentations} images as training sees them")


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
