"""What the values of config keys can be wrong in: the checks of mnc_d2.config's tables.

A check takes the value of a key and the config. It returns what is wrong, as a sentence, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from detectron2.config import CfgNode as CN

from .modeling.causal_gradients import CausalGradients

Check = Callable[[Any, CN], str | None]


def anything(value: Any, cfg: CN) -> None:
    """Accept what yacs accepts: values of the type of the default."""


def numbers(holds: Callable[[float], bool], what: str) -> Check:
    """Return a check of a number, or of every number in a list."""

    def check(value: Any, cfg: CN) -> str | None:
        right = all(isinstance(x, (int, float)) and holds(x) for _, x in leaves(value))
        return None if right else f"It must be {what}."

    return check


def one_of(*choices: str) -> Check:
    return lambda value, cfg: None if value in choices else f"It must be one of {', '.join(choices)}."


def all_of(*checks: Check) -> Check:
    return lambda value, cfg: next(filter(None, (check(value, cfg) for check in checks)), None)


positive = numbers(lambda x: x > 0, "positive")
not_negative = numbers(lambda x: x >= 0, "0 or more")
fraction = numbers(lambda x: 0 <= x <= 1, "between 0 and 1")


def gradients(value: str, cfg: CN) -> str | None:
    CausalGradients.parse(value)  # whose error names the key
    return None


def bands(value: list, cfg: CN) -> str | None:
    if value and all(isinstance(band, (list, tuple)) and len(band) == 3 for band in value):
        return fraction(value, cfg)
    return "It must be rows of [IoU from, IoU to, share of the background]."


def outputs(value: list, cfg: CN) -> str | None:
    names = ("instances", "box_instances", "passes")
    right = "instances" in value and all(x in names for x in value)
    return None if right else 'It must be "instances" and possibly "box_instances" and "passes".'


def integers(value: Any, cfg: CN) -> str | None:
    return None if all(isinstance(x, int) for x in value) else "It must be integers."


def not_empty(value: Any, cfg: CN) -> str | None:
    return None if value else "It must not be empty."


def ascending(value: Any, cfg: CN) -> str | None:
    return None if list(value) == sorted(set(value)) else "It must be in ascending order."


def four(value: Any, cfg: CN) -> str | None:
    return None if len(value) == 4 else "It must have four numbers, for x, y, width and height."


def with_anchors(value: Any, cfg: CN) -> str | None:
    return None if all(value) else "No feature map can be without anchors."


def seed(value: int, cfg: CN) -> str | None:
    return None if value < 2**31 else "It must be less than 2^31; -1 stands for a seed that is drawn."


def length_of(other: str, more: int) -> Check:
    """Return a check that the list of another key has so many elements more."""

    def check(value: Any, cfg: CN) -> str | None:
        wanted, length = len(value) + more, len(get(cfg, other))
        if length == wanted:
            return None
        return f"It has {len(value)} elements, so {other} must have {wanted}, not {length}."

    return check


def crop_type(value: str, cfg: CN) -> str | None:
    kinds = ("relative", "relative_range", "absolute", "absolute_range")
    return one_of(*kinds)(value, cfg) if cfg.INPUT.CROP.ENABLED else None


def crop_size(value: Any, cfg: CN) -> str | None:
    kind = cfg.INPUT.CROP.TYPE
    largest, number = (1, float) if kind.startswith("relative") else (math.inf, int)
    right = len(value) == 2 and all(isinstance(x, (int, number)) and 0 < x <= largest for x in value)
    if right or not cfg.INPUT.CROP.ENABLED:
        return None
    what = "shares of the image, up to 1" if largest == 1 else "positive integers, in pixels"
    return f"With INPUT.CROP.TYPE {kind} it must be two {what}."


def get(cfg: CN, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in a config, a list or a tuple that are none of these themselves, and the key of each."""
    if isinstance(value, dict):
        for name, x in value.items():
            yield from leaves(x, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from leaves(x, key)
    else:
        yield key, value
