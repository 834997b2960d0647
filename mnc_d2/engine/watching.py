"""Hooks of a training that watches itself: the best model, an early end, one line of progress."""

from __future__ import annotations

import logging
import math
import os

from detectron2.engine import BestCheckpointer, HookBase
from detectron2.utils import comm
from tqdm import tqdm

from ..checkpoint import MNCCheckpointer, record_metrics

logger = logging.getLogger(__name__)

# Metrics of evaluations that "auto" chooses from, the first that there is.
_METRICS = ("segm/AP", "sds/mAPr@50", "bbox/AP")


class KeepBest(BestCheckpointer):
    """Detectron2's ``BestCheckpointer``, which finds its metric and goes on where a resumed training was.

    It saves weights alone, without the state to train on from, and leaves it to other checkpoints to be the last one.
    """

    _val_metric: str

    def __init__(self, eval_period: int, checkpointer: MNCCheckpointer, metric: str) -> None:
        """
        Args:
            eval_period: iterations between evaluations, as for ``EvalHook``.
            checkpointer: of the model that is trained.
            metric: such as "segm/AP"; the larger the better. "auto" for the AP of masks or, without these, of boxes.
        """
        super().__init__(eval_period, _WithoutTag(checkpointer), metric)

    def _best_checking(self) -> None:
        if self._val_metric == "auto":
            self._val_metric = find_metric(self.trainer.storage.latest()) or "auto"
        super()._best_checking()

    def state_dict(self) -> dict:
        return {"metric": self.best_metric, "iteration": self.best_iter} if self.best_metric is not None else {}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best_metric, self.best_iter = state_dict["metric"], state_dict["iteration"]


class _WithoutTag:
    """Saves the model of a checkpointer and its description, and does not make it the one to resume from."""

    def __init__(self, checkpointer: MNCCheckpointer) -> None:
        described = {"description": checkpointer.checkpointables["description"]}
        self._checkpointer = MNCCheckpointer(checkpointer.model, checkpointer.save_dir, **described)
        self._checkpointer.tag_last_checkpoint = lambda _: None

    def save(self, name: str, **kwargs) -> None:
        self._checkpointer.save(name, **kwargs)


class TrainingEnds(BaseException):
    """Ends the loop of a trainer before its last iteration; no ``Exception``, which Detectron2 logs as a failure."""


class StopEarly(HookBase):
    """Saves ``model_final.pth`` and raises :class:`TrainingEnds` when a metric has not risen for some evaluations.

    It belongs after ``EvalHook``, and into every process.
    """

    def __init__(self, eval_period: int, patience: int, metric: str) -> None:
        """
        Args:
            eval_period: iterations between evaluations, as for ``EvalHook``.
            patience: evaluations without a better metric after which the training ends.
            metric: as for :class:`KeepBest`.
        """
        self._period = eval_period
        self._patience = patience
        self._metric = metric
        self.best = -math.inf
        self.waited = 0

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period or next_iter == self.trainer.max_iter:
            return
        # The main process alone has metrics.
        if any(comm.all_gather(self._is_over())):
            metric = self._metric if self._metric != "auto" else find_metric(self.trainer.storage.latest()) or "auto"
            logger.info(f"{metric} has not risen for {self._patience} evaluations: the training ends here.")
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)
            raise TrainingEnds

    def _is_over(self) -> bool:
        if not comm.is_main_process():
            return False
        latest = self.trainer.storage.latest()
        name = find_metric(latest) if self._metric == "auto" else self._metric
        value = latest[name][0] if name in latest else math.nan
        self.waited = 0 if value > self.best else self.waited + 1
        self.best = max(self.best, value) if value == value else self.best
        return self.waited >= self._patience

    def state_dict(self) -> dict:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best, self.waited = state_dict["best"], state_dict["waited"]


class RecordFinalMetrics(HookBase):
    """Writes the metrics of the last evaluation into ``model_final.pth``, which is saved before it.

    It belongs after ``EvalHook``, into the main process.
    """

    def after_train(self) -> None:
        file = os.path.join(self.trainer.cfg.OUTPUT_DIR, "model_final.pth")
        # It is missing where a resumed training had no iterations left.
        if self.trainer.iter >= self.trainer.max_iter and os.path.isfile(file):
            record_metrics(file, self.trainer.checkpointer.checkpointables["description"].state_dict()["metrics"])


class ProgressLine(HookBase):
    """Shows iteration, time left, loss and last metric in one line of a terminal; nothing elsewhere."""

    def before_train(self) -> None:
        # None: where the output is no terminal.
        self._bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, disable=None, desc="training", smoothing=0.05
        )

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        shown = {"loss": f"{latest['total_loss'][0]:.3f}"} if "total_loss" in latest else {}
        name = find_metric(latest)
        if name is not None:
            shown[name] = f"{latest[name][0]:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._bar.close()


def find_metric(names) -> str | None:
    """Return the metric that "auto" means, of those that an evaluation gave; None if there is none of them."""
    return next((name for name in _METRICS if name in names), None)
