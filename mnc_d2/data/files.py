"""What has to be on disk before a dataset is used."""

import os

from detectron2.data import MetadataCatalog

from .shapes import ShapesMetadata

__all__ = ["prepare_dataset"]


def prepare_dataset(name: str) -> None:
    """Draw the files of a shapes dataset unless they are there; of any other, see that the annotations are.

    Loading a shapes dataset does the same. A program that starts several processes calls this before, so that one of
    them draws instead of each, and so that a missing dataset is noticed before anything starts.

    Args:
        name: a registered dataset, this package's, Detectron2's or the user's.

    Raises:
        FileNotFoundError: its annotations are not there. The message names the file and what to do.
    """
    metadata = MetadataCatalog.get(name)
    if isinstance(metadata, ShapesMetadata):
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
