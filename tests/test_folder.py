"""The folder of a training: refused where it is used or in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnc_d2.engine import check_folder, lock_folder

HOLD = """
import sys
from mnc_d2.engine import lock_folder
lock = lock_folder(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["model_0000001.pth", "model_final.pth", "last_checkpoint", "metrics.json"])
def test_a_used_folder_is_for_a_resume(tmp_path, name):
    (tmp_path / name).write_text("something")
    with pytest.raises(ValueError, match=rf"has a training already \({name}\).*--resume, or choose another OUTPUT_DIR"):
        check_folder(str(tmp_path), resume=False)
    check_folder(str(tmp_path), resume=True)


def test_an_unused_folder_is_made(tmp_path):
    check_folder(str(tmp_path / "a" / "b"), resume=False)
    (tmp_path / "a" / "b" / "log.txt").write_text("of a training that ended before it wrote a metric")
    check_folder(str(tmp_path / "a" / "b"), resume=False)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"OUTPUT_DIR .*file/output cannot be made: Not a directory"):
        check_folder(str(tmp_path / "file" / "output"), resume=False)
    (tmp_path / "training.lock").mkdir()
    with pytest.raises(OSError, match="cannot be written to: Is a directory"):
        check_folder(str(tmp_path), resume=False)


def test_one_training_at_a_time_and_a_lock_ends_with_its_process(tmp_path):
    half_written = tmp_path / "model_0000004.pth.17.tmp"
    half_written.touch()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        assert not half_written.exists()
        with pytest.raises(ValueError, match=rf"training is running in OUTPUT_DIR .*: process {other.pid} on \S+"):
            check_folder(str(tmp_path), resume=True)
        other.kill()
    with lock_folder(str(tmp_path)):
        assert (tmp_path / "training.lock").read_text().startswith(f"process {os.getpid()} on ")
