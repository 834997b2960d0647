"""Features of its own for each task: the first row of the paper's ablation (Table 1)."""

from __future__ import annotations

from typing import cast

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, Backbone
from torch import nn

from ..modeling import CascadePooler
from ..modeling.backbone.vgg import build_vgg_backbone
from .paper_roi_heads import PaperMNCROIHeads

TASKS = ("boxes", "masks", "categories")


@BACKBONE_REGISTRY.register()
def build_unshared_backbone(cfg, input_shape: ShapeSpec) -> UnsharedBackbones:
    """Build a VGG-16 for each task."""
    return UnsharedBackbones({task: build_vgg_backbone(cfg, input_shape) for task in TASKS})


class UnsharedBackbones(Backbone):
    """Several backbones on the same image; feature ``conv5`` of backbone ``masks`` is called ``masks.conv5``."""

    def __init__(self, backbones: dict[str, Backbone]) -> None:
        """Take backbones of the same size divisibility, by the name of the task that uses them."""
        super().__init__()
        self.backbones = nn.ModuleDict(backbones)

    @property
    def size_divisibility(self) -> int:
        return cast(Backbone, self.backbones[TASKS[0]]).size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return cast(Backbone, self.backbones[TASKS[0]]).padding_constraints

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features of all backbones for images (N, 3, H, W)."""
        return _by_full_name({task: backbone(images) for task, backbone in self.backbones.items()})

    def output_shape(self) -> dict[str, ShapeSpec]:
        return _by_full_name({task: cast(Backbone, x).output_shape() for task, x in self.backbones.items()})


def _by_full_name(of_tasks: dict[str, dict]) -> dict:
    """Join what there is for each task and feature into one dict by "task.feature"."""
    return {f"{task}.{name}": x for task, of_task in of_tasks.items() for name, x in of_task.items()}


class UnsharedPooler(CascadePooler):
    """Pools for the mask head from the maps ``masks.*``, where the classifier's maps are ``categories.*``."""

    def forward(
        self, features: dict[str, torch.Tensor], rois: torch.Tensor, index: int, mask_coordinates: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`CascadePooler.forward`."""
        mask_maps = {name: features[name.replace("categories.", "masks.", 1)] for name in self.in_features}
        mask_features, _ = super().forward(mask_maps, rois, index, mask_coordinates)
        _, box_features = super().forward(features, rois, index)
        return mask_features, box_features


@ROI_HEADS_REGISTRY.register()
class UnsharedMNCROIHeads(PaperMNCROIHeads):
    """The cascade on the features of :class:`UnsharedBackbones`. MODEL.ROI_HEADS.IN_FEATURES are "categories.*"."""

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if not all(name.startswith("categories.") for name in in_features):
            raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES is {in_features}. UnsharedMNCROIHeads takes categories.*")
        return {**super().from_config(cfg, input_shape), "pooler": UnsharedPooler.from_config(cfg, input_shape)}
