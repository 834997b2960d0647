from .timm import TimmBackbone
from .vgg import VGG16, build_vgg_backbone

__all__ = ["TimmBackbone", "VGG16", "build_vgg_backbone"]
