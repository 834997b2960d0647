from .timm import TimmBackbone

__all__ = ["TimmBackbone"]
