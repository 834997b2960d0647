"""A training that watches itself: which model is kept, when it ends, what is shown."""

import math

import pytest
import torch
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import TrainerBase

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.checkpoint.description import read_checkpoint
from mnc_d2.engine.watching import KeepBest, ProgressLine, StopEarly, TrainingEnds, find_metric

PERIOD = 2


class Described:
    def state_dict(self):
        return {"config": "A: 1"}

    def load_state_dict(self, _):
        pass


class Trainer(TrainerBase):
    """Counts its iterations in a weight; its evaluations give the APs that it is made of, one after another."""

    def __init__(self, folder, aps, make_hooks, name="segm"):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
        self.checkpointer = MNCCheckpointer(self.model, str(folder), description=Described())
        aps = iter(aps)
        self.register_hooks([EvalHook(PERIOD, lambda: {name: {"AP": next(aps)}}), *make_hooks(self)])

    def run_step(self):
        self.model.weight.data.fill_(self.iter)
        self.storage.put_scalar("total_loss", 0.5)


def kept(folder):
    """The iteration whose weights were kept."""
    return int(torch.load(folder / "model_best.pth", weights_only=True)["model"]["weight"].item())


def keep_best(metric="auto"):
    return lambda trainer: [KeepBest(PERIOD, trainer.checkpointer, metric)]


@pytest.mark.parametrize(
    ("aps", "best"), [([1.0, 3.0, 2.0], 3), ([1.0, 2.0, 3.0], 5), ([math.nan, 1.0, math.nan], 3), ([2.0, 2.0, 2.0], 1)]
)
def test_the_best_model_is_kept(tmp_path, aps, best):
    Trainer(tmp_path, aps, keep_best()).train(0, 6)
    # Evaluations follow iterations 1 and 3, and the end.
    assert kept(tmp_path) == best
    checkpoint = read_checkpoint(str(tmp_path / "model_best.pth"))
    assert checkpoint["description"] == {"config": "A: 1"}


def test_the_best_model_is_not_the_one_to_resume_from(tmp_path):
    Trainer(tmp_path, [1.0, 2.0], keep_best()).train(0, 3)
    assert not (tmp_path / "last_checkpoint").exists()


def test_a_resumed_training_keeps_what_was_better_before(tmp_path):
    first = Trainer(tmp_path, [3.0, 2.0], keep_best())
    first.train(0, 3)
    second = Trainer(tmp_path, [1.0, 2.0], keep_best())
    second.load_state_dict(first.state_dict())
    second.train(3, 6)
    assert kept(tmp_path) == 1


@pytest.mark.parametrize(("name", "metric"), [("segm", "segm/AP"), ("bbox", "auto"), ("bbox", "bbox/AP")])
def test_the_metric_is_named_or_found(tmp_path, name, metric):
    Trainer(tmp_path, [1.0, 2.0], keep_best(metric), name).train(0, 3)
    assert kept(tmp_path) == 2


def test_masks_come_before_boxes():
    assert find_metric(["bbox/AP", "segm/AP"]) == "segm/AP"
    assert find_metric(["bbox/AP", "sds/mAPr@50"]) == "sds/mAPr@50"
    assert find_metric(["total_loss"]) is None


def stop_early(patience):
    return lambda trainer: [StopEarly(PERIOD, patience, "auto")]


@pytest.mark.parametrize(("patience", "last"), [(1, 5), (2, 7)])
def test_a_training_without_progress_ends(tmp_path, patience, last):
    trainer = Trainer(tmp_path, [1.0, 2.0, 2.0, 1.0, 9.0, 9.0], stop_early(patience))
    with pytest.raises(TrainingEnds):
        trainer.train(0, 100)
    assert trainer.iter == last
    final = read_checkpoint(str(tmp_path / "model_final.pth"))
    assert final["model"]["weight"].item() == last and final["iteration"] == last


def test_the_log_says_which_metric_has_not_risen(tmp_path, caplog):
    with caplog.at_level("INFO", logger="mnc_d2"), pytest.raises(TrainingEnds):
        Trainer(tmp_path, [2.0, 1.0, 9.0], stop_early(1)).train(0, 6)
    assert "segm/AP has not risen for 1 evaluations" in caplog.text


def test_a_better_model_starts_the_patience_anew(tmp_path):
    trainer = Trainer(tmp_path, [2.0, 1.0, 3.0, 1.0, math.nan], stop_early(2))
    with pytest.raises(TrainingEnds):
        trainer.train(0, 100)
    assert trainer.iter == 9


def test_patience_goes_on_in_a_resumed_training(tmp_path):
    first = Trainer(tmp_path, [2.0, 1.0, 1.0], stop_early(3))
    first.train(0, 5)
    second = Trainer(tmp_path, [1.0, 1.0], stop_early(3))
    second.load_state_dict(first.state_dict())
    with pytest.raises(TrainingEnds):
        second.train(5, 100)
    assert second.iter == 7


def test_one_line_of_progress_on_a_terminal(tmp_path, capsys, monkeypatch):
    Trainer(tmp_path, [1.0], lambda _: [ProgressLine()]).train(0, 2)
    assert "training" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    Trainer(tmp_path, [61.23], lambda _: [ProgressLine()]).train(0, 2)
    lines = capsys.readouterr().err.rstrip().split("\r")
    assert "\n" not in "".join(lines)
    assert "2/2" in lines[-1] and "loss=0.500" in lines[-1]
