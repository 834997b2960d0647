"""Trainings that are killed at moments drawn from a seed, and resumed: all end to the last bit as one that was not.

An hour: `make test-faults`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from test_resume import TIMES, assert_same
from test_train_net import SCRIPT, arguments_for, read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ITERATIONS = 16
SMALL = [
    *("DATALOADER.NUM_WORKERS", "2"),
    *("INPUT.CROP.ENABLED", "True"),
    *("INPUT.MIN_SIZE_TRAIN", "(64, 96)"),
    *("INPUT.RANDOM_FLIP", "horizontal"),
    *("SOLVER.CHECKPOINT_PERIOD", "3"),
    *("SOLVER.MAX_CHECKPOINTS", "2"),
    *("TEST.EVAL_PERIOD", "6"),
    *("TEST.NUM_PICTURES", "0"),
    *("VIS_PERIOD", "0"),
]
ONE = (sys.executable, SCRIPT)
LAUNCH = ["--num-gpus", "2", "--dist-url", "auto"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(arguments, command=ONE):
    """Start train_net.py in a session of its own, so that all of its processes can be told from others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(x) for x in (*command, *arguments)]
    output = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop it
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    process.output = output
    return process


def finish(process, code=0):
    """Wait for the end; return what was printed."""
    process.wait()
    with process.output as file:
        file.seek(0)
        output = file.read()
    assert process.returncode == code, output[-4000:]
    return output


def result_of(folder):
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    checkpoint["description"]["config"] = checkpoint["description"]["config"].replace(str(folder), "FOLDER")
    return checkpoint, [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def kill_after(process, seconds):
    """Send SIGKILL to all processes of a session; return whether it was still running."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return True
    finally:
        process.wait()
        process.output.close()


@pytest.mark.parametrize(
    ("options", "overrides"),
    [([], []), ([], ["SOLVER.ACCUMULATE", 2]), (LAUNCH, [])],
    ids=["one process", "two batches to a step", "two processes"],
)
def test_killed_at_random_moments_and_resumed(coco_dataset, tmp_path, options, overrides):
    def arguments(folder, *more):
        overrides_ = [*SMALL, *overrides]
        return arguments_for(
            coco_dataset, tmp_path / folder, *options, *more, iterations=ITERATIONS, overrides=overrides_
        )

    began = time.monotonic()
    finish(start(arguments("whole")))
    seconds = time.monotonic() - began
    expected = result_of(tmp_path / "whole")
    # Starting takes most of the time; moments fall anywhere in it, in training, in writing and in evaluation.
    generator = random.Random(0)
    kills = 0
    while kills < 7:
        process = start(arguments("parts", "--resume"))
        if kill_after(process, generator.uniform(0.4, 1.1) * seconds):
            kills += 1
        else:  # it had come to its end: once more from the beginning
            assert_same(result_of(tmp_path / "parts"), expected)
            shutil.rmtree(tmp_path / "parts")
    finish(start(arguments("parts", "--resume")))
    assert_same(result_of(tmp_path / "parts"), expected)
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.parametrize("seed", range(5))
def test_torchrun_restarts_workers_that_are_killed(coco_dataset, tmp_path, seed):
    arguments = arguments_for(
        coco_dataset, tmp_path, "--resume", iterations=60, overrides=[*SMALL, "TEST.EVAL_PERIOD", "0"]
    )
    process = start(arguments, (*TORCHRUN, "--max-restarts", "3", SCRIPT))
    generator = random.Random(seed)
    wait_for_iteration(tmp_path, generator.randint(2, 40))
    victim = generator.choice(workers_of(process.pid))
    os.kill(victim, signal.SIGKILL)
    finish(process)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 59
    assert (tmp_path / "log.txt").read_text().count("Starting training from iteration") == 2


@pytest.mark.parametrize("options", [[], LAUNCH], ids=["one process", "two processes"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_under_way(coco_dataset, tmp_path, options, number):
    overrides = [*SMALL, "SOLVER.CHECKPOINT_PERIOD", "100000", "TEST.EVAL_PERIOD", "0"]
    process = start(arguments_for(coco_dataset, tmp_path, *options, iterations=100000, overrides=overrides))
    wait_for_log(tmp_path, "iter: 19 ")
    os.kill(process.pid, number)
    output = finish(process, code=128 + number)
    (checkpoint,) = tmp_path.glob("model_*.pth")
    assert torch.load(checkpoint, weights_only=True)["trainer"]["iteration"] >= 19
    (line,) = [line for line in output.splitlines() if line.startswith("Resume with:")]
    assert "train_net.py --resume --config-file" in line
    assert "Traceback" not in output


def wait_for_log(folder, text, seconds=300):
    """Wait until the log of a run has a text."""
    end = time.monotonic() + seconds
    while not (folder / "log.txt").exists() or text not in (folder / "log.txt").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_iteration(folder, iteration):
    """Wait until a checkpoint of the iteration or a later one is there."""
    end = time.monotonic() + 300
    while not any(int(x.stem.split("_")[1]) >= iteration for x in folder.glob("model_0*.pth")):
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(pid):
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(x) for x in file.read().split()]
