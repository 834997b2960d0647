"""Batches of training images, from any place on and the same whatever number of processes load them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.utils.data
from detectron2.config import CfgNode
from detectron2.data import MapDataset, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.utils import comm

from ..randomness import IMAGE, SAMPLER, seeded

__all__ = ["TrainLoader", "build_train_loader"]


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict | None]) -> Iterable[list[dict]]:
    """Build the loader of DATASETS.TRAIN, with the sampler and the grouping of images that DATALOADER asks for.

    Args:
        cfg: the config; a SEED of -1 stands for one that is drawn here.
        mapper: from a record of the dataset to an input of the model.

    Returns:
        a :class:`TrainLoader`; for a dataset that is an iterable, which has no order to begin in the middle of,
        Detectron2's own loader.
    """
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    with seeded(SAMPLER, seed):  # samplers draw a seed of their own
        loader = build_detection_train_loader(cfg, mapper=_identity, aspect_ratio_grouping=False, num_workers=0)
    if not isinstance(loader.dataset, ToIterableDataset):
        return build_detection_train_loader(cfg, mapper=mapper)
    return TrainLoader(
        loader.dataset.dataset,
        mapper,
        loader.dataset.sampler,
        seed=seed,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class TrainLoader:
    """Endless batches for this process: what Detectron2's training loader gives, as a function of seed and place.

    Two things differ from it. Batches are composed in this process and not in the workers, so that they do not depend
    on the number of these. And what is drawn at random for an image depends on nothing but the seed and its position in
    the stream of all processes.

    Attributes:
        start: the number of batches to leave out at the beginning.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict | None],
        sampler: Iterable[int],
        *,
        seed: int,
        batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
    ) -> None:
        """
        Args:
            records: of the images, in Detectron2's format.
            mapper: from a record to an input of the model.
            sampler: endless indices of records for this process: every n-th of the n processes' common stream.
            seed: of what is drawn for the images; not negative.
            batch_size: images to a batch of this process.
            aspect_ratio_grouping: whether a batch has only images that are wider than high, or only others.
            num_workers: processes that load images; 0 to load them in this one.
        """
        self.start = 0
        self._images = _SeededImages(MapDataset(records, mapper), seed)
        self._sampler = sampler
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._sizes = None
        if aspect_ratio_grouping:
            self._sizes = [{key: record[key] for key in ("width", "height")} for record in records]

    def __iter__(self) -> Iterator[list[dict]]:
        loader = torch.utils.data.DataLoader(
            self._images,
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # It would draw from PyTorch's global state, here and so once more after a resume.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of images, each as its position in the processes' common stream and its index."""
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        images = zip(positions, self._sampler)
        if self._sizes is None:
            while True:
                yield list(itertools.islice(images, self._batch_size))
        with_sizes = ({**self._sizes[image[1]], "image": image} for image in images)
        for batch in AspectRatioGroupedDataset(with_sizes, self._batch_size):
            yield [x["image"] for x in batch]


class _SeededImages(torch.utils.data.Dataset):
    def __init__(self, dataset: torch.utils.data.Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, image: tuple[int, int]) -> Any:
        position, index = image
        with seeded(IMAGE, self._seed, position):
            return self._dataset[index]


def _identity(record: dict) -> dict:
    return record
