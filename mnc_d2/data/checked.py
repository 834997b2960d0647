"""Which datasets were found right, so that they are not checked again while their files stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from iopath.common.file_io import get_cache_dir

from ..files import open_atomically

# A file that was written so lately may be written again without a change of its time.
_SETTLED = 2.0  # seconds


class CheckedDataset:
    """What a check of a dataset found, kept in the cache folder of Detectron2's files (the variable FVCORE_CACHE).

    It is valid for files of the same size and modification time as those that were checked, by the same checks.
    """

    def __init__(self, json_file: str, image_root: str, file_names: Iterable[str], checks: Iterable[str]) -> None:
        """
        Args:
            json_file: path of the annotations.
            image_root: folder of the images.
            file_names: of all images, relative to it.
            checks: paths of the modules that check.
        """
        json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
        name = hashlib.sha256(f"{json_file}\n{image_root}".encode(errors="surrogateescape")).hexdigest()
        self._path = Path(get_cache_dir(), "mnc_d2", "checked", f"{name}.json")
        self._state: str | None = None
        state, newest = hashlib.sha256(), 0.0
        try:
            for path in checks:
                state.update(Path(path).read_bytes())
            for path in (json_file, *(os.path.join(image_root, x) for x in file_names)):
                status = os.stat(path)
                state.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
                newest = max(newest, status.st_mtime)
            self._state = state.hexdigest()
        except (OSError, ValueError):
            pass  # a missing image, a name that cannot be one: for the check to say
        self._settled = newest < time.time() - _SETTLED

    def recall(self) -> list[int] | None:
        """Return what was found in the same files, or None if they are new or others."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self._path.read_text())
            if self._state is not None and content["state"] == self._state:
                return content["empty"]
        return None

    def remember(self, empty: list[int]) -> None:
        """Keep the ids of annotations that cover no pixel, of a dataset that is right otherwise."""
        if self._state is None or not self._settled:
            return
        with contextlib.suppress(OSError):  # without a place to keep it, it is checked again
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_atomically(self._path, "w") as file:
                json.dump({"state": self._state, "empty": empty}, file)
