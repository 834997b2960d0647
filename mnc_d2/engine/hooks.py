"""What a training that is stopped leaves behind, and one that is resumed takes up: checkpoints and metrics."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter

from ..checkpoint import MNCCheckpointer

logger = logging.getLogger(__name__)

# Detectron2's writers write medians over so many iterations.
WINDOW = 20


class CheckpointHook(hooks.PeriodicCheckpointer):
    """Detectron2's periodic checkpoints, the newest of them, and one for a process that SIGTERM or SIGINT tells to end.

    The step under way is finished and saved; then ``SystemExit`` ends the training, with 143 or 130 as exit code. All
    processes of a training end after the same step. An evaluation under way is broken off: the training is saved as it
    was before, and its resume evaluates.
    """

    def __init__(self, checkpointer: MNCCheckpointer, period: int, keep: int = 0) -> None:
        """
        Args:
            checkpointer: saves, in the main process.
            period: iterations between checkpoints.
            keep: number of periodic checkpoints to keep; 0 for all.
        """
        super().__init__(checkpointer, period)
        self._keep = keep
        self._process = os.getpid()
        self._signal: int | None = None
        self._in_step = False
        self._unsaved: int | None = None  # the iteration that is finished and not saved
        self._handlers: dict[int, Any] = {}

    def before_train(self) -> None:
        super().before_train()
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers from others
            self._handlers = {x: signal.signal(x, self._handle) for x in (signal.SIGTERM, signal.SIGINT)}

    def before_step(self) -> None:
        self._in_step = True

    def after_step(self) -> None:
        super().after_step()
        iteration = self.trainer.iter
        saved = (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1
        self._unsaved = None if saved else iteration
        if saved and self._keep and comm.is_main_process():
            self.checkpointer.remove_old(self._keep)
        told = [x for x in comm.all_gather(self._signal) if x is not None]
        self._in_step = False
        number = told[0] if told else self._signal  # which may have come since
        if number is not None:
            self._stop(number)

    def restore_handlers(self) -> None:
        """Leave signals to those who had them before the training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        # A worker of a data loader, to which it was handed down, ends with this process.
        if os.getpid() != self._process or self._signal is not None:
            return
        self._signal = number
        if not self._in_step:
            self._stop(number)

    def _stop(self, number: int) -> None:
        if self._unsaved is not None:
            self.save(f"{self.file_prefix}_{self._unsaved:07d}", iteration=self._unsaved)
        logger.warning(f"{signal.Signals(number).name}: the training is saved, and ends.")
        raise SystemExit(128 + number)


class MetricsFile(JSONWriter):
    """Detectron2's ``metrics.json``, which goes on after a resume as if the training had not been stopped."""

    def __init__(self, json_file: str) -> None:
        """
        Args:
            json_file: its path; new lines are appended.
        """
        super().__init__(json_file)
        self._written = {"size": self._file_handle.tell(), "last_write": self._last_write}

    def write(self) -> None:
        super().write()
        self._written = {"size": self._file_handle.tell(), "last_write": self._last_write}

    def state_dict(self) -> dict[str, int]:
        """Return the state after the last whole writing: a signal may have broken one off."""
        return self._written

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take back what was written after the state was saved."""
        if state_dict["size"] < self._file_handle.tell():
            self._file_handle.truncate(state_dict["size"])
            self._file_handle.seek(0, os.SEEK_END)
        self._last_write = state_dict["last_write"]
        self._written = {"size": self._file_handle.tell(), "last_write": self._last_write}


def scalars_of(storage: EventStorage) -> dict[str, dict[str, Any]]:
    """Return the scalars of the last iterations, as far as writers use them; plain values."""
    scalars = {}
    for name, history in storage.histories().items():
        if name == "time":
            continue  # of this process: Detectron2 measures none in its first iterations, after a resume neither
        last = history.values()[-1][1]
        scalars[name] = {
            "values": [list(x) for x in history.values()[-WINDOW:] if x[1] > last - WINDOW],
            "smoothing_hint": storage.smoothing_hints()[name],
        }
    return scalars


def put_scalars(storage: EventStorage, scalars: dict[str, dict[str, Any]]) -> None:
    """Put into a storage what :func:`scalars_of` returned."""
    for name, scalar in scalars.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(name, value, smoothing_hint=scalar["smoothing_hint"], cur_iter=iteration)
