from .box_level import BoxLevelEvaluator
from .build import EVALUATOR_REGISTRY, build_evaluator, evaluation_protocol
from .coco import FasterCOCOEvaluator
from .pictures import PredictionPictures
from .sds import SDSEvaluator
from .summary import summarize

__all__ = [
    "BoxLevelEvaluator",
    "EVALUATOR_REGISTRY",
    "FasterCOCOEvaluator",
    "PredictionPictures",
    "SDSEvaluator",
    "build_evaluator",
    "evaluation_protocol",
    "summarize",
]
