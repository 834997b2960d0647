"""Training and evaluation of MNC with Detectron2's default trainer."""

from __future__ import annotations

import os

import torch
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping

from .checkpoint import MNCCheckpointer
from .data import MNCDatasetMapper
from .evaluation import PredictionPictures


class MNCTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with MNC's dataset mapper, COCO evaluation and pictures of predictions."""

    def build_hooks(self) -> list[HookBase]:
        # Detectron2's trainer has no method that builds its checkpointer. The hooks are the first to use it.
        self.checkpointer = MNCCheckpointer(self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables)
        return super().build_hooks()

    def train(self) -> dict:
        """Train; return the results of the evaluation at the end."""
        super().train()
        return getattr(self, "_last_eval_results", {})

    @classmethod
    def build_optimizer(cls, cfg, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build Detectron2's SGD, or AdamW with its parameter groups, as SOLVER.OPTIMIZER says."""
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "ADAMW":
            raise ValueError(f'SOLVER.OPTIMIZER must be "SGD" or "ADAMW", got {cfg.SOLVER.OPTIMIZER!r}')
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR))

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=MNCDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=MNCDatasetMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluators:
        """Evaluate with COCO's metrics into ``output_folder`` (OUTPUT_DIR/inference/<dataset>)."""
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        # COCOEvaluator cannot score masks against ground truth that lacks some.
        tasks = None if metadata.get("has_all_masks", True) else ("bbox",)
        coco = COCOEvaluator(
            dataset_name,
            tasks=tasks,
            output_dir=output_folder,
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            # A dataset of the same name may have changed since its conversion was cached.
            allow_cached_coco=False,
        )
        evaluators = [coco]
        if cfg.TEST.NUM_PICTURES > 0:
            evaluators.append(
                PredictionPictures(dataset_name, os.path.join(output_folder, "pictures"), cfg.TEST.NUM_PICTURES)
            )
        return DatasetEvaluators(evaluators)
