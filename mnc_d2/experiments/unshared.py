"""A backbone for each task, which shares nothing: the first row of the paper's ablation (Table 1)."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

TASKS = ("boxes", "masks", "categories")


@BACKBONE_REGISTRY.register()
def build_unshared_backbone(cfg, input_shape: ShapeSpec) -> UnsharedBackbones:
    """Build MODEL.MNC.UNSHARED_BACKBONE once for each task."""
    build = BACKBONE_REGISTRY.get(cfg.MODEL.MNC.UNSHARED_BACKBONE)
    return UnsharedBackbones({task: build(cfg, input_shape) for task in TASKS})


class UnsharedBackbones(Backbone):
    """Several backbones on the same image; feature ``conv5`` of backbone ``masks`` is called ``masks.conv5``."""

    def __init__(self, backbones: dict[str, Backbone]) -> None:
        """
        Args:
            backbones: by the name of the task that uses them, of the same size divisibility.
        """
        super().__init__()
        self.backbones = nn.ModuleDict(backbones)

    @property
    def size_divisibility(self) -> int:
        return next(iter(self.backbones.values())).size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return next(iter(self.backbones.values())).padding_constraints

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features of all backbones for images (N, 3, H, W)."""
        return {
            f"{task}.{name}": x for task, backbone in self.backbones.items() for name, x in backbone(images).items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"{task}.{name}": shape
            for task, backbone in self.backbones.items()
            for name, shape in backbone.output_shape().items()
        }
