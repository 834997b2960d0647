"""Small parts of a model, built from explicit arguments."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from mnc_d2.modeling import (
    CascadePass,
    CascadePooler,
    CausalGradients,
    MaskedFeatureClassifier,
    MaskRegressionHead,
    MaskSupervision,
    MNCOutputLayers,
    MNCROIHeads,
    RoIWarpPooler,
)

CHANNELS = 4


@pytest.fixture(autouse=True)
def storage():
    """The event storage that training writes to."""
    with EventStorage() as storage:
        yield storage


def make_pass(num_classes, mask_head=None, resolution=2):
    """The heads of a pass, with outputs that vary: after initialisation gradients would drown in rounding."""
    shape = ShapeSpec(channels=CHANNELS, height=2, width=2)
    if mask_head is None:
        mask_head = MaskRegressionHead(ShapeSpec(channels=CHANNELS, height=4, width=4), hidden_dim=16, mask_size=4)
    mask_path, box_path = (FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[32]) for _ in range(2))
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    predictor = MNCOutputLayers(ShapeSpec(channels=64), box2box_transform=transform, num_classes=num_classes)
    for layer in (predictor.cls_score, predictor.seg_cls_score, predictor.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.3)
    if isinstance(mask_head, MaskRegressionHead):
        for layer in (mask_head.fc1, mask_head.fc2):
            torch.nn.init.normal_(layer.weight, std=0.3)
    classifier = MaskedFeatureClassifier(mask_path, box_path, predictor, resolution=resolution)
    return CascadePass(mask_head, classifier)


@pytest.fixture
def make_roi_heads():
    """A function that builds a cascade on the feature map "map" of stride 4 with 4 channels, in training mode.

    Overrides are arguments of the heads, of CausalGradients, of MaskSupervision or of one pass.
    """

    def make(num_classes=2, seed=0, roi_heads=MNCROIHeads, mask_head=None, classifier_resolution=2, **overrides):
        torch.manual_seed(seed)
        # Every path is open: a test that is about one of these closes it.
        gradients = {
            "coordinates": "all",
            "mask_coordinates": True,
            "moving_targets": False,
            "average_features": False,
        }
        for name in CausalGradients.__dataclass_fields__.keys() & overrides.keys():
            gradients[name] = overrides.pop(name)
        fields = MaskSupervision.__dataclass_fields__.keys() & overrides.keys()
        supervision = MaskSupervision(**{name: overrides.pop(name) for name in fields})
        arguments = {
            "num_classes": num_classes,
            "batch_size_per_image": 64,
            "positive_fraction": 0.5,
            "proposal_matcher": Matcher([0.5], [0, 1], allow_low_quality_matches=False),
            "proposal_append_gt": True,
            "pooler": CascadePooler(RoIWarpPooler(4, [1 / 4], sampling_ratio=1), ["map"]),
            "passes": [make_pass(num_classes, mask_head, classifier_resolution)],
            "gradients": CausalGradients(**gradients),
            "mask_supervision": supervision,
            "append_gt_to_later_passes": True,
            **overrides,
        }
        return roi_heads(**arguments)

    return make


@pytest.fixture
def make_map():
    """A function that returns the feature map of a batch of images of the given size."""

    def make(n=1, height=64, width=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {"map": torch.rand(n, CHANNELS, height // 4, width // 4, generator=generator)}

    return make


@pytest.fixture
def make_proposals():
    """A function that wraps boxes, (R, 4) or a list of rows, as the RPN's output of one image."""

    def make(boxes, image_size=(64, 64)):
        boxes = boxes if isinstance(boxes, torch.Tensor) else torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        result = Instances(image_size)
        result.proposal_boxes = Boxes(boxes)
        return result

    return make


@pytest.fixture
def make_target():
    """A function that makes the ground truth of one image: rectangles that fill their boxes, unless masks are given."""

    def make(boxes, classes, image_size=(64, 64), masks=None, has_mask=None):
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        if masks is None:
            masks = torch.zeros(len(boxes), *image_size, dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
                mask[y1:y2, x1:x2] = True
        result = Instances(image_size)
        result.gt_boxes = Boxes(boxes)
        result.gt_classes = torch.tensor(classes, dtype=torch.int64)
        result.gt_masks = masks if not isinstance(masks, torch.Tensor) else BitMasks(masks)
        if has_mask is not None:
            result.gt_has_mask = torch.tensor(has_mask)
        return result

    return make


@pytest.fixture
def random_boxes():
    """A function that draws boxes of 6 to 40 pixels inside an image."""

    def draw(count, seed=0, image_size=(64, 64)):
        generator = torch.Generator().manual_seed(seed)
        height, width = image_size
        size = 6 + 34 * torch.rand(count, 2, generator=generator)
        start = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
        return torch.cat((start, start + size), dim=1)

    return draw
