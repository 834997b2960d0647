"""Loading of weights: without running code from files, and into all places that start from the same weights."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from tabulate import tabulate

from ..files import open_atomically
from .conversion import convert_torchvision_vgg16, copy_to_all


class MNCCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also

    - refuses to run code from a checkpoint: all but ``.pkl`` and ``.pyth`` files, which are read as Detectron2 does
      (its model zoo is pickled), may hold tensors and plain Python values only;
    - loads a torchvision VGG-16 trained on ImageNet, see
      :func:`~mnc_d2.checkpoint.conversion.convert_torchvision_vgg16`;
    - starts both paths of MNC's classifier from the same weights, such as res5 of an ImageNet ResNet, where Detectron2
      stops at a parameter that matches twice;
    - writes files that are whole whenever they are there, also where a training is killed while it saves;
    - says in a table how much of each module was loaded. The names of what was not are in Detectron2's own messages.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.path_manager = _AtomicWrites(self.path_manager)

    def _torch_load(self, f: str) -> dict[str, Any]:
        """Read a file of ``torch.save``; return a state dict, or a dict that has one as "model".

        Raises:
            ValueError: the file holds more than tensors and plain values, is damaged, or has no state dict.
        """
        try:
            # Plain values: the optimiser's and the scheduler's state, which a training resumes from.
            loaded = torch.load(f, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"The checkpoint {f} cannot be loaded: it is damaged, or holds Python objects besides tensors, which "
                "could run any code. If you trust it, open it with the program that made it and save the weights "
                "alone, by torch.save(model.state_dict(), path)."
            ) from error
        if not isinstance(loaded, dict):
            raise ValueError(f"The checkpoint {f} holds a {type(loaded).__name__} where a state dict should be.")
        # PyTorch's ImageNet example saves under this name.
        if "model" not in loaded and isinstance(loaded.get("state_dict"), dict):
            return loaded["state_dict"]
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]):
        """Bring the names in the checkpoint to those of the model, then load as Detectron2 does."""
        model_keys = list(self.model.state_dict())
        checkpoint["model"] = convert_torchvision_vgg16(checkpoint["model"], model_keys)
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            if checkpoint.get("__author__") == "Caffe2":
                # Detectron2 renames and matches in one call; the copies have to be made in between.
                checkpoint["model"], _ = convert_c2_detectron_names(checkpoint["model"])
                del checkpoint["__author__"]  # else it would rename again
            checkpoint["model"] = copy_to_all(checkpoint["model"], model_keys)
        return super()._load_model(checkpoint)

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
        # A checkpoint with nothing for the model is hardly what anyone wants.
        (self.logger.info if loaded else self.logger.warning)(message)


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
    """Return the part of the model that a parameter belongs to: "backbone", "roi_heads.mask_head", ..."""
    parts = key.split(".")[:-1]
    return ".".join(parts[: 2 if parts[:1] == ["roi_heads"] else 1]) or key
