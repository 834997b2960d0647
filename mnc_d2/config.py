"""Config keys of MNC, beside those of Detectron2 that it reuses, and the check of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.modeling import build_model

from .pickled import read_pickle

# What check_config wants of values, by key. Those of tuples and lists are wanted of every element.
_POSITIVE = """
    INPUT.MAX_SIZE_TEST INPUT.MAX_SIZE_TRAIN MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS MODEL.ANCHOR_GENERATOR.SIZES
    MODEL.FPN.OUT_CHANNELS MODEL.MNC.MASK_FC_DIM MODEL.MNC.MASK_INIT_STD MODEL.MNC.MASK_SIZE
    MODEL.MNC.NUM_PASSES_TEST MODEL.MNC.NUM_PASSES_TRAIN MODEL.PIXEL_STD MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION MODEL.RPN.BBOX_REG_WEIGHTS
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE MODEL.ROI_HEADS.NUM_CLASSES MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
    MODEL.RPN.BATCH_SIZE_PER_IMAGE MODEL.RPN.POST_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TRAIN
    MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.PRE_NMS_TOPK_TRAIN SOLVER.ACCUMULATE SOLVER.BASE_LR
    SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER SOLVER.STEPS TEST.DETECTIONS_PER_IMAGE
""".split()
_NOT_NEGATIVE = """
    DATALOADER.NUM_WORKERS INPUT.MIN_SIZE_TEST INPUT.MIN_SIZE_TRAIN MODEL.BACKBONE.FREEZE_AT
    MODEL.MNC.DELTA_GRADIENT_CLIP MODEL.MNC.MASK_LOSS_WEIGHT SOLVER.BACKBONE_LR_FACTOR SOLVER.GAMMA
    SOLVER.MAX_CHECKPOINTS SOLVER.MAX_SKIPPED_STEPS SOLVER.MOMENTUM SOLVER.WARMUP_FACTOR SOLVER.WARMUP_ITERS
    SOLVER.WEIGHT_DECAY TEST.EVAL_PERIOD TEST.NUM_PICTURES VIS_PERIOD
""".split()
_FRACTIONS = """
    MODEL.MNC.BACKGROUND_FRACTIONS MODEL.MNC.BACKGROUND_IOU_BANDS MODEL.MNC.MASK_IOU_THRESHOLD MODEL.MNC.MASK_THRESHOLD
    MODEL.MNC.MASK_TARGET_THRESHOLD MODEL.MNC.NEXT_PASS_MIN_SCORE MODEL.MNC.PROPOSAL_MIN_SCORE
    MODEL.MNC.VOTING_IOU_THRESHOLD
    MODEL.ROI_HEADS.IOU_THRESHOLDS MODEL.ROI_HEADS.NMS_THRESH_TEST MODEL.ROI_HEADS.POSITIVE_FRACTION
    MODEL.ROI_HEADS.SCORE_THRESH_TEST MODEL.RPN.IOU_THRESHOLDS MODEL.RPN.NMS_THRESH MODEL.RPN.POSITIVE_FRACTION
""".split()
_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("bitmask",),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "MODEL.MNC.PRED_MASK_FORMAT": ("bitmask", "rle"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
}
# Pairs of keys, and how many elements more the second has.
_LENGTHS = [
    ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", 0),
    ("MODEL.MNC.BACKGROUND_IOU_BANDS", "MODEL.MNC.BACKGROUND_FRACTIONS", 0),
    ("MODEL.RPN.IOU_THRESHOLDS", "MODEL.RPN.IOU_LABELS", 1),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_LABELS", 1),
]


def add_mnc_config(cfg: CN) -> None:
    """Add the keys of MNC to Detectron2's default config, in place.

    Sizes, thresholds and rates that Detectron2 already has a key for keep it (``MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE``,
    ``MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION``, ...); ``configs/Base-MNC.yaml`` sets them to the paper's values.
    ``MODEL.DEVICE`` becomes "cpu" where there is no GPU.

    Args:
        cfg: a config as returned by ``detectron2.config.get_cfg()``.
    """
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"

    mnc = cfg.MODEL.MNC = CN()
    # Passes of the (mask, classify) pair, each two stages: k passes make a cascade of 1 + 2k stages.
    mnc.NUM_PASSES_TRAIN = 2
    mnc.NUM_PASSES_TEST = 2

    # Whether all passes have the same weights (the paper), or each of those that are trained its own; at inference,
    # passes beyond them use the last.
    mnc.SHARE_PASSES = True

    # Feature maps that the mask head pools from; empty for those of the classifier, MODEL.ROI_HEADS.IN_FEATURES.
    mnc.MASK_IN_FEATURES = []

    # MODEL.BACKBONE.NAME "build_unshared_backbone" builds this one three times, for features "boxes.*", "masks.*" and
    # "categories.*": the first row of the paper's ablation.
    mnc.UNSHARED_BACKBONE = "build_resnet_backbone"

    # Where a later stage's loss flows back through an earlier stage's output (the causal gradients of section 3). The
    # defaults are this project's, docs/causal-gradients.md says why; configs/Base-paper.yaml has the released code's.
    # RPN boxes -> first pass:
    mnc.PROPOSAL_GRADIENT = True
    # Boxes that a pass regressed -> next pass:
    mnc.BOX_GRADIENT = True
    # Masks -> masked features of the classifier: "none", "foreground" (only RoIs whose mask-level label is
    # foreground, as released) or "all":
    mnc.MASK_GRADIENT = "foreground"
    # RoIs whose losses flow back to the coordinates of their box: "none", "foreground" (by box-level label) or "all"
    # (as released). Background pushes boxes off objects: that makes it easier to classify, and proposals worse.
    mnc.COORDINATE_GRADIENT = "foreground"
    # Whether the mask loss, and the classifier's loss through the mask, flow back to coordinates (as released). Masks
    # are regressed in the frame of their box: nothing in this loss prefers a box that fits the object.
    mnc.MASK_COORDINATE_GRADIENT = False
    # Whether the targets of a box's regression and of its mask move with the box in the derivative. Where they are
    # constants (as released) the derivative of the regression loss mostly points away from the object.
    mnc.MOVING_TARGETS = True
    # Whether the gradient of k passes to the features that they share is scaled by 1 / k, as in Cascade R-CNN.
    mnc.SCALE_FEATURE_GRADIENT = True
    # Elements of the causal gradient with respect to box deltas are clipped to +-this value, in the loss of one image
    # (that of a batch is the mean over its images); 0 for no clipping.
    mnc.DELTA_GRADIENT_CLIP = 1.0 / 512
    # Whether boxes clipped at the image border, and boxes from anchors that cross it, get a causal gradient.
    mnc.BORDER_GRADIENT = False
    # Whether the anchor behind every RoI that the first pass samples joins the RPN's loss, beside the RPN's own sample
    # (as released). It holds proposals on their objects, where other gradients may push them off, and trains the RPN on
    # more foreground.
    mnc.ROI_ANCHOR_LOSS = True

    # Whether ground-truth boxes are appended to the boxes of the second and later passes in training (as released);
    # MODEL.ROI_HEADS.PROPOSAL_APPEND_GT is for the first.
    mnc.APPEND_GT_TO_LATER_PASSES = False

    # Sampling positions of the RoI warp: "center" (Detectron2's pixel convention) or "caffe" (the released layer).
    mnc.ROI_WARP_SAMPLING = "center"

    # Background RoIs of the first pass: IoU bands [low, high) and the fraction of the background drawn from each.
    mnc.BACKGROUND_IOU_BANDS = [[0.1, 0.5], [0.0, 0.1]]
    mnc.BACKGROUND_FRACTIONS = [0.85, 0.15]
    # Whether other bands make up for one that has too few RoIs (not in the released code).
    mnc.REFILL_BACKGROUND = True

    # Side m of the regressed m x m masks.
    mnc.MASK_SIZE = 28
    # Hidden units of the mask-regression head.
    mnc.MASK_FC_DIM = 256
    # Standard deviation of that head's initial weights; features that are not pretrained learn faster with more.
    mnc.MASK_INIT_STD = 0.001
    # A target texel is foreground where the instance covers at least this part of it.
    mnc.MASK_TARGET_THRESHOLD = 0.5
    # A predicted pixel is foreground from this probability on: mask-level labels, mask voting and results.
    mnc.MASK_THRESHOLD = 0.4
    # An RoI is foreground at mask level from this mask IoU on.
    mnc.MASK_IOU_THRESHOLD = 0.5
    mnc.MASK_LOSS_WEIGHT = 1.0

    # Whether the class that regresses a box for the next pass may be background at inference (the released rule).
    mnc.NEXT_BOX_BACKGROUND = True

    # Mask voting: boxes with at least this IoU to a surviving box contribute their mask.
    mnc.VOTING_IOU_THRESHOLD = 0.5

    # The box of a detection: "tight", around its averaged mask (the paper), or "regressed", the average of the boxes
    # that its voters regress for its class, with the weights of their masks.
    mnc.DETECTION_BOX = "regressed"

    # Folder of precomputed mask proposals for convolutional feature masking, see datasets/README.md; "" for none.
    # DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN and _TEST limit their number.
    cfg.DATASETS.MASK_PROPOSALS = ""

    vgg = cfg.MODEL.VGG = CN()
    # Stages of VGG-16 that the backbone returns, "conv1" to "conv5". MODEL.BACKBONE.FREEZE_AT counts them too: 2 keeps
    # conv1 and conv2 as they were pretrained.
    vgg.OUT_FEATURES = ["conv5"]
    # Whether pooling rounds odd sizes up, as Caffe and so the authors' network does; torchvision's rounds down.
    vgg.CEIL_MODE = False

    # Convolutional networks of the package timm: build_timm_backbone and build_timm_fpn_backbone.
    timm = cfg.MODEL.TIMM = CN()
    # As timm.list_models() lists it.
    timm.NAME = "tf_efficientnet_lite0"
    # Feature maps, named by stride as those of ResNets: "res2" has stride 4, "res3" 8, "res4" 16, "res5" 32.
    # MODEL.BACKBONE.FREEZE_AT k freezes the layers up to "res<k>"; the stem is what comes before stride 2, "res1".
    timm.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # "FrozenBN": statistics and affine parameters are constants, for batches of few images; "BN": they are trained.
    timm.NORM = "FrozenBN"
    # Initial weights, read only where MODEL.WEIGHTS, which covers the backbone, is empty: the path of a classifier's
    # state dict (.pth, .safetensors), "package:NAME" for the one in the installed Python package NAME, or "" for none.
    timm.WEIGHTS = ""

    # At inference proposals are left out to which the RPN gives less than this probability of being an object; but the
    # best, twice TEST.DETECTIONS_PER_IMAGE, always stay. 0 for all.
    mnc.PROPOSAL_MIN_SCORE = 0.0
    # At inference a box goes on to the next pass only if the pass before gives it at least this probability of being
    # foreground, at box or at mask level. This saves work and costs less than 0.1 AP (docs/speed.md); 0 for all boxes.
    mnc.NEXT_PASS_MIN_SCORE = 0.01
    # What the model returns for each image at inference: "instances" (mask-level results, or box-level ones with
    # MODEL.MASK_ON False) and possibly "box_instances" (box-level results too: MNC_box) and "passes" (every box, mask
    # and score of each pass, for analysis).
    mnc.OUTPUTS = ["instances"]
    # Masks of the results: "bitmask", pred_masks, one bool a pixel of the image; or "rle", pred_masks_rle, run lengths,
    # for photographs so large that 100 masks of them do not fit into memory. Our evaluators take either.
    mnc.PRED_MASK_FORMAT = "bitmask"
    # Precision of convolutions and matrix products at inference: "float32", "bfloat16" or "float16". Coordinates, NMS
    # and mask voting are float32 whatever it is.
    mnc.INFERENCE_PRECISION = "float32"

    # The class that makes training and test inputs of a dataset's records: a name of mnc_d2.data's
    # DATASET_MAPPER_REGISTRY. "MaskProposalMapper" adds the proposals in DATASETS.MASK_PROPOSALS.
    cfg.INPUT.DATASET_MAPPER_NAME = "MNCDatasetMapper"
    # Whether test images are resized by one exact factor, to float32, as the released code does (ResizeByExactScale);
    # else to a size in whole pixels, as Detectron2 does.
    cfg.INPUT.EXACT_SCALE_TEST = False

    # Metrics: "coco" (COCO AP), "sds" (mAP^r of the paper, and VOC's box AP; for any dataset with instances) or "auto",
    # what the dataset's evaluator_type says.
    cfg.TEST.EVALUATOR = "auto"
    # More evaluators, by their names in mnc_d2.evaluation.EVALUATOR_REGISTRY.
    cfg.TEST.MORE_EVALUATORS = []
    # Pictures of predictions beside ground truth that an evaluation writes, the first images of each test set.
    cfg.TEST.NUM_PICTURES = 0

    # Periodic checkpoints to keep, the newest; 0 for all.
    cfg.SOLVER.MAX_CHECKPOINTS = 0

    # With TEST.EVAL_PERIOD: the metric, such as "segm/AP", of the evaluation whose weights are kept as model_best.pth;
    # "auto" for the AP of masks or, without these, of boxes; "" for none.
    cfg.TEST.BEST_METRIC = "auto"

    # With TEST.EVAL_PERIOD: evaluations without a better TEST.BEST_METRIC after which the training ends; 0 for never.
    cfg.SOLVER.PATIENCE = 0

    # "SGD" (the paper) or "ADAMW", which learns faster from random initialisation.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # With "ADAMW": factor of the learning rate of the network below a feature pyramid. Less than 1 keeps more of what
    # it was pretrained for: docs/comparison.md.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0

    # Batches of IMS_PER_BATCH images whose gradients are averaged to one step of the optimizer. An iteration is one
    # step, whatever this number. The authors: IMS_PER_BATCH 1, ACCUMULATE 8.
    cfg.SOLVER.ACCUMULATE = 1
    # Iterations that may end without a step, because a loss, a gradient or a box of the RPN is not finite, before the
    # training ends; 0 ends it at the first loss or box. Not counted are gradients that a loss scale made infinite.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    # With AMP.ENABLED: "float16" (with a loss scale), "bfloat16", or "auto": the first on a GPU, the second on the CPU.
    cfg.SOLVER.AMP.PRECISION = "auto"


def check_config(cfg: CN) -> None:
    """Check what can be known of a config before data is read and processes are started; build its model to see.

    The model is built on PyTorch's meta device: it takes no memory, and no weights are read.

    Args:
        cfg: a config with MNC's keys.

    Raises:
        ValueError: a value is wrong, or there is no such model; the message names the key, where it is known.
    """
    for key, value in _leaves(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}. It must be a finite number.")
    for keys, is_right, what in (
        (_POSITIVE, lambda x: x > 0, "positive"),
        (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (_FRACTIONS, lambda x: 0 <= x <= 1, "between 0 and 1"),
    ):
        for key in keys:
            value = _get(cfg, key)
            if not all(isinstance(x, (int, float)) and is_right(x) for _, x in _leaves(value, key)):
                raise ValueError(f"{key} is {value}. It must be {what}.")
    for key, choices in _CHOICES.items():
        if _get(cfg, key) not in choices:
            raise ValueError(f"{key} is {_get(cfg, key)!r}. It must be one of {', '.join(choices)}.")
    for first, second, more in _LENGTHS:
        lengths = len(_get(cfg, first)), len(_get(cfg, second))
        if lengths[1] != lengths[0] + more:
            raise ValueError(
                f"{first} has {lengths[0]} elements, so {second} must have {lengths[0] + more}, not {lengths[1]}."
            )
    for key in ("MODEL.RPN.BBOX_REG_WEIGHTS", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"):
        if len(_get(cfg, key)) != 4:
            raise ValueError(f"{key} is {_get(cfg, key)}. It must have four numbers, for x, y, width and height.")
    for key in ("INPUT.MIN_SIZE_TRAIN", "SOLVER.STEPS"):
        if not all(isinstance(x, int) for x in _get(cfg, key)):
            raise ValueError(f"{key} is {_get(cfg, key)}. It must be integers.")
    for key in ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        if not all(_get(cfg, key)):
            raise ValueError(f"{key} is {_get(cfg, key)}. No feature map can be without anchors.")
    _check_crop(cfg.INPUT.CROP)
    if list(cfg.SOLVER.STEPS) != sorted(set(cfg.SOLVER.STEPS)):
        raise ValueError(f"SOLVER.STEPS is {cfg.SOLVER.STEPS}. It must be in ascending order.")
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty. Give it the sizes of the shorter side in training.")
    if cfg.SEED >= 2**31:
        raise ValueError(f"SEED is {cfg.SEED}. It must be less than 2^31; -1 stands for a seed that is drawn.")
    if cfg.MODEL.LOAD_PROPOSALS:
        for file in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            read_pickle(file)  # Detectron2 would run code that it holds
    check_model(cfg)


def _check_crop(crop: CN) -> None:
    if not crop.ENABLED:
        return
    kinds = ("relative", "relative_range", "absolute", "absolute_range")
    if crop.TYPE not in kinds:
        raise ValueError(f"INPUT.CROP.TYPE is {crop.TYPE!r}. It must be one of {', '.join(kinds)}.")
    largest, kind = (1, float) if crop.TYPE.startswith("relative") else (math.inf, int)
    if len(crop.SIZE) != 2 or not all(isinstance(x, (int, kind)) and 0 < x <= largest for x in crop.SIZE):
        what = "shares of the image, up to 1" if largest == 1 else "positive integers, in pixels"
        raise ValueError(f"INPUT.CROP.SIZE is {crop.SIZE}. With INPUT.CROP.TYPE {crop.TYPE} it must be two {what}.")


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


def _get(cfg: CN, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in a config, a list or a tuple that are none of these themselves, and the key of each."""
    if isinstance(value, dict):
        for name, x in value.items():
            yield from _leaves(x, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _leaves(x, key)
    else:
        yield key, value
