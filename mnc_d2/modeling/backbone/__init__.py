from .timm import TimmBackbone
from .unshared import UnsharedBackbones, build_unshared_backbone
from .vgg import VGG16, build_vgg_backbone

__all__ = ["TimmBackbone", "UnsharedBackbones", "VGG16", "build_unshared_backbone", "build_vgg_backbone"]
