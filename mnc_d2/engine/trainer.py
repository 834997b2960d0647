"""Training and evaluation of MNC with Detectron2's default trainer, on GPUs and CPUs, in one process or many."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import MNCCheckpointer
from ..data import MNCDatasetMapper
from ..evaluation import build_evaluator
from .step import AccumulatingTrainer, ScaleGradientClip, autocast_dtype, check_solver


class MNCTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with MNC's dataset mapper, evaluators and pictures of predictions.

    It also trains in several processes on CPUs, in mixed precision on CPUs, and with several batches to an optimizer
    step (``SOLVER.ACCUMULATE``).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the config of the run.

        Raises:
            ValueError: a key of the solver is wrong; the message says which.
        """
        # DefaultTrainer's own __init__ would give DistributedDataParallel a GPU and choose between two trainers. What
        # follows makes the same parts, in the same order, through the same methods.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_solver(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._trainer = AccumulatingTrainer(
            model, data_loader, optimizer, num_batches=cfg.SOLVER.ACCUMULATE, precision=autocast_dtype(cfg)
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = MNCCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks and that for the clipping of gradients under a loss scale."""
        return [ScaleGradientClip(self._trainer.grad_scaler, self.model), *super().build_hooks()]

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
        """Evaluate as :func:`mnc_d2.evaluation.build_evaluator` says, into OUTPUT_DIR/inference/<dataset>."""
        return build_evaluator(
            cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        )
