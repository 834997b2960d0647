"""Trainings that are killed at moments drawn from a seed, and resumed: all end to the last bit as one that was not.

They take long: `make test-faults`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from programs import SCRIPT, arguments_for, read_metrics
from test_resume import TIMES, assert_same

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ITERATIONS = 8
SMALL = [
    *("DATALOADER.NUM_WORKERS", "1"),
    *("INPUT.CROP.ENABLED", "True"),
    *("INPUT.MIN_SIZE_TRAIN", "(64, 96)"),
    *("INPUT.RANDOM_FLIP", "horizontal"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("SOLVER.CHECKPOINT_PERIOD", "2"),
    *("SOLVER.MAX_CHECKPOINTS", "2"),
    *("TEST.EVAL_PERIOD", "4"),
    *("TEST.NUM_PICTURES", "0"),
    *("VIS_PERIOD", "0"),
]
PROCESSES = {
    "one process": (7, [], []),
    "two batches to a step": (6, [], ["SOLVER.ACCUMULATE", 2]),
    "two processes": (7, ["--num-gpus", "2", "--dist-url", "auto"], []),
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PATIENCE = 600  # seconds after which something hangs


class Program:
    """train_net.py in a session of its own, so that all of its processes can be told from others."""

    def __init__(self, folder, arguments, command=(sys.executable,)):
        self.log = folder / "log.txt"
        self._starts = self.count("Rank of current process")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.output = folder.with_suffix(".output")
        with open(self.output, "w") as file:  # a pipe that nobody reads would stop it
            self.process = subprocess.Popen(
                [str(x) for x in (*command, SCRIPT, *arguments)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def count(self, text):
        """How often the log has a text."""
        return self.log.read_text().count(text) if self.log.exists() else 0

    def wait_for(self, text, times=1):
        """Wait until the log has a text so many times, or the program has ended."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and self.count(text) < times:
            assert time.monotonic() < end, self.output.read_text()[-4000:]
            time.sleep(0.02)

    def wait_for_start(self):
        """Wait until its programs are loaded; the folder, a checkpoint and the data are to come."""
        self.wait_for("Rank of current process", self._starts + 1)

    def finish(self, code=0):
        """Wait for the end; return what was printed."""
        self.process.wait(PATIENCE)
        output = self.output.read_text()
        assert self.process.returncode == code, output[-4000:]
        return output

    def kill(self):
        """Send SIGKILL to all processes of the session; return whether it was still running."""
        running = self.process.poll() is None
        if running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return running


@pytest.fixture
def start(coco_dataset, tmp_path):
    """A function that starts train_net.py in a folder; what still runs after the test is killed."""
    programs = []

    def start_program(folder, *options, iterations=ITERATIONS, overrides=(), command=(sys.executable,)):
        arguments = arguments_for(
            coco_dataset, tmp_path / folder, *options, iterations=iterations, overrides=[*SMALL, *overrides]
        )
        programs.append(Program(tmp_path / folder, arguments, command))
        return programs[-1]

    yield start_program
    for program in programs:
        workers = workers_of(program.process.pid) if program.process.poll() is None else []
        program.kill()
        for worker in workers:  # torchrun gives each a session of its own
            os.kill(worker, signal.SIGKILL)


def workers_of(pid):
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(x) for x in file.read().split()]


def result_of(folder):
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    checkpoint["description"]["config"] = checkpoint["description"]["config"].replace(str(folder), "FOLDER")
    return checkpoint, [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def share_left(folder):
    """The share of the iterations that the last checkpoint leaves to train, at least a third: then is evaluated."""
    iterations = [int(x.stem.split("_")[1]) + 1 for x in folder.glob("model_0*.pth")]
    return max(1 - max(iterations, default=0) / ITERATIONS, 1 / 3)


@pytest.mark.parametrize(("kills", "options", "overrides"), PROCESSES.values(), ids=list(PROCESSES))
def test_killed_at_random_moments_and_resumed(start, tmp_path, kills, options, overrides):
    program = start("whole", *options, overrides=overrides)
    program.wait_for_start()
    began = time.monotonic()
    program.finish()
    seconds = time.monotonic() - began
    expected = result_of(tmp_path / "whole")
    # Moments fall into the loading of the data and of a checkpoint, training, writing and evaluation.
    generator = random.Random(0)
    killed = 0
    while killed < kills:
        moment = generator.uniform(0, 1) * seconds * share_left(tmp_path / "parts")
        program = start("parts", "--resume", *options, overrides=overrides)
        program.wait_for_start()
        time.sleep(moment)
        if program.kill():
            killed += 1
        else:  # it had come to its end: once more from the beginning
            program.finish()
            assert_same(result_of(tmp_path / "parts"), expected)
            shutil.rmtree(tmp_path / "parts")
    start("parts", "--resume", *options, overrides=overrides).finish()
    assert_same(result_of(tmp_path / "parts"), expected)
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_torchrun_restarts_workers_that_are_killed_five_times(start, tmp_path):
    kills, begun, saved = 5, "Starting training from iteration", "Saving checkpoint"
    settings = {"iterations": 40, "overrides": ["DATASETS.TEST", ()]}
    program = start("parts", "--resume", command=(*TORCHRUN, "--max-restarts", kills), **settings)
    generator = random.Random(0)
    for kill in range(1, kills + 1):
        program.wait_for(begun, kill)
        program.wait_for(saved, program.count(saved) + generator.randint(1, 2))
        time.sleep(generator.uniform(0, 0.2))
        os.kill(generator.choice(workers_of(program.process.pid)), signal.SIGKILL)
    program.finish()
    starts = [int(line.split()[-1]) for line in program.log.read_text().splitlines() if begun in line]
    assert len(starts) == kills + 1 and starts == sorted(starts)
    start("whole", *PROCESSES["two processes"][1], **settings).finish()
    assert_same(result_of(tmp_path / "parts"), result_of(tmp_path / "whole"))


@pytest.mark.parametrize("options", [PROCESSES[x][1] for x in ("one process", "two processes")], ids=["one", "two"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_under_way(start, tmp_path, options, number):
    overrides = ["SOLVER.CHECKPOINT_PERIOD", 100000, "TEST.EVAL_PERIOD", 0]
    program = start("output", *options, iterations=100000, overrides=overrides)
    program.wait_for("iter: 19 ")
    os.kill(program.process.pid, number)
    output = program.finish(code=128 + number)
    (checkpoint,) = (tmp_path / "output").glob("model_*.pth")
    assert torch.load(checkpoint, weights_only=True)["trainer"]["iteration"] >= 19
    (line,) = [line for line in output.splitlines() if line.startswith("Resume with:")]
    assert "train_net.py --resume --config-file" in line
    assert "Traceback" not in output
