"""The folder of a training: whether it may start there, and that no other does meanwhile."""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import socket
from typing import IO

logger = logging.getLogger(__name__)

LOCK_NAME = "training.lock"


def check_folder(folder: str, resume: bool) -> None:
    """Check that a training can start in a folder, which is made if it is not there.

    Args:
        folder: OUTPUT_DIR.
        resume: whether it goes on with what is there.

    Raises:
        ValueError: the folder has what another training wrote, or one is running in it.
        OSError: it cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except (OSError, ValueError) as error:  # of a zero byte
        raise OSError(f"OUTPUT_DIR {folder} cannot be made: {getattr(error, 'strerror', error)}.") from error
    if not resume:
        names = [*glob.glob("*.pth", root_dir=folder), "last_checkpoint", "metrics.json"]
        used = [x for x in names if os.path.isfile(os.path.join(folder, x)) and os.path.getsize(f"{folder}/{x}")]
        if used:
            raise ValueError(
                f"OUTPUT_DIR {folder} has a training already ({sorted(used)[0]}). Go on with it by --resume, or choose "
                "another OUTPUT_DIR."
            )
    lock_folder(folder).close()


def lock_folder(folder: str) -> IO[str]:
    """Lock a folder for the training of this process, which removes what one that was killed left half written.

    Returns:
        the lock file. The lock lasts until it is closed or the process ends, however it ends.

    Raises:
        ValueError: a training is running in the folder; the message names process and host.
        OSError: the folder cannot be written to.
    """
    try:
        file = open(os.path.join(folder, LOCK_NAME), "a+")
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {folder} cannot be written to: {error.strerror}.") from error
    try:
        # A lock of the process, not of the open file: workers of data loaders, forked from it, do not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"A training is running in OUTPUT_DIR {folder}: {owner}. Choose another one.") from error
        logger.warning(f"{folder} is on a file system without locks. See that no other training runs in it.")
    for half_written in glob.glob(os.path.join(glob.escape(folder), "*.pth.*.tmp")):
        os.remove(half_written)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file
