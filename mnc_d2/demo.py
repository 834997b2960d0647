"""Pictures of what a model finds in images.

    python -m mnc_d2.demo --config-file CONFIG --input IMAGES... --output FOLDER MODEL.WEIGHTS MODEL.pth

CONFIG is a file, or the name of one of this project's configs, such as "quickstart/mnc_R_18_FPN.yaml". KEY VALUE pairs
at the end override it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image
from tqdm import tqdm

from .data.images import IMAGE_SUFFIXES, read_image
from .engine import check_device
from .files import open_atomically
from .model_zoo import load_config
from .predictor import MNCPredictor


def list_images(inputs: Sequence[str], output: str) -> dict[str, str]:
    """Return the path of the picture of each image file, by the path of the image.

    Args:
        inputs: image files, and folders: the images in a folder, by name, take its place.
        output: the folder of the pictures.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no image.
        ValueError: two pictures would have the same name, or one would overwrite an image.
    """
    paths = []
    for path in inputs:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES))
            if not names:
                raise FileNotFoundError(f"The folder {path} has no image ({', '.join(IMAGE_SUFFIXES)}).")
            paths += [os.path.join(path, name) for name in names]
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise FileNotFoundError(f"The image or folder {path} does not exist.")
    by_picture, images = {}, {os.path.realpath(path) for path in paths}
    for path in paths:
        picture = os.path.join(output, os.path.splitext(os.path.basename(path))[0] + ".png")
        other = by_picture.setdefault(picture, path)
        if other != path:
            raise ValueError(f"The pictures of {other} and {path} would have the same name. Run them one by one.")
        if os.path.realpath(picture) in images:
            raise ValueError(f"The picture {picture} would overwrite an image. Choose another folder for the pictures.")
    return {path: picture for picture, path in by_picture.items()}


def build_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    """Return the config of the demo.

    Raises:
        FileNotFoundError: there is no such config, or MODEL.WEIGHTS do not exist.
        ValueError: the file or an override is wrong, there are no MODEL.WEIGHTS, or the machine has no MODEL.DEVICE.
    """
    cfg = load_config(config_file, overrides)
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError("The model has no weights: add MODEL.WEIGHTS and their path.")
    if "://" not in weights and not os.path.isfile(weights):
        raise FileNotFoundError(f"The checkpoint MODEL.WEIGHTS {weights} does not exist.")
    check_device(cfg, num_local_processes=1)
    return cfg


def draw(image, instances: Instances, metadata) -> Image.Image:
    """Draw instances into an image, uint8 (H, W, 3) in BGR order."""
    visualizer = Visualizer(image[:, :, ::-1], metadata, instance_mode=ColorMode.IMAGE)
    return Image.fromarray(visualizer.draw_instance_predictions(instances.to("cpu")).get_image())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with the input ends it with one sentence."""
    parser = argparse.ArgumentParser(description="Draw what a model finds in images.")
    parser.add_argument("--config-file", required=True, help="a file, or the name of one of this project's configs")
    parser.add_argument("--input", nargs="+", required=True, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures go, as <name>.png")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="of the instances that are drawn")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(arguments)
    try:
        pictures = list_images(args.input, args.output)
        cfg = build_config(args.config_file, args.opts)
        for name in ("fvcore", "mnc_d2"):  # both say what of the model the checkpoint lacks
            setup_logger(name=name)
        predictor = MNCPredictor(cfg)
        os.makedirs(args.output, exist_ok=True)
        for path, picture in tqdm(pictures.items()):
            _write_picture(path, picture, args.score_threshold, predictor)
    except (OSError, ValueError) as error:
        sys.exit(f"mnc_d2.demo: {error}")


def _write_picture(path: str, target: str, score_threshold: float, predictor: MNCPredictor) -> None:
    image = read_image(path, "BGR")
    instances = predictor(image)["instances"]
    picture = draw(image, instances[instances.scores >= score_threshold], getattr(predictor, "metadata", None))
    with open_atomically(target) as file:
        picture.save(file, format="PNG")


if __name__ == "__main__":
    main()
