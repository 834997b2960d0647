"""Which evaluators a dataset gets."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, PascalVOCDetectionEvaluator
from fvcore.common.registry import Registry

from ..data import prepare_dataset
from .box_level import BoxLevelEvaluator
from .coco import FasterCOCOEvaluator
from .pictures import PredictionPictures
from .sds import SDSEvaluator

# Evaluators that TEST.MORE_EVALUATORS names. They are called as build_evaluator is: (cfg, dataset_name, output_folder).
EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """Return the evaluators of a dataset: its protocol's, pictures where TEST.NUM_PICTURES asks for some, and
    TEST.MORE_EVALUATORS.

    Where MODEL.MNC.OUTPUTS has "box_instances", these are evaluated too, by the same protocol.

    Args:
        cfg: the config of the run.
        dataset_name: a registered dataset.
        output_folder: where predictions and pictures are written to; "box_instances" into ``box_level`` in it.

    Raises:
        FileNotFoundError: the dataset's annotations are not there.
        ValueError: TEST.EVALUATOR, TEST.MORE_EVALUATORS or the dataset's ground truth is not valid.
    """
    prepare_dataset(dataset_name)
    # Masks cannot be scored against ground truth that lacks some.
    has_all_masks = MetadataCatalog.get(dataset_name).get("has_all_masks", True)
    evaluators = [_protocol_evaluator(cfg, dataset_name, output_folder, None if has_all_masks else ("bbox",))]
    if "box_instances" in cfg.MODEL.MNC.OUTPUTS:
        box_folder = os.path.join(output_folder, "box_level")
        evaluators.append(BoxLevelEvaluator(_protocol_evaluator(cfg, dataset_name, box_folder, tasks=("bbox",))))
    if cfg.TEST.NUM_PICTURES > 0:
        picture_folder = os.path.join(output_folder, "pictures")
        evaluators.append(PredictionPictures(dataset_name, picture_folder, cfg.TEST.NUM_PICTURES))
    for name in cfg.TEST.MORE_EVALUATORS:
        evaluators.append(EVALUATOR_REGISTRY.get(name)(cfg, dataset_name, output_folder))
    return DatasetEvaluators(evaluators)


def evaluation_protocol(cfg: CfgNode, dataset_name: str) -> str:
    """Return how a dataset is evaluated: "coco", "sds" or, for VOC's XML with boxes only, "pascal_voc".

    TEST.EVALUATOR says so or, where it is "auto", the dataset's evaluator_type; datasets of other types are evaluated
    as COCO is.

    Raises:
        ValueError: TEST.EVALUATOR is none of its values, or TEST.MORE_EVALUATORS has a name that is not registered.
    """
    unknown = [name for name in cfg.TEST.MORE_EVALUATORS if name not in EVALUATOR_REGISTRY]
    if unknown:
        known = ", ".join(name for name, _ in EVALUATOR_REGISTRY) or "none"
        raise ValueError(f"TEST.MORE_EVALUATORS has {unknown[0]!r}. In EVALUATOR_REGISTRY are: {known}.")
    protocol = cfg.TEST.EVALUATOR
    if protocol not in ("auto", "coco", "sds"):
        raise ValueError(f'TEST.EVALUATOR must be "auto", "coco" or "sds", got {protocol!r}.')
    if protocol == "auto":
        protocol = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    return protocol if protocol in ("sds", "pascal_voc") else "coco"


def _protocol_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str, tasks: tuple[str, ...] | None
) -> DatasetEvaluator:
    """Return the evaluator of boxes, if ``tasks`` is ``("bbox",)``, or, if None, of all that the predictions have."""
    protocol = evaluation_protocol(cfg, dataset_name)
    if protocol == "sds":
        return SDSEvaluator(dataset_name, output_folder, tasks=tasks)
    if protocol == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    return FasterCOCOEvaluator(
        dataset_name,
        tasks=tasks,
        output_dir=output_folder,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        # A dataset of the same name may have changed since its conversion was cached.
        allow_cached_coco=False,
    )
