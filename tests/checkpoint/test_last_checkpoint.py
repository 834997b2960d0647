"""The checkpoints of a training: when one is written, and which one is resumed from."""

import logging
import os

import pytest
import torch
from torch import nn

from mnc_d2.checkpoint import MNCCheckpointer


@pytest.fixture
def folder(tmp_path):
    """A folder with the checkpoints after iterations 1, 2 and 3, whose weights are 1, 2 and 3; the last is tagged."""
    for iteration in (1, 2, 3):
        model = nn.Linear(100, 1, bias=False)
        nn.init.constant_(model.weight, iteration)
        MNCCheckpointer(model, str(tmp_path)).save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def resume(folder, model=None):
    """Resume; return the iteration and the weight, (1, 100)."""
    model = model or nn.Linear(100, 1, bias=False)
    extra = MNCCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    return extra.get("iteration"), model.weight


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((20,), 3.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)


def poison(path):
    checkpoint = torch.load(path)
    checkpoint["model"]["weight"][0, 7] = float("inf")
    torch.save(checkpoint, path)


def strip(path):
    torch.save({"model": torch.load(path)["model"]}, path)


@pytest.mark.parametrize("damage", [os.remove, truncate, empty, flip, poison, strip], ids=lambda x: x.__name__)
def test_the_newest_whole_checkpoint_takes_the_place_of_the_last(folder, caplog, damage):
    damage(folder / "model_0000003.pth")
    iteration, weight = resume(folder)
    assert iteration == 2 and weight.eq(2).all()
    (warning,) = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert str(folder / "model_0000003.pth") in warning and str(folder / "model_0000002.pth") in warning


@pytest.mark.parametrize("content", ["", "model_0000009.pth", "../model_0000003.pth", "\0", None])
def test_the_tag_is_not_needed(folder, content):
    tag = folder / "last_checkpoint"
    (folder.parent / "model_0000003.pth").write_bytes((folder / "model_0000001.pth").read_bytes())
    if content is None:
        tag.unlink()
    else:
        tag.write_text(content)
    iteration, weight = resume(folder)
    assert iteration == 3 and weight.eq(3).all()


def test_a_tag_that_is_set_back_is_followed(folder):
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    assert resume(folder)[0] == 1


def test_the_iteration_decides_and_not_the_name(folder):
    # Of an earlier, shorter training in this folder.
    MNCCheckpointer(nn.Linear(100, 1, bias=False), str(folder)).save("model_final", iteration=0)
    (folder / "last_checkpoint").unlink()
    assert resume(folder)[0] == 3


def test_without_any_whole_checkpoint_each_is_named(folder):
    for path in folder.glob("*.pth"):
        truncate(path)
    with pytest.raises(ValueError, match="3.pth is damaged.*1.pth is damaged.*Move them away"):
        resume(folder)


def test_a_folder_without_checkpoints_is_a_start(tmp_path, caplog):
    assert resume(tmp_path)[0] is None
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert resume(tmp_path)[0] is None
    assert "model_0000003.pth does not exist, and there is no other" in caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(100, 2, bias=False), r"weight is \(1, 100\) in the checkpoint and \(2, 100\) in the model"),
        (nn.Linear(100, 1), "it lacks bias"),
    ],
    ids=["shape", "name"],
)
def test_a_resume_takes_the_whole_model(folder, model, message):
    with pytest.raises(ValueError, match=rf"model_0000003\.pth is of another model: {message}"):
        resume(folder, model)


def test_a_model_that_is_not_finite_is_not_saved(folder):
    model = nn.Linear(100, 1, bias=False)
    model.weight.data[0, 5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite \(weight\): model_0000004\.pth is not written"):
        MNCCheckpointer(model, str(folder)).save("model_0000004", iteration=4)
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    assert not (folder / "model_0000004.pth").exists()


def test_only_the_newest_are_kept(folder):
    checkpointer = MNCCheckpointer(nn.Linear(100, 1, bias=False), str(folder))
    checkpointer.save("model_final", iteration=3)
    checkpointer.remove_old(keep=2)
    assert sorted(x.stem for x in folder.glob("*.pth")) == ["model_0000002", "model_0000003", "model_final"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    checkpointer = MNCCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()
    save = torch.save

    def save_half(data, file):
        save(data, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    torch.nn.init.zeros_(checkpointer.model.weight)
    with pytest.raises(OSError, match=r"model_final\.pth cannot be written: No space left"):
        checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]
