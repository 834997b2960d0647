"""One iteration of training: several batches to a step of the optimizer, mixed precision, limits under a loss scale."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from ..layers import HALF_PRECISIONS

logger = logging.getLogger(__name__)


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, with several batches to an iteration, on any device.

    An iteration is one step of the optimizer, with the mean of the gradients of ``num_batches`` batches. The losses
    that are logged are the means over these batches too.

    Attributes:
        num_skipped: steps of the training so far that were not made, as ``max_skipped`` allows.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        num_batches: int = 1,
        precision: torch.dtype | None = None,
        max_skipped: int = 0,
        takes_loss_scale: bool = False,
    ) -> None:
        """
        Args:
            model: from a batch to a dict of scalar losses; on one device.
            data_loader: an iterable of batches.
            optimizer: steps the parameters of ``model``.
            num_batches: batches to an iteration.
            precision: dtype for autocast, ``torch.float16`` with a ``GradScaler``; None for no autocast.
            max_skipped: steps that may be left out of a training because a loss or a gradient is not finite. All
                processes leave out the same. 0 looks at losses only.
            takes_loss_scale: whether the model is called with ``loss_scale`` too, what losses are multiplied by.
        """
        super().__init__(model, data_loader, optimizer)
        self.num_batches = num_batches
        self.precision = precision
        self.max_skipped = max_skipped
        self.num_skipped = 0
        self.takes_loss_scale = takes_loss_scale
        self.device_type = next(model.parameters()).device.type
        # A scaler that is not enabled passes losses and steps on as they are.
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)

    def run_step(self) -> None:
        """Run one iteration.

        Raises:
            FloatingPointError: a number that is looked at is not finite, and no more steps may be left out.
        """
        if not self.model.training:
            raise RuntimeError("The model was changed to eval mode.")
        self.optimizer.zero_grad()
        data_time, batches, images, failed = 0.0, [], [], False
        for index in range(self.num_batches):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            if self.max_skipped:
                images += [str(x.get("file_name", x.get("image_id"))) for x in data]
            with self._no_sync() if index + 1 < self.num_batches else nullcontext():
                losses = self._compute_losses(data)
                failed = failed or losses is None
                if self._is_skipped(losses is None) or losses is None:
                    continue
                self.grad_scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            batches.append({name: loss.detach() for name, loss in losses.items()})
        if len(batches) < self.num_batches:
            self._skip("a box of the RPN", failed, images)
            return
        self._average_gradients()
        self.after_backward()
        means = [torch.stack([losses[name] for losses in batches]).mean() for name in batches[0]]
        # Read all at once, for each reading waits for a GPU.
        values = torch.stack([*means, *self._largest_gradient()]).cpu()
        losses = dict(zip(batches[0], values))
        if self._is_skipped(not values.isfinite().all()):
            bad = [name for name, loss in losses.items() if not loss.isfinite()]
            self._skip(", ".join(bad) or "a gradient", bool(bad), images)
            return
        # Raises FloatingPointError before the optimizer has seen a loss that is not finite.
        self.write_metrics(losses, data_time, self.iter)
        # Here, as fused optimizers would do it after gradients are clipped.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _compute_losses(self, data) -> dict[str, torch.Tensor] | None:
        """Return the losses of a batch; None where the model refuses its own numbers and the step may be left out."""
        scale = {"loss_scale": self.grad_scaler.get_scale()} if self.takes_loss_scale else {}
        try:
            with torch.autocast(self.device_type, dtype=self.precision, enabled=self.precision is not None):
                return self.model(data, **scale)
        except FloatingPointError:  # of Detectron2's RPN
            if self.max_skipped:
                return None
            raise

    def _largest_gradient(self) -> list[torch.Tensor]:
        """Return the largest element of all gradients, where it decides on a step; a loss scale decides by itself."""
        if not self.max_skipped or self.grad_scaler.is_enabled():
            return []
        parameters = [x for group in self.optimizer.param_groups for x in group["params"] if x.grad is not None]
        return [torch.stack([torch.linalg.vector_norm(x.grad, math.inf) for x in parameters]).max()]

    def _is_skipped(self, bad: bool) -> bool:
        """Return whether this step, which is bad in this process or not, is left out: all processes agree."""
        return self.max_skipped > 0 and any(comm.all_gather(bool(bad)))

    def _skip(self, what: str, here: bool, images: list[str]) -> None:
        """Count a step that is left out.

        Args:
            what: is not finite in this process.
            here: whether the images of this process made it so; a gradient is that of all.
            images: of this step and this process.

        Raises:
            FloatingPointError: it is one too many.
        """
        reports = comm.all_gather((here, what, images))
        guilty = [x for x in reports if x[0]] or reports
        names = ", ".join(dict.fromkeys(name for x in guilty for name in x[2]))
        reason = f"{guilty[0][1]} is not finite, with the images {names}."
        if self.num_skipped >= self.max_skipped:
            raise FloatingPointError(f"{reason} {self.num_skipped} steps were skipped, SOLVER.MAX_SKIPPED_STEPS.")
        self.num_skipped += 1
        get_event_storage().put_scalar("skipped_steps", self.num_skipped, smoothing_hint=False)
        logger.warning(f"Iteration {self.iter} makes no step ({self.num_skipped} of {self.max_skipped}): {reason}")

    def _no_sync(self):
        """Return a context in which gradients stay in this process: it is enough to average the sums of all batches."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _average_gradients(self) -> None:
        # The sum of the gradients is divided, not each loss: clipping within the backward pass (of the causal
        # gradients, see CausalGradients.delta_clip) then meets gradients of the size that one batch has, as in the
        # authors' training and as in that of several processes.
        if self.num_batches > 1:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= self.num_batches

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.num_skipped = state_dict.get("num_skipped", 0)  # absent in checkpoints of before
        if state_dict.get("grad_scaler"):  # absent or empty if that run had no loss scale
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


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
