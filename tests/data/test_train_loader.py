"""Batches of training images as a function of the seed and the place in the stream."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from mnc_d2.data.train_loader import TrainLoader
from mnc_d2.randomness import STEP, seed_all, seeded

RECORDS = [{"id": i, "width": 40 + i % 2 * 20, "height": 50} for i in range(5)]  # two wider than high, three not


def draw(record):
    """A mapper that draws from all three states."""
    return {**record, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def take(number, start=0, workers=0, batch_size=2, grouping=True, seed=7):
    loader = TrainLoader(
        DatasetFromList(RECORDS),
        draw,
        TrainingSampler(len(RECORDS), seed=1),
        seed=seed,
        batch_size=batch_size,
        aspect_ratio_grouping=grouping,
        num_workers=workers,
    )
    loader.start = start
    return [batch for batch, _ in zip(loader, range(number))]


@pytest.mark.parametrize("grouping", [True, False])
def test_the_stream_can_begin_anywhere_with_any_number_of_workers(grouping):
    whole = take(9, grouping=grouping)
    assert take(4, start=5, workers=2, grouping=grouping) == whole[5:]
    drawn = [image["drawn"] for batch in whole for image in batch]
    assert len(set(drawn)) == len(drawn)


def test_batches_have_images_of_one_orientation_and_every_image_comes_in_turn():
    batches = take(10)
    assert all(len({image["width"] > image["height"] for image in batch}) == 1 for batch in batches)
    order = [image["id"] for batch in take(5, grouping=False) for image in batch]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))


def test_another_seed_draws_other_numbers_for_the_same_images():
    (first,), (second,) = take(1), take(1, seed=8)
    assert [x["id"] for x in first] == [x["id"] for x in second]
    assert not {x["drawn"] for x in first} & {x["drawn"] for x in second}


def test_two_processes_have_the_images_of_one_with_twice_the_batch(monkeypatch):
    whole = take(3, batch_size=4, grouping=False)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(3, batch_size=2, grouping=False))
    assert [[a, c, b, d] for (a, b), (c, d) in zip(*parts)] == whole


def test_loading_leaves_the_random_states_of_the_process_alone():
    seed_all(STEP, 1)
    expected = draw({})
    seed_all(STEP, 1)
    take(2)
    assert draw({}) == expected


def test_keys_that_differ_draw_different_numbers():
    def numbers(*key):
        with seeded(*key):
            return draw({})["drawn"]

    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (2, 1, 2, 1), (2, 1, 2, 2)]
    drawn = [x for key in keys for x in numbers(*key)]
    assert len(set(drawn)) == len(drawn)
    assert numbers(*keys[0]) == numbers(*keys[0])
