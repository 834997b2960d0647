"""Predictions on images, by a model from one file."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN, build_model

from .acceleration import accelerate
from .checkpoint import CompleteCheckpointer, ModelDescription, read_description
from .config import check_model, inference_dtype
from .data import build_test_resize
from .engine import check_device
from .model_zoo import load_config, merge_overrides, parse_config


class MNCPredictor(DefaultPredictor):
    """Detectron2's ``DefaultPredictor`` with an accelerated model, and the resizing that INPUT asks for.

    Called with an image, uint8 (H, W, 3) in BGR order, it returns what the model does: a dict with "instances".

    Attributes:
        cfg: the config of the model.
        model: the model, in eval mode, accelerated in the precision MODEL.MNC.INFERENCE_PRECISION: a snapshot, see
            :func:`~mnc_d2.acceleration.accelerate`.
        metadata: names and colours of the classes, for Detectron2's visualizers.
        input_format: of the images that it takes, "BGR". ``DefaultPredictor`` has the model's here, which clients that
            convert images by it (sahi) give RGB to: colours that the model then takes for others.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the config of the model; MODEL.WEIGHTS are loaded. ``metadata`` is that of the first of DATASETS.TEST.

        Raises:
            ValueError: INPUT.FORMAT is neither "RGB" nor "BGR"; there is no such precision; or the weights do not fit
                the model, all of it, or are not finite.
        """
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f'INPUT.FORMAT must be "RGB" or "BGR", got {cfg.INPUT.FORMAT!r}')
        # In place of DefaultPredictor's own __init__, which makes both differently.
        self.cfg = cfg.clone()
        self.model = accelerate(load_model(self.cfg), inference_dtype(cfg))
        self.aug = build_test_resize(cfg)
        self.input_format = "BGR"
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])

    def __call__(self, original_image: np.ndarray) -> dict:
        """Return the output of the model for an image, uint8 (H, W, 3) in BGR order."""
        (output,) = self.predict_batch([original_image])
        return output

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[dict]:
        """Return the outputs of the model for images, uint8 (H, W, 3) each, in BGR order, as one batch."""
        with torch.no_grad():
            return self.model([self._to_input(image) for image in images])

    def _to_input(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        if self.cfg.INPUT.FORMAT == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1)).to(self.cfg.MODEL.DEVICE)
        return {"image": tensor, "height": height, "width": width}


def load_model(cfg: CfgNode) -> GeneralizedRCNN:
    """Build the model of a config, in eval mode, and load MODEL.WEIGHTS into all of it.

    Raises:
        ValueError: the weights do not fit the model, all of it, or are not finite.
    """
    model = build_model(cfg).eval()
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def load_predictor(
    path: str | os.PathLike, *, device: str | None = None, config: str | None = None, overrides: Sequence[str] = ()
) -> MNCPredictor:
    """Make a predictor of a trained model, from one file.

    Config and classes are what the checkpoint says of itself; one of an earlier version, which says nothing, has its
    ``config.yaml`` beside it.

    Args:
        path: the checkpoint, such as ``model_final.pth``.
        device: as PyTorch names it, such as "cpu"; None for the GPU, where there is one.
        config: the config of a checkpoint that has none, as :func:`~mnc_d2.model_zoo.load_config` takes it.
        overrides: KEY VALUE pairs of the config.

    Returns:
        a predictor whose ``metadata`` has the names of the classes.

    Raises:
        FileNotFoundError: there is no such file, or it does not say what model it is of.
        ValueError: the file is not a checkpoint, does not fit the model, or has weights that are not finite; there is
            no such device; or an override is wrong.
    """
    cfg, description = load_model_config(path, device=device, config=config, overrides=overrides)
    predictor = MNCPredictor(cfg)
    predictor.metadata = description.metadata(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return predictor


def load_model_config(
    path: str | os.PathLike, *, device: str | None = None, config: str | None = None, overrides: Sequence[str] = ()
) -> tuple[CfgNode, ModelDescription]:
    """Return the config of a trained model, to be used on this machine, and what its checkpoint says of it.

    The config has the checkpoint as MODEL.WEIGHTS, and no datasets. Arguments and errors are those of
    :func:`load_predictor`.
    """
    path = os.fspath(path)
    if config is None:
        description = read_description(path)
        cfg = parse_config(description.config, f"the config in {path}")
    else:
        cfg = load_config(config)
        description = ModelDescription.of_config(cfg)
    cfg.MODEL.WEIGHTS = path
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    merge_overrides(cfg, overrides)
    check_device(cfg, num_local_processes=1)
    try:
        check_model(cfg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cfg, description
