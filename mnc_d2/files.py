"""Writing files that are whole whenever they are there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike, mode: str = "wb", **kwargs) -> Iterator[IO]:
    """Open a file to write that takes its place only when all of it is on the disk.

    Whatever ends the writing before, an exception, a full disk or the end of the process, leaves what was at ``path``.

    Args:
        path: where the file goes; its folder must be there.
        mode: "w" or "wb".
        kwargs: for ``open``.
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _sync_folder(folder: str) -> None:
    """Have a new name in a folder survive a power failure."""
    with contextlib.suppress(OSError):  # not every file system has it
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
