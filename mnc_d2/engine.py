"""Training and evaluation of MNC with Detectron2's default trainer, on GPUs and CPUs, in one process or many."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
import weakref

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import DescribeModel, MNCCheckpointer
from .data import MNCDatasetMapper
from .evaluation import build_evaluator
from .hooks import KeepBest, RecordFinalMetrics, StopEarly, TrainingEnds
from .layers import HALF_PRECISIONS
from .modeling import CausalGradients


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
        self.checkpointer = MNCCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), description=DescribeModel(cfg)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks, that for the clipping of gradients under a loss scale, and those that watch."""
        return [
            ScaleGradientClip(self._trainer.grad_scaler, self.model),
            *super().build_hooks(),
            *self._build_watching_hooks(),
        ]

    def _build_watching_hooks(self) -> list[HookBase]:
        """Build the hooks that follow an evaluation: they are behind it."""
        period, metric, patience = self.cfg.TEST.EVAL_PERIOD, self.cfg.TEST.BEST_METRIC, self.cfg.SOLVER.PATIENCE
        hooks = []
        if comm.is_main_process():
            hooks.append(RecordFinalMetrics())
            if period > 0 and metric:
                hooks.append(KeepBest(period, self.checkpointer, metric))
        if period > 0 and patience > 0:
            hooks.append(StopEarly(period, patience, metric))
        return hooks

    def train(self) -> dict:
        """Train; return the results of the last evaluation."""
        with contextlib.suppress(TrainingEnds):
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


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, with several batches to an iteration, on any device.

    An iteration is one step of the optimizer, with the mean of the gradients of ``num_batches`` batches. The losses
    that are logged are the means over these batches too.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        num_batches: int = 1,
        precision: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: from a batch to a dict of scalar losses; on one device.
            data_loader: an iterable of batches.
            optimizer: steps the parameters of ``model``.
            num_batches: batches to an iteration.
            precision: dtype for autocast, ``torch.float16`` with a ``GradScaler``; None for no autocast.
        """
        super().__init__(model, data_loader, optimizer)
        self.num_batches = num_batches
        self.precision = precision
        self.device_type = next(model.parameters()).device.type
        # A scaler that is not enabled passes losses and steps on as they are.
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)

    def run_step(self) -> None:
        """Run one iteration."""
        if not self.model.training:
            raise RuntimeError("The model was changed to eval mode.")
        self.optimizer.zero_grad()
        data_time, batches = 0.0, []
        for index in range(self.num_batches):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._no_sync() if index + 1 < self.num_batches else contextlib.nullcontext():
                with torch.autocast(self.device_type, dtype=self.precision, enabled=self.precision is not None):
                    losses = self.model(data)
                self.grad_scaler.scale(sum(losses.values())).backward()
            batches.append({name: loss.detach() for name, loss in losses.items()})
        self._average_gradients()
        self.after_backward()
        means = {name: torch.stack([losses[name] for losses in batches]).mean() for name in batches[0]}
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _no_sync(self):
        """Return a context in which gradients stay in this process: it is enough to average the sums of all batches."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _average_gradients(self) -> None:
        # The sum of the gradients is divided, not each loss: clipping within the backward pass (of the causal
        # gradients, see MODEL.MNC.DELTA_GRADIENT_CLIP) then meets gradients of the size that one batch has, as in the
        # authors' training and as in that of several processes.
        if self.num_batches > 1:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= self.num_batches

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # absent or empty if that run had no loss scale
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class ScaleGradientClip(HookBase):
    """Multiply the limits of the causal gradients by the loss scale, like the gradients that they clip.

    Without it the limit of 1/512 would be, under the scale of 65536 that a ``GradScaler`` starts with, one of 3e-8.
    """

    def __init__(self, grad_scaler: torch.amp.GradScaler, model: torch.nn.Module) -> None:
        """
        Args:
            grad_scaler: enabled or not.
            model: its modules whose ``gradients`` are :class:`~mnc_d2.modeling.CausalGradients` are concerned.
        """
        self._grad_scaler = grad_scaler
        gradients = (getattr(x, "gradients", None) for x in model.modules())
        self._limits = [(x, x.delta_gradient_clip) for x in gradients if isinstance(x, CausalGradients)]

    def before_step(self) -> None:
        if self._grad_scaler.is_enabled():
            scale = self._grad_scaler.get_scale()
            for gradients, limit in self._limits:
                gradients.delta_gradient_clip = limit * scale


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Return the dtype that SOLVER.AMP asks for; None for no mixed precision."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    if cfg.SOLVER.AMP.PRECISION == "auto":
        return torch.bfloat16 if cfg.MODEL.DEVICE == "cpu" else torch.float16
    return HALF_PRECISIONS[cfg.SOLVER.AMP.PRECISION]


def check_solver(cfg: CfgNode, num_processes: int) -> None:
    """Check the keys that say how a step is computed.

    Args:
        cfg: the config of the run.
        num_processes: processes on all machines together.

    Raises:
        ValueError: a key is wrong; the message says which.
    """
    if cfg.SOLVER.ACCUMULATE < 1:
        raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, got {cfg.SOLVER.ACCUMULATE}.")
    if cfg.SOLVER.PATIENCE > 0 and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.TEST.BEST_METRIC):
        raise ValueError("SOLVER.PATIENCE counts evaluations: it needs TEST.EVAL_PERIOD and TEST.BEST_METRIC.")
    names = ["auto", *HALF_PRECISIONS]
    if cfg.SOLVER.AMP.PRECISION not in names:
        raise ValueError(f"SOLVER.AMP.PRECISION must be one of {names}, got {cfg.SOLVER.AMP.PRECISION!r}.")
    # With a reference world size, Detectron2 changes the number of images to fit the number of processes.
    if cfg.SOLVER.REFERENCE_WORLD_SIZE == 0 and cfg.SOLVER.IMS_PER_BATCH % max(num_processes, 1):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, for {num_processes} processes together. "
            "Give it a multiple of their number."
        )


def check_device(cfg: CfgNode, num_local_processes: int) -> None:
    """Check that the processes of this machine can have the device that the config names.

    Args:
        cfg: the config of the run.
        num_local_processes: processes on this machine.

    Raises:
        ValueError: they cannot; the message says why.
    """
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and num_gpus == 0:
        raise ValueError(f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}", but PyTorch finds no GPU on this machine.')
    if num_gpus == 0 or num_local_processes <= 1:
        return
    # Where there are GPUs the processes talk over NCCL, which knows no CPU tensors and one process a GPU.
    if cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "Several processes on a machine with GPUs run on these. To run them on the CPU, hide the GPUs: set "
            'CUDA_VISIBLE_DEVICES="" in the environment.'
        )
    if num_local_processes > num_gpus:
        raise ValueError(
            f"{num_local_processes} processes need as many GPUs; PyTorch finds {num_gpus} on this machine."
        )


def started_by_torchrun() -> bool:
    """Return whether the environment has what ``torchrun`` tells each of the processes that it starts."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names)


def join_torchrun() -> None:
    """Join the other processes that ``torchrun`` started, as Detectron2's ``launch`` does with those that it starts."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if on_gpu:
        # More processes than GPUs are an error, but for check_device to explain.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def leave_process_group() -> None:
    """Wait for the other processes, then part from them; nothing to do for a process on its own."""
    if dist.is_initialized():
        # A trainer and its hooks refer to each other: without this its DistributedDataParallel outlives the group.
        gc.collect()
        # Over gloo, which minds no processes that share a GPU, as those do that check_device refuses.
        comm.all_gather(None)
        # Detectron2 caches the group, which then survives its destruction, and so do gloo's threads: one that still
        # holds a tensor when Python shuts down ends the process by SIGABRT.
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()
