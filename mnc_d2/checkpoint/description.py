"""What a checkpoint says of its model, so that nobody has to: config, classes, metrics."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.file_io import PathManager

from .. import __version__
from ..files import open_atomically
from ..messages import first_few
from ..model_zoo import load_config, parse_config
from .checkpointer import MNCCheckpointer

# The entry of a checkpoint beside "model".
DESCRIPTION_KEY = "description"


@dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint says of its model: plain values, which are read without running code.

    Attributes:
        config: the whole config, as YAML.
        class_names: by class index; empty where they are not known.
        class_colors: red, green and blue, 0 to 255, of each class; empty where the dataset has none.
        category_ids: the dataset's own id of each class; empty where it has none.
        dataset: the name of the training set.
        version: of this project, when the checkpoint was written.
        metrics: the newest value of every scalar that the training logged, results of evaluations among them.
    """

    config: str
    class_names: list[str] = field(default_factory=list)
    class_colors: list[list[int]] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    dataset: str = ""
    version: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_config(cls, cfg: CfgNode) -> ModelDescription:
        """Describe a model that is trained by a config, without metrics; classes are from the datasets in it."""
        name = next(iter((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)), "")
        # Asking for metadata of a name would register it. Plain attributes: asking a shapes dataset for its file would
        # draw it.
        metadata = MetadataCatalog.get(name).as_dict() if name in DatasetCatalog else {}
        names = [str(x) for x in metadata.get("thing_classes", ())]
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        if names and cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
        return cls(
            config=cfg.dump(),
            class_names=names,
            class_colors=[[int(x) for x in color] for color in metadata.get("thing_colors", ())],
            category_ids=[int(i) for i in sorted(ids, key=ids.get)],
            dataset=name,
            version=__version__,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelDescription:
        """Return what :func:`dataclasses.asdict` made a dict of; entries of later versions are left out.

        Raises:
            ValueError: it is no such dict.
        """
        if not isinstance(values, dict) or not isinstance(values.get("config"), str):
            raise ValueError("what it says of its model is no description with a config")
        description = cls(**{x.name: values[x.name] for x in fields(cls) if x.name in values})
        for name, is_right in (
            ("class_names", lambda x: isinstance(x, str)),
            ("class_colors", lambda x: isinstance(x, list) and len(x) == 3 and all(0 <= i <= 255 for i in x)),
            ("category_ids", lambda x: isinstance(x, int)),
        ):
            entries = getattr(description, name)
            if not isinstance(entries, list) or not all(map(is_right, entries)):
                raise ValueError(f"what it says of its model has {name} {entries}")
        return description

    def metadata(self, num_classes: int) -> Metadata:
        """Return the metadata of the classes, as Detectron2's visualizers take it, in no catalog.

        Args:
            num_classes: of the model. Where names are not known, they are "0", "1", ...
        """
        names = self.class_names or [str(i) for i in range(num_classes)]
        metadata = Metadata(name=self.dataset, thing_classes=names)
        if self.class_colors:
            metadata.thing_colors = self.class_colors
        metadata.thing_dataset_id_to_contiguous_id = {
            category_id: i for i, category_id in enumerate(self.category_ids or range(1, len(names) + 1))
        }
        return metadata


class DescribeModel:
    """A part of a checkpoint, as Detectron2's checkpointer takes it, that describes the model at the time of saving."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the config of the training, whose datasets are registered.
        """
        self._description = ModelDescription.of_config(cfg)

    def state_dict(self) -> dict[str, Any]:
        metrics = {}
        if has_event_storage():
            metrics = {name: float(value) for name, (value, _) in get_event_storage().latest().items()}
        return {**asdict(self._description), "metrics": metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: a training that goes on is described by the config that it goes on with."""


def read_description(path: str) -> ModelDescription:
    """Read what a checkpoint says of its model.

    Those that say nothing, of earlier versions, are described by the ``config.yaml`` beside them, which Detectron2's
    ``default_setup`` writes, and by the datasets in it as far as they are registered.

    Args:
        path: a file, or an address that Detectron2's ``PathManager`` knows.

    Raises:
        FileNotFoundError: there is no such file; or it says nothing, and there is no ``config.yaml`` beside it.
        ValueError: the file is no checkpoint.
    """
    file = PathManager.get_local_path(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"The model {path} does not exist.")
    description = {}
    if not file.endswith((".pkl", ".pyth")):  # formats of other projects
        description = read_checkpoint(file).get(DESCRIPTION_KEY, {})
    if description:
        try:
            described = ModelDescription.from_dict(description)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The checkpoint {path} is damaged: {error}.") from error
        cfg = parse_config(described.config, f"the config in {path}")
        _check_classes(path, described, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        return described
    config = os.path.join(os.path.dirname(file), "config.yaml")
    if not os.path.isfile(config):
        raise FileNotFoundError(
            f"The checkpoint {path} does not say what model it is of, and there is no {config} beside it. "
            "Name the config."
        )
    return ModelDescription.of_config(load_config(config))


def _check_classes(path: str, description: ModelDescription, num_classes: int) -> None:
    for name in ("class_names", "class_colors", "category_ids"):
        entries = getattr(description, name)
        if len(entries) not in (0, num_classes):
            raise ValueError(f"The checkpoint {path} is of a model of {num_classes} classes, and has {name} {entries}.")
    if len(set(description.category_ids)) < len(description.category_ids):
        raise ValueError(f"The checkpoint {path} has category_ids {description.category_ids}: two classes are one.")


def read_checkpoint(file: str) -> dict[str, Any]:
    """Read a whole checkpoint of tensors and plain values; the errors are :class:`MNCCheckpointer`'s."""
    return MNCCheckpointer(torch.nn.Identity())._torch_load(file)


def record_metrics(file: str, metrics: dict[str, float]) -> None:
    """Replace the metrics in a checkpoint, such as with results of an evaluation that ended after it was written."""
    checkpoint = read_checkpoint(file)
    checkpoint[DESCRIPTION_KEY] = {**checkpoint.get(DESCRIPTION_KEY, {}), "metrics": metrics}
    with open_atomically(file) as target:
        torch.save(checkpoint, target)


class CompleteCheckpointer(MNCCheckpointer):
    """Loads models to be used as they are: all of their weights come from the checkpoint, and all are finite.

    :class:`MNCCheckpointer` leaves what does not fit or is missing as it was initialised, to be trained.
    """

    def _load_model(self, checkpoint: dict[str, Any]):
        """Load the weights.

        Raises:
            ValueError: the model has others, in number or shape, or some are not finite; the message names them.
        """
        incompatible = super()._load_model(checkpoint)
        where = f"The checkpoint {self._source} does not fit the model"
        if incompatible.incorrect_shapes:
            shapes = [
                f"{name} is {tuple(found)} in the checkpoint and {tuple(wanted)} in the model"
                for name, found, wanted in incompatible.incorrect_shapes
            ]
            raise ValueError(
                f"{where}: {first_few(shapes, 3, '; ')}. Is MODEL.ROI_HEADS.NUM_CLASSES, or another key, not that of "
                "its training?"
            )
        if incompatible.missing_keys:
            raise ValueError(f"{where}: it lacks {first_few(incompatible.missing_keys, 3)}.")
        broken = [name for name, x in self.model.state_dict().items() if not torch.isfinite(x).all()]
        if broken:
            raise ValueError(
                f"The checkpoint {self._source} has weights that are not finite: "
                f"{first_few(broken, 3)}. Take one that was written before the training diverged."
            )
        return incompatible
