from .vgg import VGG16, build_vgg_backbone

__all__ = ["VGG16", "build_vgg_backbone"]
