"""The folder of a training: refused where it is used or in use."""

import multiprocessing
import os

import pytest

from mnc_d2.engine import check_folder, lock_folder


def hold(folder, connection):
    """Lock a folder, and say so, for as long as the process lives."""
    with lock_folder(folder):
        connection.send("locked")
        connection.recv()


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
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    other = context.Process(target=hold, args=(str(tmp_path), there))
    other.start()
    try:
        assert here.recv() == "locked"
        assert not half_written.exists()
        with pytest.raises(ValueError, match=rf"training is running in OUTPUT_DIR .*: process {other.pid} on \S+"):
            check_folder(str(tmp_path), resume=True)
    finally:
        other.kill()
        other.join()
    with lock_folder(str(tmp_path)):
        assert (tmp_path / "training.lock").read_text().startswith(f"process {os.getpid()} on ")
