"""Training and evaluation of MNC with Detectron2's default trainer, on GPUs and CPUs, in one process or many."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluators, inference_context
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from fvcore.common.history_buffer import HistoryBuffer
from torch.nn.parallel import DistributedDataParallel

from ..acceleration import accelerate
from ..checkpoint import DescribeModel, MNCCheckpointer
from ..config import inference_dtype
from ..data import build_mapper
from ..data.train_loader import TrainLoader, build_train_loader
from ..evaluation import build_evaluator
from ..modeling import MultitaskNetworkCascade
from ..randomness import STEP, seed_all
from .hooks import CheckpointHook, MetricsFile, put_scalars, scalars_of
from .step import AccumulatingTrainer, autocast_dtype, check_solver
from .watching import KeepBest, RecordFinalMetrics, StopEarly, TrainingEnds


class MNCTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with MNC's dataset mapper, evaluators and pictures of predictions.

    It also trains in several processes on CPUs, in mixed precision on CPUs, and with several batches to an optimizer
    step (``SOLVER.ACCUMULATE``). A training that is resumed goes on as if it had not been stopped: its images, what is
    drawn at random for them and for each step, and its metrics are those that would have come; docs/robustness.md says
    how far that goes.

    Attributes:
        cfg: the config; SEED is that of the run, also where none was given.
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
        self.cfg = cfg = _with_seed(cfg, cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        takes_loss_scale = isinstance(model, MultitaskNetworkCascade)
        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            num_batches=cfg.SOLVER.ACCUMULATE,
            precision=autocast_dtype(cfg),
            max_skipped=cfg.SOLVER.MAX_SKIPPED_STEPS,
            takes_loss_scale=takes_loss_scale,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = MNCCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), description=DescribeModel(cfg)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._metrics_file: MetricsFile | None = None
        self._resumed: dict | None = None
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks, with this project's checkpoints, and hooks that watch."""
        built = [x for x in super().build_hooks() if not isinstance(x, hooks.PeriodicCheckpointer)]
        solver = self.cfg.SOLVER
        self._checkpoints = CheckpointHook(self.checkpointer, solver.CHECKPOINT_PERIOD, keep=solver.MAX_CHECKPOINTS)
        # Where Detectron2's are: a failing evaluation finds the model saved.
        before_evaluation = [isinstance(x, hooks.EvalHook) for x in built].index(True)
        built.insert(before_evaluation, self._checkpoints)
        return [*built, *self._build_watching_hooks()]

    def _build_watching_hooks(self) -> list[HookBase]:
        """Build the hooks that follow an evaluation: they are behind it."""
        period, metric, patience = self.cfg.TEST.EVAL_PERIOD, self.cfg.TEST.BEST_METRIC, self.cfg.SOLVER.PATIENCE
        watching = []
        if comm.is_main_process():
            watching.append(RecordFinalMetrics())
            if period > 0 and metric:
                watching.append(KeepBest(period, self.checkpointer, metric))
        if period > 0 and patience > 0:
            watching.append(StopEarly(period, patience, metric))
        return watching

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers."""
        os.makedirs(self.cfg.OUTPUT_DIR, exist_ok=True)
        self._metrics_file = MetricsFile(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        return [CommonMetricPrinter(self.max_iter), self._metrics_file, TensorboardXWriter(self.cfg.OUTPUT_DIR)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint of OUTPUT_DIR, or, without ``resume`` or any, load MODEL.WEIGHTS."""
        self.iter = -1
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.start_iter = self.iter + 1
        if resume and self.start_iter == 0 and self._metrics_file is not None:
            self._metrics_file.load_state_dict({"size": 0, "last_write": -1})

    def train(self) -> dict:
        """Train; return the results of the last evaluation."""
        self._exception_before = sys.exc_info()[1]
        try:
            with suppress(TrainingEnds):
                super().train()
        finally:
            self._checkpoints.restore_handlers()
        return getattr(self, "_last_eval_results", {})

    def before_train(self) -> None:
        # Detectron2 keeps a million values of each scalar and looks at the last thousand at most.
        self.storage.histories().default_factory = partial(HistoryBuffer, max_length=1000)
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE
        super().before_train()
        if self._resumed is not None:
            self._finish_iteration(self._resumed)

    def _finish_iteration(self, state: dict) -> None:
        """Do what was still to do in the last iteration when its checkpoint was saved, which may not have been done.

        Args:
            state: what :meth:`state_dict` returned.
        """
        put_scalars(self.storage, state["scalars"])
        prolonged = state["max_iter"] == self.start_iter < self.max_iter
        if self._metrics_file is not None:
            whole = {"size": sys.maxsize, "last_write": self.start_iter - 1}
            self._metrics_file.load_state_dict(whole if prolonged else state["metrics_file"])
        if prolonged:
            return  # all of it was done
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks[self._hooks.index(self._checkpoints) + 1 :]:
            hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        """Run one iteration.

        Raises:
            FloatingPointError: a loss is not finite, or another number that SOLVER.MAX_SKIPPED_STEPS looks at; the
                weights are those of before.
        """
        seed_all(STEP, self.cfg.SEED, self.iter, comm.get_rank())
        with self._explained_divergence():
            super().run_step()

    def after_step(self) -> None:
        with self._explained_divergence():  # a model that is not finite is not saved
            super().after_step()

    @contextmanager
    def _explained_divergence(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            losses = {k: v for k, (v, _) in self.storage.latest().items() if "loss" in k}
            last = self.checkpointer.get_checkpoint_file()
            raise FloatingPointError(
                f"The training diverged in iteration {self.iter}: {' '.join(str(error).split())} "
                f"The learning rate was {max(group['lr'] for group in self.optimizer.param_groups):g}, "
                f"the last finite losses {losses}. "
                + (f"The last good checkpoint is {last}." if last else "There is no checkpoint yet.")
            ) from None

    def after_train(self) -> None:
        if sys.exc_info()[1] is not self._exception_before:
            # Whatever ended the training, it is no reason to evaluate, as Detectron2 would after the last iteration.
            self._hooks[:] = [x for x in self._hooks if not isinstance(x, hooks.EvalHook)]
        self.iter = min(self.iter, self.max_iter)  # one more where a resume found nothing left to train
        super().after_train()

    def state_dict(self) -> dict:
        state = {**super().state_dict(), "seed": self.cfg.SEED, "max_iter": self.max_iter}
        if self._metrics_file is not None and hasattr(self, "storage"):
            state.update(scalars=scalars_of(self.storage), metrics_file=self._metrics_file.state_dict())
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        seed = state_dict.get("seed", self.cfg.SEED)
        if seed != self.cfg.SEED:
            self.cfg = _with_seed(self.cfg, seed)
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))
        if "scalars" in state_dict:
            self._resumed = state_dict

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
            lr_factor_func=lambda name: (
                cfg.SOLVER.BACKBONE_LR_FACTOR if name.startswith("backbone.bottom_up.") else 1.0
            ),
        )
        # Fused: a quarter of the time on a CPU, where it is a twentieth of a step of a small model.
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR, fused=True))

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, is_train=False))

    @classmethod
    def test(cls, cfg, model: torch.nn.Module, evaluators=None) -> dict:
        """As ``DefaultTrainer.test``, by an accelerated copy with the weights that the model has now."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        with inference_context(model):
            accelerated = accelerate(model, inference_dtype(cfg))
        return super().test(cfg, accelerated, evaluators)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluators:
        """Evaluate as :func:`mnc_d2.evaluation.build_evaluator` says, into OUTPUT_DIR/inference/<dataset>."""
        return build_evaluator(
            cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        )


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    if cfg.SEED == seed:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    if frozen:
        cfg.freeze()
    return cfg
