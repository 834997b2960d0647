from .unshared import UnsharedBackbones, build_unshared_backbone

__all__ = ["UnsharedBackbones", "build_unshared_backbone"]
