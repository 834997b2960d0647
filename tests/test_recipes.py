"""The recipes of docs/extending.md, followed to the letter: each makes a model that trains, and is evaluated."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.evaluation import summarize

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"\*\*An? (.+?)\*\*.*?```python\n(.*?)```", TEXT, flags=re.S))


def test_there_is_a_recipe_for_each():
    assert list(RECIPES) == ["mask head", "backbone", "dataset", "metric"]


def follow(name, cfg):
    """Execute a recipe, train for two iterations, evaluate; return the trainer and the results."""
    exec(RECIPES[name], {"cfg": cfg, "__name__": __name__})
    trainer = MNCTrainer(cfg)
    return trainer, trainer.train()


@pytest.fixture
def cfg(small_config, coco_dataset, clean_catalogs, tmp_path, monkeypatch):
    """A config that a test can afford, of a dataset of two images; the current folder has the image of a recipe."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save("triangle.png")
    register_coco_dataset("drawn", *coco_dataset)
    cfg = small_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("drawn",)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 1, 0
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    return cfg


def test_a_mask_head(cfg):
    trainer, results = follow("mask head", cfg)
    head = trainer.model.roi_heads.passes[0].mask_head
    assert type(head).__name__ == "UpsampleMaskHead"
    assert "AP" in results["segm"]


def test_a_backbone(cfg):
    trainer, results = follow("backbone", cfg)
    assert type(trainer.model.backbone).__name__ == "OneLayer"
    assert trainer.model.roi_heads.pooler.pooler.scales == [1 / 8]
    assert "AP" in results["segm"]


def test_a_dataset(cfg):
    trainer, results = follow("dataset", cfg)
    assert trainer.model.roi_heads.num_classes == 1
    assert MetadataCatalog.get("triangles").thing_classes == ["triangle"]
    assert "AP" in results["segm"]


def test_a_metric(cfg, tmp_path):
    _, results = follow("metric", cfg)
    count = results["detections"]["per image"]
    assert count > 0 and "AP" in results["segm"]
    (line,) = [x for x in summarize(cfg, results, "model_final.pth").splitlines() if "detections" in x]
    assert float(line.split()[-1]) == pytest.approx(count, abs=0.051)
    logged = [json.loads(x) for x in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert logged[-1]["detections/per image"] == count
