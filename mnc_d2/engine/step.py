"""One iteration of training: several batches to a step of the optimizer, mixed precision, limits under a loss scale."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

from ..layers import HALF_PRECISIONS
from ..modeling import CausalGradients


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
            with self._no_sync() if index + 1 < self.num_batches else nullcontext():
                with torch.autocast(self.device_type, dtype=self.precision, enabled=self.precision is not None):
                    losses = self.model(data)
                self.grad_scaler.scale(sum(losses.values())).backward()
            batches.append({name: loss.detach() for name, loss in losses.items()})
        self._average_gradients()
        self.after_backward()
        means = [torch.stack([losses[name] for losses in batches]).mean() for name in batches[0]]
        # Read all at once, for each reading waits for a GPU. Raises FloatingPointError before the optimizer has seen a
        # loss that is not finite.
        self.write_metrics(dict(zip(batches[0], torch.stack(means).cpu())), data_time, self.iter)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _no_sync(self):
        """Return a context in which gradients stay in this process: it is enough to average the sums of all batches."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

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
