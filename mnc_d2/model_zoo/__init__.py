"""The configs of this project by name, from a clone or an installed wheel."""

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from ..config import add_mnc_config

__all__ = ["get_config", "get_config_file"]

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the configs beside this file; a clone has them at its top.
_ROOTS = (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs")


def get_config_file(name: str) -> str:
    """Return the path of a config.

    Args:
        name: path relative to configs/, such as "quickstart/mnc_R_18_FPN.yaml".

    Raises:
        FileNotFoundError: there is no such config; the message lists those there are.
    """
    for root in _ROOTS:
        if (root / name).is_file():
            return str(root / name)
    known = sorted({str(path.relative_to(root)) for root in _ROOTS for path in root.rglob("*.yaml")})
    raise FileNotFoundError(f"There is no config {name!r}. Configs: {', '.join(known)}")


def get_config(name: str) -> CfgNode:
    """Return a config by name, as :func:`get_config_file` finds it, with MNC's keys added and not frozen."""
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.merge_from_file(get_config_file(name), allow_unsafe=False)
    return cfg
