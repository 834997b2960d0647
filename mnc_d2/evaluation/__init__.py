from .box_level import BoxLevelEvaluator
from .pictures import PredictionPictures

__all__ = ["BoxLevelEvaluator", "PredictionPictures"]
