"""Configs with keys of earlier versions, as this version understands them."""

from __future__ import annotations

import ast
import contextlib
import copy
import logging
from dataclasses import replace
from functools import reduce
from typing import Any

from ..modeling import CausalGradients
from ..removed_keys import GRADIENT_FIELDS, REPLACEMENTS, RULES, refuse

logger = logging.getLogger(__name__)

_PAPER_HEADS = ("PaperMNCROIHeads", "UnsharedMNCROIHeads", "CFMROIHeads", "CaffeMNCROIHeads")


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without removed keys that means the same.

    Args:
        config: what a YAML file or a dump holds, nested; it is left as it is.

    Raises:
        ValueError: this version has nothing that does the same; the message names the key and what replaced it.
    """
    config = copy.deepcopy(config)
    old = {key: _pop(config, key) for key in REPLACEMENTS if _name(key) in _section(config, key)}
    if _get(config, "MODEL.VGG") == {}:
        del config["MODEL"]["VGG"]
    new: dict[str, Any] = {}
    if any(key in old for key in GRADIENT_FIELDS):
        gradients = CausalGradients.parse(_get(config, "MODEL.MNC.GRADIENTS") or "default")
        fields = {GRADIENT_FIELDS[key]: value for key, value in old.items() if key in GRADIENT_FIELDS}
        new["MODEL.MNC.GRADIENTS"] = str(replace(gradients, **fields))
    if "MODEL.MNC.BACKGROUND_IOU_BANDS" in old or "MODEL.MNC.BACKGROUND_FRACTIONS" in old:
        bands = old.get("MODEL.MNC.BACKGROUND_IOU_BANDS", [[0.1, 0.5], [0.0, 0.1]])
        shares = old.get("MODEL.MNC.BACKGROUND_FRACTIONS", [0.85, 0.15])
        if len(bands) != len(shares):
            refuse("MODEL.MNC.BACKGROUND_FRACTIONS")
        new["MODEL.MNC.BACKGROUND_BANDS"] = [[*band, share] for band, share in zip(bands, shares)]
    if "TEST.EVALUATOR" in old or "TEST.MORE_EVALUATORS" in old:
        new["TEST.EVALUATORS"] = [old.get("TEST.EVALUATOR", "auto"), *old.get("TEST.MORE_EVALUATORS", [])]
    if _get(config, "DATASETS.MASK_PROPOSALS") and not _get(config, "INPUT.DATASET_MAPPER_NAME"):
        new["INPUT.DATASET_MAPPER_NAME"] = "MaskProposalMapper"
    if old:
        new.update(_components(config, old))
    for key, value in new.items():
        reduce(lambda node, part: node.setdefault(part, {}), key.split(".")[:-1], config)[_name(key)] = value
    return config


def _components(config: dict[str, Any], old: dict[str, Any]) -> dict[str, str]:
    """Return the names, by key, of the components that do what the removed keys say; refuse what none of them does."""
    heads, backbone = (_get(config, f"MODEL.{x}.NAME") or "" for x in ("ROI_HEADS", "BACKBONE"))
    features = list(_get(config, "MODEL.ROI_HEADS.IN_FEATURES") or [])
    mask_features = [x.replace("categories.", "masks.") for x in features]
    rules = {key: old.get(key, x[2 if heads in _PAPER_HEADS else 0]) for key, x in RULES.items()}
    if heads == "MNCROIHeads" and all(rules[key] == x[2] for key, x in RULES.items()):
        heads = "PaperMNCROIHeads"
    if backbone == "build_unshared_backbone" and old.get("MODEL.MNC.MASK_IN_FEATURES") == mask_features != features:
        heads = "UnsharedMNCROIHeads" if heads in ("MNCROIHeads", "PaperMNCROIHeads") else heads
    if backbone == "build_vgg_backbone" and old.get("MODEL.VGG.CEIL_MODE"):
        backbone = "build_caffe_vgg_backbone"
    is_vgg = backbone in ("build_vgg_backbone", "build_caffe_vgg_backbone", "build_unshared_backbone")
    rpn_features = _get(config, "MODEL.RPN.IN_FEATURES") or []
    timm_features = _get(config, "MODEL.FPN.IN_FEATURES") if "fpn" in backbone else {*features, *rpn_features}
    is_kept = {  # whether the components do what a key says
        "MODEL.MNC.MASK_TARGET_THRESHOLD": lambda x: x == 0.5,
        "MODEL.MNC.MASK_IOU_THRESHOLD": lambda x: x == 0.5,
        "MODEL.MNC.VOTING_IOU_THRESHOLD": lambda x: x == 0.5,
        "MODEL.MNC.ROI_WARP_SAMPLING": lambda x: x == ("caffe" if heads == "CaffeMNCROIHeads" else "center"),
        "MODEL.MNC.MASK_IN_FEATURES": lambda x: (
            (x or features) == (mask_features if heads == "UnsharedMNCROIHeads" else features)
        ),
        "MODEL.MNC.UNSHARED_BACKBONE": lambda x: "unshared" not in backbone or x == "build_vgg_backbone",
        "MODEL.VGG.OUT_FEATURES": lambda x: not is_vgg or x == ["conv5"],
        "MODEL.VGG.CEIL_MODE": lambda x: not is_vgg or x == (backbone == "build_caffe_vgg_backbone"),
        "MODEL.TIMM.OUT_FEATURES": lambda x: "timm" not in backbone or {*x} >= {*timm_features},
    }
    for key in old:
        if key in is_kept and not is_kept[key](old[key]):
            refuse(key)
    now = {key: x[2 if heads in _PAPER_HEADS else 1] for key, x in RULES.items()}
    changed = [f"{_name(key)} {now[key]}" for key in RULES if key in old and rules[key] != now[key]]
    if changed and "MultitaskNetworkCascade" in (_get(config, "MODEL.META_ARCHITECTURE") or ""):
        logger.warning(f"{heads} now does what {', '.join(changed)} did, which this config had set otherwise.")
    names = {"MODEL.ROI_HEADS.NAME": heads, "MODEL.BACKBONE.NAME": backbone}
    return {key: name for key, name in names.items() if name != (_get(config, key) or "")}


def _section(config: Any, key: str) -> dict[str, Any]:
    """Return the section that a key is in; an empty one if there is none."""
    for part in key.split(".")[:-1]:
        config = config.get(part) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def _get(config: Any, key: str) -> Any:
    return _section(config, key).get(_name(key))


def _pop(config: Any, key: str) -> Any:
    value = _section(config, key).pop(_name(key))
    with contextlib.suppress(ValueError, SyntaxError):  # of a text that is no literal, such as a name
        return ast.literal_eval(value) if isinstance(value, str) else value
    return value


def _name(key: str) -> str:
    return key.rpartition(".")[2]
