"""Backbones of this project that are not tested elsewhere."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from modeling.inputs import make_inputs

from mnc_d2.experiments import UnsharedBackbones
from mnc_d2.experiments.unshared import build_unshared_backbone


@pytest.fixture
def cfg(small_config):
    """The ablation's row without shared features, and without gradients between stages, with small heads."""
    # Anchors that fit into the small images: others have no loss.
    overrides = {"MODEL.MNC.MASK_FC_DIM": 8, "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]]}
    return small_config("PascalVOC-InstanceSegmentation/mnc_VGG_16_3stage_unshared.yaml", **overrides)


def test_unshared_backbones_name_the_features_of_each(cfg):
    torch.manual_seed(0)
    backbone = build_unshared_backbone(cfg, ShapeSpec(channels=3))
    assert isinstance(backbone, UnsharedBackbones) and backbone.size_divisibility == 0
    image = torch.rand(1, 3, 64, 64)
    features = backbone(image)
    assert features.keys() == backbone.output_shape().keys()
    assert all(features[name].shape[1] == shape.channels for name, shape in backbone.output_shape().items())
    for task, one in backbone.backbones.items():
        for name, x in one(image).items():
            assert torch.equal(features[f"{task}.{name}"], x)
    assert not torch.equal(features["boxes.conv5"], features["masks.conv5"])


LOSSES = {
    "boxes": ["loss_rpn_cls", "loss_rpn_loc", "loss_rpn_roi_cls", "loss_rpn_roi_loc"],
    "masks": ["loss_mask"],
    "categories": ["loss_cls", "loss_seg_cls"],
}


@pytest.mark.parametrize("task", LOSSES)
def test_without_gradients_between_stages_each_backbone_learns_from_its_own_task_only(cfg, task):
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage():
        losses = model(make_inputs())
    sum(x for name, x in losses.items() if name.split("_s")[0] in LOSSES[task] or name in LOSSES[task]).backward()
    reached = {
        name
        for name, backbone in model.backbone.backbones.items()
        if any(x.grad is not None and x.grad.any() for x in backbone.parameters())
    }
    assert reached == {task}
