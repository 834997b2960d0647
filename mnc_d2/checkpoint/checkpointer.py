"""Checkpoints: read without running code, into all places that start from the same weights; written and found whole."""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from iopath.common.file_io import PathManager
from tabulate import tabulate

from ..files import open_atomically
from ..messages import first_few
from ..pickled import read_pickle
from .conversion import convert_torchvision_vgg16, copy_to_all, rename_heads_of_passes


class MNCCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also

    - refuses to run code from a checkpoint: it may hold tensors, arrays and plain Python values only, also as ``.pkl``
      (the model zoos of Detectron2 and Detectron) and ``.pyth`` (pycls);
    - loads a torchvision VGG-16 trained on ImageNet, see
      :func:`~mnc_d2.checkpoint.conversion.convert_torchvision_vgg16`;
    - starts both paths of MNC's classifier from the same weights, such as res5 of an ImageNet ResNet, where Detectron2
      stops at a parameter that matches twice;
    - writes files that are whole whenever they are there, also where a training is killed while it saves, and none with
      a weight that is not finite;
    - resumes from the newest whole checkpoint of the folder where the one that ``last_checkpoint`` names is not whole;
    - refuses files that are damaged, have nothing for the model, or weights that are not finite; and, where a training
      is resumed, those that are not of its whole model;
    - says in a table how much of each module was loaded. The names of what was not are in Detectron2's own messages.
    """

    path_manager: PathManager | _AtomicWrites

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.path_manager = _AtomicWrites(self.path_manager)
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model and checkpointables, in the main process.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
            OSError: the file cannot be written; the message names it. What was there is as it was.
        """
        if self.save_dir and self.save_to_disk:
            broken = _not_finite(self.model.state_dict())
            if broken:
                raise FloatingPointError(
                    f"The model has weights that are not finite ({first_few(broken, 3)}): {name}.pth is not written."
                )
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # PyTorch turns some errors of writing into RuntimeError
            path = os.path.join(self.save_dir, f"{name}.pth")
            raise OSError(
                f"The checkpoint {path} cannot be written: {error}. --resume goes on from the last."
            ) from error

    def remove_old(self, keep: int) -> None:
        """Remove the periodic checkpoints, ``model_<iteration>.pth``, but for the newest ``keep``."""
        files = [x for x in os.listdir(self.save_dir) if re.fullmatch(r"model_\d+\.pth", x)]
        for name in sorted(files, key=lambda x: int(x[len("model_") : -len(".pth")]))[:-keep]:
            os.remove(os.path.join(self.save_dir, name))

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the checkpoint to resume from: what ``last_checkpoint`` names, or the newest whole one in its folder.

        Returns:
            its path; "" if the folder has no checkpoints.

        Raises:
            ValueError: the folder has checkpoints, and none of them is whole; the message says what each is.
        """
        paths = glob.glob(os.path.join(glob.escape(self.save_dir), "*.pth"))
        found = {path: _iteration_of(path) for path in paths}
        newest_first = sorted(paths, key=lambda x: found[x] if isinstance(found[x], int) else -1, reverse=True)
        tagged = self._tagged_file()
        if tagged is not None:
            newest_first = [tagged, *(x for x in newest_first if x != tagged)]
        problems: list[str] = []
        for path in newest_first:
            iteration = found.get(path, "is not in the folder" if os.path.exists(path) else "does not exist")
            problem = iteration if isinstance(iteration, str) else _find_problem(path)
            if problem is None:
                if problems:
                    self.logger.warning(f"{'; '.join(problems)}. The training is resumed from {path}.")
                return path
            problems.append(f"{path} {problem}")
        if paths:
            raise ValueError(f"No checkpoint can be resumed from: {'; '.join(problems)}. Move them away to start anew.")
        for problem in problems:
            self.logger.warning(f"{problem}, and there is no other checkpoint to resume from.")
        return ""

    def _tagged_file(self) -> str | None:
        try:
            with open(os.path.join(self.save_dir, "last_checkpoint"), encoding="utf-8") as file:
                name = file.read().strip()
        except FileNotFoundError:
            return None
        except ValueError:
            name = "?"  # not text
        return os.path.join(self.save_dir, name or "?")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the checkpoint to resume from, with all checkpointables, or, without any, the model from ``path``.

        Raises:
            ValueError: the checkpoint cannot be used; the message names it and says why.
        """
        last = self.get_checkpoint_file() if resume else ""
        if not last:
            return self.load(path, checkpointables=[])
        self._resuming = True
        try:
            return self.load(last)
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Detectron2 does.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a whole checkpoint that fits the model; the message names it and says why.
        """
        self._source = path
        try:
            return super().load(path, *args, **kwargs)
        except AssertionError as error:  # what Detectron2 says of a file that is not there
            raise FileNotFoundError(f"The checkpoint {path} does not exist: {error}") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it after an error, and then loads nothing any more

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a file of any format that Detectron2 knows, as it does but without running code.

        Raises:
            ValueError: the file is no checkpoint of its format; the message names it.
        """
        if filename.endswith(".pkl"):
            content = read_pickle(filename)
            if "model" in content and "__author__" in content:
                _check_weights(filename, content["model"])
                return content
            # Detectron's ImageNet models have no "blobs".
            weights = _check_weights(filename, content.get("blobs", content))
            weights = {name: x for name, x in weights.items() if not name.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            weights = _check_weights(filename, _read_torch(filename).get("model_state"))
            weights = {name: x for name, x in weights.items() if not name.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        """Read a file of ``torch.save``; return a state dict, or a dict that has one as "model".

        Raises:
            ValueError: the file holds more than tensors and plain values, is damaged, or has no state dict.
        """
        loaded = _read_torch(f)
        # PyTorch's ImageNet example saves under this name.
        if "model" not in loaded and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
        _check_weights(f, loaded.get("model", loaded))
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]):
        """Bring the names in the checkpoint to the model's, then load as Detectron2 does."""
        if not checkpoint["model"]:
            raise ValueError(f"The checkpoint {self._source} holds no weights.")
        model_keys = list(self.model.state_dict())
        if any(key.startswith("roi_heads.passes.") for key in model_keys):
            checkpoint["model"] = rename_heads_of_passes(checkpoint["model"], model_keys)
        checkpoint["model"] = convert_torchvision_vgg16(checkpoint["model"], model_keys)
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            if checkpoint.get("__author__") == "Caffe2":
                # Detectron2 renames and matches in one call; the copies have to be made in between.
                checkpoint["model"], _ = convert_c2_detectron_names(checkpoint["model"])
                del checkpoint["__author__"]  # else it would rename again
            checkpoint["model"] = copy_to_all(checkpoint["model"], model_keys)
        incompatible = super()._load_model(checkpoint)
        self._check_loaded(incompatible)
        return incompatible

    def _check_loaded(self, incompatible) -> None:
        """Raise a ValueError if nothing was loaded, what was is not finite, or, in a resume, something was not."""
        state = self.model.state_dict()
        shapes = [
            f"{name} is {tuple(found)} in the checkpoint and {tuple(wanted)} in the model"
            for name, found, wanted in incompatible.incorrect_shapes
        ]
        if self._resuming and shapes:
            raise ValueError(
                f"The checkpoint {self._source} is of another model: {first_few(shapes, 3, '; ')}. "
                "Resume with the config that the training was started with."
            )
        if self._resuming and incompatible.missing_keys:
            raise ValueError(
                f"The checkpoint {self._source} is of another model: it lacks "
                f"{first_few(incompatible.missing_keys, 3)}. "
                "Resume with the config that the training was started with."
            )
        # Shapes that do not fit come from other classes, mostly, from which a training may well start.
        if state and len(incompatible.missing_keys) == len(state) and not shapes:
            raise ValueError(f"The checkpoint {self._source} has nothing for this model: no name of a tensor agrees.")
        broken = _not_finite(state)
        if broken:
            raise ValueError(f"The checkpoint {self._source} has weights that are not finite: {first_few(broken, 3)}.")

    def _log_incompatible_keys(self, incompatible) -> None:
        """Log Detectron2's messages, then how much of each module was loaded."""
        super()._log_incompatible_keys(incompatible)
        keys = list(self.model.state_dict())
        missing = set(incompatible.missing_keys)
        total = Counter(module_of(key) for key in keys)
        loaded = Counter(module_of(key) for key in keys if key not in missing)
        message = f"Loaded {len(keys) - len(missing)} of the model's {len(keys)} tensors; "
        message += f"{len(incompatible.unexpected_keys)} of the checkpoint's are not used."
        if missing:
            rows = [(module, f"{loaded[module]} of {count}") for module, count in total.items()]
            message += "\n" + tabulate(rows, headers=["module", "tensors loaded"], tablefmt="pipe")
        self.logger.info(message)


class _AtomicWrites:
    """A path manager whose files, where they are written, are written by :func:`~mnc_d2.files.open_atomically`."""

    def __init__(self, path_manager) -> None:
        self._path_manager = path_manager

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode:
            return self._path_manager.open(path, mode, **kwargs)
        return open_atomically(self._path_manager.get_local_path(path), mode, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)


def module_of(key: str) -> str:
    """Return the part that a parameter belongs to: "backbone", "roi_heads.box_head", "roi_heads.passes.0.mask_head"."""
    match = re.match(r"(roi_heads\.passes\.\d+\.(?:classifier\.)?\w+|roi_heads\.\w+|\w+)\.", key)
    return match[1] if match else key


def _read_torch(path: str) -> dict[str, Any]:
    """Read a dict from a file of ``torch.save``; errors are :meth:`MNCCheckpointer._torch_load`'s."""
    damage = _find_damage(path)
    if damage:
        raise ValueError(f"The checkpoint {path} {damage}.")
    try:
        # Plain values: the optimiser's and the scheduler's state, which a training resumes from.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads to errors of all kinds
        raise ValueError(
            f"The checkpoint {path} cannot be loaded: it is damaged, or holds Python objects besides tensors, which "
            "could run any code. If you trust it, open it with the program that made it and save the weights "
            "alone, by torch.save(model.state_dict(), path)."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"The checkpoint {path} holds a {type(loaded).__name__} where a state dict should be.")
    return loaded


def _check_weights(path: str, weights: Any) -> Mapping[str, torch.Tensor | np.ndarray]:
    """Return the weights of a checkpoint; raise a ValueError if they are not tensors or arrays by name."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"The checkpoint {path} holds a {type(weights).__name__} where a state dict should be.")
    for name, value in weights.items():
        kind = None if isinstance(value, (torch.Tensor, np.ndarray)) else type(value).__name__
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_meta):
            kind = "sparse tensor" if value.layout != torch.strided else "tensor without content"
        if kind or not isinstance(name, str):
            raise ValueError(f"The checkpoint {path} holds a {kind or 'tensor'} {name!r} among the weights.")
    return weights


def _find_damage(path: str) -> str | None:
    """Return what is wrong with a file of ``torch.save``, or None; PyTorch does not look at its check sums."""
    if os.path.getsize(path) == 0:
        return "is empty"
    try:
        if zipfile.is_zipfile(path):  # else it is of the format before PyTorch 1.6, or no checkpoint
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            return f"is damaged: {damaged} in it has another check sum than when it was written" if damaged else None
    except Exception as error:  # a damaged header leads to errors of many kinds
        return f"is damaged: {error}"
    return None


def _read_lazily(path: str) -> Any:
    """Read a checkpoint; tensors are read when they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _iteration_of(path: str) -> int | str:
    """Return the iteration after which a checkpoint of a training was saved, or why it cannot be resumed from."""
    try:
        checkpoint = _read_lazily(path)
    except Exception:  # as above
        return "is damaged" if os.path.getsize(path) else "is empty"
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict):
        trainer = checkpoint.get("trainer")
        iteration = checkpoint.get("iteration", trainer.get("iteration") if isinstance(trainer, dict) else None)
        if isinstance(iteration, int):
            return iteration
    return "is not a checkpoint of a training"


def _find_problem(path: str) -> str | None:
    """Return what is wrong with a checkpoint that can be read, or None."""
    damage = _find_damage(path)
    if damage is None and _not_finite(_read_lazily(path)["model"]):
        return "has weights that are not finite"
    return damage


def _not_finite(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors with elements that are not finite."""
    return [name for name, x in state_dict.items() if not torch.isfinite(x).all()]
