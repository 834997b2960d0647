"""The configs of this project by name, from a clone or an installed wheel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_mnc_config
from ..removed_keys import refuse_removed_keys
from .upgrade import upgrade

__all__ = ["get_config", "get_config_file", "load_config", "merge_overrides", "parse_config"]

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the configs beside this file; a clone has them at its top.
_ROOTS = (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs")


def get_config_file(name: str) -> str:
    """Return the path of a config.

    Args:
        name: path relative to configs/, such as "quickstart/mnc_R_18_FPN.yaml"; or a file, which is returned as it is.

    Raises:
        FileNotFoundError: there is no such config; the message lists those there are.
    """
    if os.path.isfile(name):
        return name
    for root in _ROOTS:
        if (root / name).is_file():
            return str(root / name)
    known = sorted({str(path.relative_to(root)) for root in _ROOTS for path in root.rglob("*.yaml")})
    raise FileNotFoundError(f"There is no config file {name!r}, nor a config of that name. Known: {', '.join(known)}")


def get_config(name: str) -> CfgNode:
    """Return a config by name, as :func:`get_config_file` finds it, with MNC's keys added and not frozen."""
    return load_config(get_config_file(name))


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Return a config with MNC's keys, not frozen. Files of earlier versions are upgraded where they mean the same.

    Args:
        name_or_file: a YAML file, or the name of one of this project's configs as :func:`get_config_file` takes it; ""
            for the defaults.
        overrides: KEY VALUE pairs.

    Raises:
        FileNotFoundError: there is no such file, nor a config of that name; or a file that it inherits from is missing.
        ValueError: the file or an override is wrong; the message says where. YAML tags that build Python objects, which
            would run code, are among what is wrong.
    """
    cfg = get_cfg()
    add_mnc_config(cfg)
    if name_or_file:
        file = get_config_file(name_or_file)
        with _named_errors(file):
            loaded = upgrade(_mapping(CfgNode.load_yaml_with_base(file, allow_unsafe=False)))
            if loaded.get("VERSION", cfg.VERSION) != cfg.VERSION:
                raise ValueError(f"VERSION is {loaded['VERSION']}. It must be {cfg.VERSION}, Detectron2's own.")
            cfg.merge_from_other_cfg(CfgNode(loaded))
            _refuse_bombs(cfg)
    merge_overrides(cfg, overrides)
    return cfg


def parse_config(text: str, source: str) -> CfgNode:
    """Return the config that ``cfg.dump()`` made a text of, not frozen; keys that it lacks have their defaults.

    A dump of an earlier version is upgraded where it means the same.

    Args:
        text: YAML without ``_BASE_``.
        source: what messages call it.

    Raises:
        ValueError: the text is no such config; the message says where.
    """
    cfg = get_cfg()
    add_mnc_config(cfg)
    with _named_errors(source):
        cfg.merge_from_other_cfg(CfgNode(upgrade(_mapping(yaml.safe_load(text)))))
        _refuse_bombs(cfg)
    return cfg


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Set KEY VALUE pairs in a config, in place.

    Raises:
        ValueError: a key or value is wrong; the message says which.
    """
    with _named_errors("KEY VALUE overrides"):
        refuse_removed_keys(overrides[::2])
        cfg.merge_from_list(list(overrides))


def _mapping(loaded: Any) -> dict[str, Any]:
    """Return what a YAML text holds, if that is keys and values, or nothing."""
    if not isinstance(loaded, dict) and loaded is not None:
        raise ValueError("it must be keys and values")
    return loaded or {}


def _refuse_bombs(cfg: CfgNode) -> None:
    """Raise a ValueError if aliases of aliases make lists so long that nothing comes to an end with them."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, (dict, list, tuple)):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = sum(map(size, value.values() if isinstance(value, dict) else value))
        return sizes[id(value)]

    if size(cfg) > 10**6:
        raise ValueError(f"it stands for {size(cfg)} values, by aliases of aliases")


@contextlib.contextmanager
def _named_errors(source: str) -> Iterator[None]:
    """Turn what yacs and yaml raise (AssertionError, KeyError, YAMLError, ...) into a ValueError with the source."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{source}: {error}") from error
