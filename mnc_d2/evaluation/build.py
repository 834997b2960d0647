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

# What TEST.EVALUATORS names beside the protocols. Called as build_evaluator is, with cfg, dataset_name, output_folder.
EVALUATOR_REGISTRY = Registry("EVALUATOR")
_PROTOCOLS = ("auto", "coco", "sds")


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """Return the evaluators that TEST.EVALUATORS names, and TEST.NUM_PICTURES pictures, of a dataset.

    Where MODEL.MNC.OUTPUTS has "box_instances", the same protocol evaluates these, too.

    Args:
        cfg: the config of the run.
        dataset_name: a registered dataset.
        output_folder: where predictions and pictures are written to; "box_instances" into ``box_level`` in it.

    Raises:
        FileNotFoundError: the dataset's annotations are not there.
        ValueError: TEST.EVALUATORS or the dataset's ground truth is not valid.
    """
    prepare_dataset(dataset_name)
    # Masks cannot be scored against ground truth that lacks some.
    has_all_masks = MetadataCatalog.get(dataset_name).get("has_all_masks", True)
    protocol, evaluators = evaluation_protocol(cfg, dataset_name), []
    if protocol is not None:
        tasks = None if has_all_masks else ("bbox",)
        evaluators.append(_protocol_evaluator(protocol, cfg, dataset_name, output_folder, tasks))
        if "box_instances" in cfg.MODEL.MNC.OUTPUTS:
            of_boxes = _protocol_evaluator(
                protocol, cfg, dataset_name, os.path.join(output_folder, "box_level"), tasks=("bbox",)
            )
            evaluators.append(BoxLevelEvaluator(of_boxes))
    if cfg.TEST.NUM_PICTURES > 0:
        picture_folder = os.path.join(output_folder, "pictures")
        evaluators.append(PredictionPictures(dataset_name, picture_folder, cfg.TEST.NUM_PICTURES))
    for name in cfg.TEST.EVALUATORS:
        if name not in _PROTOCOLS:
            evaluators.append(EVALUATOR_REGISTRY.get(name)(cfg, dataset_name, output_folder))
    return DatasetEvaluators(evaluators)


def evaluation_protocol(cfg: CfgNode, dataset_name: str) -> str | None:
    """Return how a dataset is evaluated: "coco", "sds" or, for VOC's XML with boxes only, "pascal_voc".

    Where TEST.EVALUATORS has "auto", the dataset's evaluator_type decides. Datasets of other types are evaluated as
    COCO is. Where it names nothing but evaluators of EVALUATOR_REGISTRY, the result is None.

    Raises:
        ValueError: TEST.EVALUATORS has a name that is unknown, or names two protocols.
    """
    names = cfg.TEST.EVALUATORS
    unknown = [name for name in names if name not in _PROTOCOLS and name not in EVALUATOR_REGISTRY]
    if unknown:
        known = ", ".join([*_PROTOCOLS, *(name for name, _ in EVALUATOR_REGISTRY)])
        raise ValueError(f"TEST.EVALUATORS has {unknown[0]!r}. There are: {known}.")
    protocols = [name for name in names if name in _PROTOCOLS]
    if len(protocols) > 1:
        raise ValueError(f"TEST.EVALUATORS has {' and '.join(protocols)}. Their metrics have the same names: keep one.")
    if protocols != ["auto"]:
        return protocols[0] if protocols else None
    protocol = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    return protocol if protocol in ("sds", "pascal_voc") else "coco"


def _protocol_evaluator(
    protocol: str, cfg: CfgNode, dataset_name: str, output_folder: str, tasks: tuple[str, ...] | None
) -> DatasetEvaluator:
    """Return the evaluator of boxes, if ``tasks`` is ``("bbox",)``, or, if None, of all that the predictions have."""
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
