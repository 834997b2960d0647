from .pictures import PredictionPictures

__all__ = ["PredictionPictures"]
