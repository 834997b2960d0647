"""Config keys of MNC, beside those of Detectron2 that it reuses, and the check of both."""

from __future__ import annotations

import copy
import math
from functools import reduce
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode as CN
from detectron2.modeling import build_model

from . import config_checks as checks
from .pickled import read_pickle
from .removed_keys import register_removed_keys


class Key(NamedTuple):
    """A key that MNC adds."""

    name: str
    default: Any
    check: checks.Check
    reason: str  # what it does, and when one sets it


# fmt: off
KEYS = (
    Key("MODEL.MNC.NUM_PASSES_TRAIN", 2, checks.positive,
        "Passes of (mask, classifier) in training: 1 + 2k stages."),
    Key("MODEL.MNC.NUM_PASSES_TEST", 2, checks.positive,
        "Passes at inference. One pass is faster and less accurate."),
    Key("MODEL.MNC.SHARE_PASSES", True, checks.anything,
        "Whether all passes have the same weights, as in the paper. With False, every trained pass has its own, "
        "and passes beyond them use the last."),
    Key("MODEL.MNC.GRADIENTS", "default", checks.gradients,
        'Which gradients flow between stages (section 3): "default", "released" (the authors\' code) or '
        '"stepwise" (none), and changes, such as "released, coordinates=foreground". '
        "docs/causal-gradients.md explains each."),
    Key("MODEL.MNC.BACKGROUND_BANDS", [[0.1, 0.5, 0.85], [0.0, 0.1, 0.15]], checks.bands,
        "Where the background RoIs of the first pass come from: rows of IoU from, IoU to, share of the "
        "background. Set [[0.0, 0.5, 1.0]] to draw them uniformly."),
    Key("MODEL.MNC.MASK_SIZE", 28, checks.positive,
        "Side m of the regressed m x m masks. The released model has 21."),
    Key("MODEL.MNC.MASK_FC_DIM", 256, checks.positive,
        "Hidden units of the mask head. Shapes with thin parts want more."),
    Key("MODEL.MNC.MASK_INIT_STD", 0.001, checks.positive,
        "Standard deviation of the mask head's initial weights. Features that are not pretrained learn faster "
        "with more."),
    Key("MODEL.MNC.MASK_THRESHOLD", 0.4, checks.fraction,
        "Probability from which a pixel is foreground: for mask-level labels, mask voting and results."),
    Key("MODEL.MNC.MASK_LOSS_WEIGHT", 1.0, checks.not_negative,
        "Weight of the mask loss. The quickstart gains AP with 2."),
    Key("MODEL.MNC.DETECTION_BOX", "regressed", checks.one_of("tight", "regressed"),
        'Box of a detection: "tight" around its averaged mask, as in the paper, or "regressed", the mean of the '
        'boxes that its voters regress, weighted as their masks.'),
    Key("MODEL.MNC.PROPOSAL_MIN_SCORE", 0.0, checks.fraction,
        "Objectness under which inference drops proposals. The best, twice TEST.DETECTIONS_PER_IMAGE, always "
        "stay. Raise it for speed."),
    Key("MODEL.MNC.NEXT_PASS_MIN_SCORE", 0.01, checks.fraction,
        "Probability of foreground, at box or mask level, under which inference drops a box before the next pass. "
        "It costs less than 0.1 AP (docs/speed.md); 0 keeps all."),
    Key("MODEL.MNC.OUTPUTS", ["instances"], checks.outputs,
        'What inference returns: "instances", and for analysis "box_instances" (box-level results, MNC_box) and '
        '"passes" (boxes, masks and scores of each pass).'),
    Key("MODEL.MNC.PRED_MASK_FORMAT", "bitmask", checks.one_of("bitmask", "rle"),
        'Masks of results: "bitmask" (pred_masks) or "rle" (pred_masks_rle), for photographs too large for 100 '
        'masks in memory. Our evaluators take either.'),
    Key("MODEL.MNC.INFERENCE_PRECISION", "float32", checks.one_of("float32", "bfloat16", "float16"),
        "Precision of convolutions and matrix products at inference. Coordinates, NMS and mask voting stay "
        "float32."),
    Key("MODEL.TIMM.NAME", "tf_efficientnet_lite0", checks.anything,
        "Network of timm's backbones, as timm.list_models() has it."),
    Key("MODEL.TIMM.NORM", "FrozenBN", checks.one_of("FrozenBN", "BN"),
        'Batch normalisation: "FrozenBN" is constant, for batches of few images; "BN" is trained.'),
    Key("MODEL.TIMM.WEIGHTS", "", checks.anything,
        'Initial weights where MODEL.WEIGHTS is empty: a classifier\'s state dict (.pth, .safetensors), '
        '"package:NAME" for the one in a Python package, or "" for random ones.'),
    Key("DATASETS.MASK_PROPOSALS", "", checks.anything,
        "Folder of mask proposals for convolutional feature masking (datasets/README.md). "
        "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN and _TEST limit their number."),
    Key("INPUT.DATASET_MAPPER_NAME", "MNCDatasetMapper", checks.anything,
        "Class in DATASET_MAPPER_REGISTRY that turns records into inputs. MaskProposalMapper adds mask proposals."),
    Key("INPUT.EXACT_SCALE_TEST", False, checks.anything,
        "Whether test images are resized by one exact factor, to float32, as the released model needs."),
    Key("TEST.EVALUATORS", ["auto"], checks.anything,
        'Metrics: "coco" (COCO AP), "sds" (the paper\'s mAP^r and VOC\'s box AP) or "auto", by the dataset\'s '
        'evaluator_type; and names of EVALUATOR_REGISTRY for metrics of your own.'),
    Key("TEST.NUM_PICTURES", 0, checks.not_negative,
        "Pictures of predictions beside ground truth, for each test set."),
    Key("TEST.BEST_METRIC", "auto", checks.anything,
        'With TEST.EVAL_PERIOD: metric, such as "segm/AP", by which model_best.pth is chosen. "auto" is the AP of'
        ' masks or else of boxes; "" is none.'),
    Key("SOLVER.MAX_CHECKPOINTS", 0, checks.not_negative,
        "Periodic checkpoints to keep, the newest; 0 for all."),
    Key("SOLVER.PATIENCE", 0, checks.not_negative,
        "With TEST.EVAL_PERIOD: evaluations without a better TEST.BEST_METRIC after which training ends; 0 for "
        "never."),
    Key("SOLVER.OPTIMIZER", "SGD", checks.one_of("SGD", "ADAMW"),
        '"SGD" (the paper) or "ADAMW", which learns faster from random weights.'),
    Key("SOLVER.BACKBONE_LR_FACTOR", 1.0, checks.not_negative,
        "With ADAMW: factor of the learning rate below a feature pyramid. Less than 1 keeps more of what the "
        "network was pretrained for (docs/comparison.md)."),
    Key("SOLVER.ACCUMULATE", 1, checks.positive,
        "Batches of IMS_PER_BATCH images whose gradients are averaged to one step, which is an iteration. The "
        "authors: IMS_PER_BATCH 1, ACCUMULATE 8."),
    Key("SOLVER.MAX_SKIPPED_STEPS", 0, checks.not_negative,
        "Iterations that may make no step because a loss, gradient or box is not finite; 0 ends training at the "
        "first. Overflows of a loss scale do not count."),
    Key("SOLVER.AMP.PRECISION", "auto", checks.one_of("auto", "float16", "bfloat16"),
        'With AMP.ENABLED: "float16" (with a loss scale), "bfloat16", or "auto": the first on a GPU, the second '
        'on a CPU.'),
)
# fmt: on


# What the values of Detectron2's keys must be.
_DETECTRON2_CHECKS: dict[str, checks.Check] = {
    "DATALOADER.NUM_WORKERS": checks.not_negative,
    "DATALOADER.SAMPLER_TRAIN": checks.one_of(
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.CROP.TYPE": checks.crop_type,
    "INPUT.CROP.SIZE": checks.crop_size,
    "INPUT.FORMAT": checks.one_of("BGR", "RGB"),
    "INPUT.MASK_FORMAT": checks.one_of("bitmask"),
    "INPUT.MAX_SIZE_TEST": checks.positive,
    "INPUT.MAX_SIZE_TRAIN": checks.positive,
    "INPUT.MIN_SIZE_TEST": checks.not_negative,
    "INPUT.MIN_SIZE_TRAIN": checks.all_of(checks.not_negative, checks.integers, checks.not_empty),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": checks.one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": checks.one_of("horizontal", "vertical", "none"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": checks.all_of(checks.positive, checks.with_anchors),
    "MODEL.ANCHOR_GENERATOR.SIZES": checks.all_of(checks.positive, checks.with_anchors),
    "MODEL.BACKBONE.FREEZE_AT": checks.not_negative,
    "MODEL.FPN.OUT_CHANNELS": checks.positive,
    "MODEL.PIXEL_MEAN": checks.length_of("MODEL.PIXEL_STD", 0),
    "MODEL.PIXEL_STD": checks.positive,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": checks.all_of(checks.positive, checks.four),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": checks.positive,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": checks.positive,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": checks.all_of(checks.fraction, checks.length_of("MODEL.ROI_HEADS.IOU_LABELS", 1)),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": checks.fraction,
    "MODEL.ROI_HEADS.NUM_CLASSES": checks.positive,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": checks.fraction,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": checks.fraction,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": checks.positive,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": checks.positive,
    "MODEL.RPN.BBOX_REG_WEIGHTS": checks.all_of(checks.positive, checks.four),
    "MODEL.RPN.IOU_THRESHOLDS": checks.all_of(checks.fraction, checks.length_of("MODEL.RPN.IOU_LABELS", 1)),
    "MODEL.RPN.NMS_THRESH": checks.fraction,
    "MODEL.RPN.POSITIVE_FRACTION": checks.fraction,
    "MODEL.RPN.POST_NMS_TOPK_TEST": checks.positive,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": checks.positive,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": checks.positive,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": checks.positive,
    "SEED": checks.seed,
    "SOLVER.BASE_LR": checks.positive,
    "SOLVER.CHECKPOINT_PERIOD": checks.positive,
    "SOLVER.GAMMA": checks.not_negative,
    "SOLVER.IMS_PER_BATCH": checks.positive,
    "SOLVER.LR_SCHEDULER_NAME": checks.one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.MAX_ITER": checks.positive,
    "SOLVER.MOMENTUM": checks.not_negative,
    "SOLVER.STEPS": checks.all_of(checks.positive, checks.integers, checks.ascending),
    "SOLVER.WARMUP_FACTOR": checks.not_negative,
    "SOLVER.WARMUP_ITERS": checks.not_negative,
    "SOLVER.WEIGHT_DECAY": checks.not_negative,
    "TEST.DETECTIONS_PER_IMAGE": checks.positive,
    "TEST.EVAL_PERIOD": checks.not_negative,
    "VIS_PERIOD": checks.not_negative,
}


def add_mnc_config(cfg: CN) -> None:
    """Add :data:`KEYS` to Detectron2's default config, in place.

    Sizes, thresholds and rates that Detectron2 already has a key for keep it (``MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE``,
    ``MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION``, ...). ``configs/Base-MNC.yaml`` sets them to the paper's values.
    ``MODEL.DEVICE`` becomes "cpu" where there is no GPU.

    Args:
        cfg: a config as returned by ``detectron2.config.get_cfg()``.
    """
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    for key in KEYS:
        section, _, name = key.name.rpartition(".")
        node = reduce(lambda node, part: node.setdefault(part, CN()), section.split("."), cfg)
        node[name] = copy.deepcopy(key.default)
    register_removed_keys(cfg)


def check_config(cfg: CN) -> None:
    """Check what can be known of a config before data is read and processes are started; build its model to see.

    The model is built on PyTorch's meta device: it takes no memory, and no weights are read.

    Args:
        cfg: a config with MNC's keys.

    Raises:
        ValueError: a value is wrong, or there is no such model; the message names the key, where it is known.
    """
    for name, value in checks.leaves(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}. It must be a finite number.")
    for name, check in {**_DETECTRON2_CHECKS, **{key.name: key.check for key in KEYS}}.items():
        _check_key(cfg, name, check)
    if cfg.MODEL.LOAD_PROPOSALS:
        for file in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            read_pickle(file)  # Detectron2 would run code that it holds
    check_model(cfg)


def inference_dtype(cfg: CN) -> torch.dtype:
    """Return the dtype that MODEL.MNC.INFERENCE_PRECISION names.

    Raises:
        ValueError: it names none.
    """
    (key,) = [x for x in KEYS if x.name == "MODEL.MNC.INFERENCE_PRECISION"]
    _check_key(cfg, key.name, key.check)
    return getattr(torch, cfg.MODEL.MNC.INFERENCE_PRECISION)


def _check_key(cfg: CN, name: str, check: checks.Check) -> None:
    value = checks.get(cfg, name)
    problem = check(value, cfg)
    if problem:
        raise ValueError(f"{name} is {value!r}. {problem}")


def check_model(cfg: CN) -> None:
    """Build the model of a config, without memory for it, to see whether there is one.

    Raises:
        ValueError: there is none; the message says what Detectron2 or PyTorch say.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.WEIGHTS = ""
    try:
        with torch.device("meta"):
            build_model(cfg)
    except Exception as error:  # Detectron2 and PyTorch raise all kinds: KeyError of a registry, AssertionError, ...
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"The config has no model: {reason or type(error).__name__}") from error
