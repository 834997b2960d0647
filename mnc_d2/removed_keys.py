"""Config keys of earlier versions, and what replaced each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from detectron2.config import CfgNode

# From a removed key to what replaced it: a field of CausalGradients, a rule of RoI heads, or what the text says.
GRADIENT_FIELDS = {
    "MODEL.MNC.PROPOSAL_GRADIENT": "proposals",
    "MODEL.MNC.BOX_GRADIENT": "boxes",
    "MODEL.MNC.MASK_GRADIENT": "masks",
    "MODEL.MNC.COORDINATE_GRADIENT": "coordinates",
    "MODEL.MNC.MASK_COORDINATE_GRADIENT": "mask_coordinates",
    "MODEL.MNC.MOVING_TARGETS": "moving_targets",
    "MODEL.MNC.SCALE_FEATURE_GRADIENT": "average_features",
    "MODEL.MNC.DELTA_GRADIENT_CLIP": "delta_clip",
    "MODEL.MNC.BORDER_GRADIENT": "border",
    "MODEL.MNC.ROI_ANCHOR_LOSS": "anchors",
}
# Rules of the RoI heads: their default as keys, what MNCROIHeads does now, and what PaperMNCROIHeads does.
RULES = {
    "MODEL.MNC.APPEND_GT_TO_LATER_PASSES": (False, False, True),
    "MODEL.MNC.REFILL_BACKGROUND": (True, True, False),
    "MODEL.MNC.NEXT_BOX_BACKGROUND": (True, False, True),
}
REPLACEMENTS = {
    **{key: f"field {name} of MODEL.MNC.GRADIENTS" for key, name in GRADIENT_FIELDS.items()},
    **dict.fromkeys(RULES, "MODEL.ROI_HEADS.NAME PaperMNCROIHeads"),
    "MODEL.MNC.BACKGROUND_IOU_BANDS": "MODEL.MNC.BACKGROUND_BANDS",
    "MODEL.MNC.BACKGROUND_FRACTIONS": "MODEL.MNC.BACKGROUND_BANDS",
    "TEST.EVALUATOR": "TEST.EVALUATORS",
    "TEST.MORE_EVALUATORS": "TEST.EVALUATORS",
    "MODEL.MNC.MASK_TARGET_THRESHOLD": "argument target_threshold of MaskSupervision",
    "MODEL.MNC.MASK_IOU_THRESHOLD": "argument iou_threshold of MaskSupervision",
    "MODEL.MNC.VOTING_IOU_THRESHOLD": "argument voting_iou_threshold of vote_masks",
    "MODEL.MNC.ROI_WARP_SAMPLING": "MODEL.ROI_HEADS.NAME CaffeMNCROIHeads",
    "MODEL.MNC.MASK_IN_FEATURES": "MODEL.ROI_HEADS.NAME UnsharedMNCROIHeads",
    "MODEL.MNC.UNSHARED_BACKBONE": "MODEL.BACKBONE.NAME build_unshared_backbone (VGG-16)",
    "MODEL.VGG.OUT_FEATURES": "argument out_features of VGG16",
    "MODEL.VGG.CEIL_MODE": "MODEL.BACKBONE.NAME build_caffe_vgg_backbone",
    "MODEL.TIMM.OUT_FEATURES": "MODEL.FPN.IN_FEATURES, or IN_FEATURES of MODEL.RPN and MODEL.ROI_HEADS",
}


def register_removed_keys(cfg: CfgNode) -> None:
    """Let the error of a config that somebody merges a removed key into name what replaced it."""
    for key, replacement in {**REPLACEMENTS, "MODEL.VGG": "MODEL.BACKBONE.NAME"}.items():
        if not cfg.key_is_renamed(key):
            cfg.register_renamed_key(key, replacement)


def refuse_removed_keys(keys: Iterable[str]) -> None:
    """Raise a ValueError that names what replaced the first of ``keys`` that is removed, if any is."""
    for key in keys:
        if key in REPLACEMENTS:
            refuse(key)


def refuse(key: str) -> NoReturn:
    """Raise a ValueError that names what replaced a removed key."""
    raise ValueError(f"{key} is no longer a config key. Use {REPLACEMENTS[key]} instead.")
