"""Where datasets lie, and what has to be there before one is used."""

from __future__ import annotations

import os

from detectron2.data import MetadataCatalog

__all__ = ["datasets_root", "prepare_dataset"]


def datasets_root() -> str:
    """Return the folder of all datasets, as for Detectron2's own: $DETECTRON2_DATASETS, else ./datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def prepare_dataset(name: str) -> None:
    """Make the files of a dataset that makes them itself, unless they are there; of any other, see that they are.

    Loading a shapes dataset does the same. A program that starts several processes calls this before, so that one of
    them draws instead of each, and so that a missing dataset is noticed before anything starts.

    Args:
        name: a registered dataset, this package's, Detectron2's or the user's. Where its metadata has `prepare`, that
            is called.

    Raises:
        FileNotFoundError: its annotations are not there. The message names the file and what to do.
    """
    metadata = MetadataCatalog.get(name)
    if "prepare" in metadata.as_dict():
        metadata.prepare()
        return
    for part in metadata.get("parts", ()):
        prepare_dataset(part)
    # `dirname` is the folder of Detectron2's VOC datasets.
    path = metadata.get("json_file") or metadata.get("dirname")
    if path is None or "://" in path or os.path.exists(path):
        return
    command = metadata.get("prepare_command")
    advice = f"Run `{command}`" if command else "Put it there or set DETECTRON2_DATASETS"
    raise FileNotFoundError(f"Dataset '{name}' needs {path}, which does not exist. {advice}: see datasets/README.md.")
