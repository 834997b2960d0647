"""Predictions on single images."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from .checkpoint import MNCCheckpointer
from .data import build_test_resize


class MNCPredictor(DefaultPredictor):
    """Detectron2's ``DefaultPredictor`` with the resizing that INPUT asks for and weights that cannot run code.

    Called with an image, uint8 (H, W, 3) in BGR order, it returns what the model does: a dict with "instances".
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the config of the model; MODEL.WEIGHTS are loaded.

        Raises:
            ValueError: INPUT.FORMAT is neither "RGB" nor "BGR".
        """
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f'INPUT.FORMAT must be "RGB" or "BGR", got {cfg.INPUT.FORMAT!r}')
        # In place of DefaultPredictor's own __init__, which makes both differently.
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        MNCCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.aug = build_test_resize(cfg)
        self.input_format = cfg.INPUT.FORMAT
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
