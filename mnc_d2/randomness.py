"""Random states as a function of the place in a training, so that one that is resumed draws what it would have drawn.

Nothing is saved for it. Python's, NumPy's and PyTorch's global states, which Detectron2's augmentations and samplers of
RoIs draw from, are seeded by the seed of the run and the number of the iteration or image.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# The first number of a key says what is drawn.
SAMPLER, IMAGE, STEP = range(3)


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and PyTorch, on all devices, by integers of which none is negative."""
    torch.manual_seed(_seed_cpu(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw on the CPU as after :func:`seed_all`; afterwards the states are as before."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        _seed_cpu(key)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _seed_cpu(key: tuple[int, ...]) -> int:
    words = np.random.SeedSequence(key).generate_state(4)
    number = int.from_bytes(words[:2].tobytes(), "little")
    random.seed(number)
    np.random.seed(words)
    torch.default_generator.manual_seed(number)
    return number
