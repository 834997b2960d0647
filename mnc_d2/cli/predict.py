"""Find instances in images and videos.

Writes a picture of each image, a video in mp4 of each video, and all instances to predictions.json, in COCO format with
masks and scores. Files that cannot be read are listed at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from ..data import ImageError, read_image
from ..evaluation.coco_output import CocoOutput
from ..files import open_atomically
from ..predictor import MNCPredictor, load_predictor
from ..visualizer import draw_predictions
from .common import add_model_arguments, add_overrides, overrides
from .inputs import is_video, list_inputs

EXAMPLE = "  mnc predict output/nuclei/model_best.pth photographs/ clip.mp4 --output predictions/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("input", nargs="+", metavar="IMAGE", help="images, videos, or folders of them")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for pictures and predictions.json")
    parser.add_argument(
        "--score", type=float, default=0.5, help="of the instances that count, at least; 0.5 by default"
    )
    parser.add_argument("--batch", type=int, default=1, help="images at a time, where they have the same size")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Predict; exit with status 1 if a file could not be read, after all others."""
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}.")
    pictures = list_inputs(args.input, args.output)
    predictor = load_predictor(args.model, device=args.device, config=args.config, overrides=overrides(args))
    os.makedirs(args.output, exist_ok=True)
    run = _Run(predictor, args.score, args.batch)
    images = [path for path in pictures if not is_video(path)]
    for batch in _batches(run.read(tqdm(images, unit=" images", disable=None if images else True)), args.batch):
        for (path, image), instances in zip(batch, run.predict([image for _, image in batch])):
            run.output.add(path, instances)
            picture = Image.fromarray(run.draw(image, instances))
            with open_atomically(pictures[path]) as file:
                picture.save(file, format="PNG")
    for path in pictures:
        if is_video(path):
            run.predict_video(path, pictures[path])
    target = os.path.join(args.output, "predictions.json")
    run.output.write(target)
    print(f"{run.output.summary()}: {target}, and a picture of each beside it.")
    if run.failed:
        sys.exit("\n".join(["These files cannot be read:", *(f"  {path}: {why}" for path, why in run.failed.items())]))


class _Run:
    """What predictions of one command share."""

    def __init__(self, predictor: MNCPredictor, score: float, batch: int) -> None:
        self.predictor = predictor
        self.score = score
        self.batch = batch
        self.output = CocoOutput(predictor.metadata)
        self.failed: dict[str, str] = {}  # why, by path

    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Read images, (H, W, 3), BGR; note those that cannot be read."""
        for path in paths:
            try:
                image = read_image(path, "BGR")
            except ImageError as error:
                self.failed[path] = str(error)
                continue
            yield path, image

    def predict(self, images: list[np.ndarray]) -> list[Instances]:
        """Return the instances of images of one size that have the score, on the CPU."""
        found = (output["instances"].to("cpu") for output in self.predictor.predict_batch(images))
        return [instances[instances.scores >= self.score] for instances in found]

    def draw(self, image: np.ndarray, instances: Instances) -> np.ndarray:
        """Return the picture, RGB, of an image, BGR."""
        return draw_predictions(image[:, :, ::-1], instances, self.predictor.metadata)

    def predict_video(self, path: str, target: str) -> None:
        """Predict on the frames of a video; the mp4 appears when it is complete."""
        capture = cv2.VideoCapture(path)
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        temporary = f"{target}.partial.mp4"
        frames = tqdm(_frames(capture), os.path.basename(path), total or None, unit=" frames", disable=None)
        writer, index = None, 0
        try:
            for batch in _batches(((path, frame) for frame in frames), self.batch):
                images = [frame for _, frame in batch]
                for frame, instances in zip(images, self.predict(images)):
                    self.output.add(path, instances, frame=index)
                    picture = self.draw(frame, instances)
                    if writer is None:
                        writer = _open_writer(temporary, capture.get(cv2.CAP_PROP_FPS), picture.shape)
                    writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
                    index += 1
        finally:
            capture.release()
            if writer is not None:
                writer.release()
        if writer is None:
            self.failed[path] = "OpenCV finds no frame in it"
        else:
            os.replace(temporary, target)


def _batches(images: Iterable[tuple[str, np.ndarray]], size: int) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Group images that follow one another: padding several sizes to one would change their results."""
    for _, same in groupby(images, key=lambda pair: pair[1].shape):
        while batch := list(islice(same, size)):
            yield batch


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield frame


def _open_writer(path: str, rate: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), rate or 25.0, (shape[1], shape[0]))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}.")
    return writer
