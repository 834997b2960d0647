"""A training that was ended anywhere and is resumed ends as one that was not: weights, optimizer, metrics."""

import json
import os
import signal
import weakref

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils.events import EventStorage

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.engine.hooks import MetricsFile, scalars_of

ITERATIONS = 5
# Times, and the size of the file with their digits.
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds", "metrics_file")


class At(HookBase):
    """Does something in one iteration, when its step is over."""

    def __init__(self, trainer, iteration, action):
        self.trainer = weakref.proxy(trainer)
        self.iteration = iteration
        self.action = action

    def after_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


class Killed(BaseException):
    """In place of SIGKILL, which tests/test_faults.py sends."""


def kill():
    raise Killed


@pytest.fixture
def make_trainer(small_config, coco_dataset, tmp_path, clean_catalogs):
    """A function that returns a trainer of a folder, with everything random that the configs have."""
    register_coco_dataset("drawn", *coco_dataset)

    def make(folder, **overrides):
        cfg = small_config(
            **{
                "DATALOADER.NUM_WORKERS": 0,
                "DATASETS.TEST": ("drawn",),
                "DATASETS.TRAIN": ("drawn",),
                "INPUT.CROP.ENABLED": True,
                "INPUT.MIN_SIZE_TRAIN": (64, 96),
                "OUTPUT_DIR": str(tmp_path / folder),
                "SEED": 3,
                "SOLVER.BASE_LR": 0.001,
                "SOLVER.CHECKPOINT_PERIOD": 2,
                "SOLVER.IMS_PER_BATCH": 1,
                "SOLVER.MAX_ITER": ITERATIONS,
                "TEST.EVAL_PERIOD": 2,
                "TEST.NUM_PICTURES": 0,
                **overrides,
            }
        )
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        torch.manual_seed(0)  # the weights, which default_setup would seed
        return MNCTrainer(cfg)

    return make


def result_of(trainer):
    """The last checkpoint and the lines of metrics.json, without times."""
    folder = trainer.cfg.OUTPUT_DIR
    checkpoint = torch.load(os.path.join(folder, "model_final.pth"), weights_only=True)
    checkpoint["description"]["config"] = checkpoint["description"]["config"].replace(folder, "FOLDER")
    with open(os.path.join(folder, "metrics.json")) as file:
        lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in file]
    return checkpoint, lines


def assert_same(actual, expected, where=""):
    """Compare to the last bit."""
    if isinstance(expected, torch.Tensor):
        assert actual.equal(expected), where
    elif isinstance(expected, dict):
        actual, expected = ({k: v for k, v in x.items() if k not in TIMES} for x in (actual, expected))
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert actual == expected or actual != actual and expected != expected, where


def train(trainer, resume=False):
    trainer.resume_or_load(resume=resume)
    return trainer.train()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"DATALOADER.NUM_WORKERS": 2}, {"SOLVER.ACCUMULATE": 2, "DATALOADER.ASPECT_RATIO_GROUPING": False}],
    ids=["no worker", "two workers", "two batches to a step"],
)
def test_a_training_that_is_killed_three_times_ends_as_if_it_had_not_been(make_trainer, overrides):
    whole = make_trainer("whole", **overrides)
    results = train(whole)
    # Before the first checkpoint, in the iteration after one, and between a checkpoint and the evaluation after it.
    for iteration, start in ((0, 0), (2, 0), (3, 2)):
        killed = make_trainer("parts", **overrides)
        (evaluation,) = [i for i, hook in enumerate(killed._hooks) if isinstance(hook, EvalHook)]
        killed._hooks.insert(evaluation, At(killed, iteration, kill))
        with pytest.raises(Killed):
            train(killed, resume=True)
        assert killed.start_iter == start
    resumed = make_trainer("parts", **overrides)
    resumed_results = train(resumed, resume=True)
    assert resumed.start_iter == 4
    assert_same(result_of(resumed), result_of(whole))
    assert_same(resumed_results, results)
    # Of two evaluations the last before the metrics are written, the losses, the evaluation at the end.
    assert sorted(line["iteration"] for line in result_of(whole)[1]) == [3, 4, 5]


def test_a_run_without_a_seed_goes_on_with_its_own(make_trainer):
    killed = make_trainer("parts", **{"SEED": -1, "TEST.EVAL_PERIOD": 0})
    killed.register_hooks([At(killed, 1, kill)])
    with pytest.raises(Killed):
        train(killed)
    resumed = make_trainer("parts", SEED=-1)
    assert resumed.cfg.SEED != killed.cfg.SEED
    resumed.resume_or_load(resume=True)
    assert resumed.cfg.SEED == killed.cfg.SEED >= 0


def test_a_training_that_is_prolonged_keeps_its_metrics(make_trainer):
    first = make_trainer("output", **{"SOLVER.MAX_ITER": 1})
    train(first)
    before = result_of(first)[1]
    longer = make_trainer("output", **{"SOLVER.MAX_ITER": 2})
    train(longer, resume=True)
    after = result_of(longer)[1]
    assert after[: len(before)] == before
    assert [line["iteration"] for line in after] == [0, 1, 1, 2]


# ---- ended on purpose


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_training_after_the_step_under_way(make_trainer, number, code):
    trainer = make_trainer("output", **{"SOLVER.CHECKPOINT_PERIOD": 100})
    trainer.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), number) if trainer.iter == 1 else None)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(trainer)
    assert stop.value.code == code
    assert signal.getsignal(number) is before
    resumed = make_trainer("output")
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2


def test_a_signal_breaks_off_an_evaluation_whose_training_is_saved(make_trainer):
    trainer = make_trainer("output", **{"SOLVER.CHECKPOINT_PERIOD": 100})
    trainer.test = lambda cfg, model: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(trainer)
    resumed, evaluated = make_trainer("output", **{"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 100}), []
    resumed.test = lambda cfg, model: evaluated.append(resumed.iter)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert evaluated


def test_only_the_newest_checkpoints_stay(make_trainer, tmp_path):
    trainer = make_trainer(
        "output", **{"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_CHECKPOINTS": 2, "DATASETS.TEST": ()}
    )
    train(trainer)
    names = sorted(x.stem for x in (tmp_path / "output").glob("*.pth"))
    assert names == ["model_0000003", "model_0000004", "model_final"]


def test_a_loss_that_is_not_finite_ends_the_training_with_what_there_is_to_know(make_trainer, tmp_path):
    trainer = make_trainer("output", **{"TEST.EVAL_PERIOD": 0, "SOLVER.MAX_ITER": 3})
    trainer.test = lambda cfg, model: pytest.fail("A training that failed is not evaluated.")

    def poison(module, inputs, losses):
        return {**losses, "loss_rpn_cls": losses["loss_rpn_cls"] * float("nan")} if trainer.iter == 2 else losses

    trainer.model.register_forward_hook(poison)
    trainer.resume_or_load(resume=False)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "diverged in iteration 2" in message and "'loss_rpn_cls': " in message and "nan" in message
    assert f"The learning rate was {trainer.optimizer.param_groups[0]['lr']:g}," in message
    assert f"The last good checkpoint is {tmp_path / 'output' / 'model_0000001.pth'}." in message
    assert all(x.isfinite().all() for x in trainer.model.state_dict().values())


def test_a_resume_keeps_count_of_the_steps_that_were_left_out(make_trainer):
    def make(folder):
        overrides = {"SOLVER.MAX_SKIPPED_STEPS": 1, "SOLVER.MAX_ITER": 4, "DATASETS.TEST": (), "TEST.EVAL_PERIOD": 0}
        trainer = make_trainer(folder, **overrides)
        proxy = weakref.proxy(trainer)
        factors = {1: float("nan")}  # of the losses of iteration 1
        trainer.model.register_forward_hook(
            lambda module, inputs, losses: {k: v * factors.get(proxy.iter, 1) for k, v in losses.items()}
        )
        return trainer

    whole = make("whole")
    train(whole)
    killed = make("parts")
    killed.register_hooks([At(killed, 2, kill)])
    with pytest.raises(Killed):
        train(killed)
    resumed = make("parts")
    train(resumed, resume=True)
    assert resumed.start_iter == 2
    assert_same(result_of(resumed), result_of(whole))
    checkpoint, lines = result_of(whole)
    assert checkpoint["trainer"]["_trainer"]["num_skipped"] == lines[-1]["skipped_steps"] == 1


def test_a_long_training_keeps_the_scalars_of_its_last_iterations_alone(make_trainer):
    trainer = make_trainer("output", **{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": (), "TEST.EVAL_PERIOD": 0})
    train(trainer)
    for i in range(1001):
        trainer.storage.put_scalar("new", i)
    assert len(trainer.storage.history("new").values()) == 1000


def test_weights_that_are_not_finite_end_the_training_where_they_would_be_saved(make_trainer, tmp_path):
    trainer = make_trainer("output", **{"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 3, "DATASETS.TEST": ()})
    weight = trainer.model.proposal_generator.rpn_head.conv.weight
    trainer._hooks.insert(0, At(trainer, 1, lambda: weight.data.fill_(float("nan"))))
    trainer.resume_or_load(resume=False)
    with pytest.raises(FloatingPointError, match="diverged in iteration 1: .*rpn_head.conv.weight.*learning rate") as e:
        trainer.train()
    assert f"The last good checkpoint is {tmp_path / 'output' / 'model_0000000.pth'}." in str(e.value)


def test_metrics_whose_writing_was_broken_off_are_written_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    with EventStorage() as storage:
        file = MetricsFile(str(path))
        storage.put_scalar("loss", 1.0)
        file.write()
        storage.iter = 1
        storage.put_scalar("loss", 2.0, cur_iter=1)
        with monkeypatch.context() as patch:
            patch.setattr(file, "_file_handle", HalfFile(file._file_handle))
            with pytest.raises(SystemExit):
                file.write()
        state = file.state_dict()
        resumed = MetricsFile(str(path))
        resumed.load_state_dict(state)
        resumed.write()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1]


class HalfFile:
    """Writes half of a text; then comes a signal."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise SystemExit

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_times_of_an_earlier_process_are_not_taken_up():
    with EventStorage() as storage:
        storage.put_scalars(loss=1.0, time=2.0)
        assert scalars_of(storage).keys() == {"loss"}
