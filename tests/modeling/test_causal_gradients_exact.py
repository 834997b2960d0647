"""The gradient of the later stages' losses to box deltas, against central differences of the whole model in float64.

Detectron2 rounds boxes to float32. That is lifted here, and here only: what is checked is the derivative, for which
differences of float32 would be far too coarse. Labels and the choice of RoIs are constants of the derivative, and so
are targets if they do not move: these are recorded at the point where it is taken and kept for the differences.
"""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from mnc_d2.modeling import CausalGradients
from mnc_d2.modeling.roi_heads import mask_supervision, mnc_roi_heads
from mnc_d2.modeling.roi_heads.output_layers import Predictions

STEP = 1e-6
SIZE = 64


class Constants:
    """Values of functions that are called in the same order in every run: computed in the first, then repeated."""

    def __init__(self):
        self.values, self.position = [], None

    def rewind(self):
        self.position = 0

    def keep(self, function):
        def wrapped(*args, **kwargs):
            if self.position is None:
                self.values.append(function(*args, **kwargs))
                return self.values[-1]
            self.position += 1
            return self.values[self.position - 1]

        return wrapped


class BoxTransform:
    """Detectron2's ``Box2BoxTransform`` without the rounding to float32, and with targets that are kept or move."""

    def __init__(self, weights, constants, moving_targets):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.get_deltas = self._get_deltas if moving_targets else constants.keep(self._get_deltas)

    def _get_deltas(self, boxes, targets):
        (size, centre), (target_size, target_centre) = self._to_centre(boxes), self._to_centre(targets)
        return self.weights * torch.cat(((target_centre - centre) / size, (target_size / size).log()), dim=1)

    def apply_deltas(self, deltas, boxes):
        size, centre = (x[:, None] for x in self._to_centre(boxes))
        shift, log_scale = (deltas.view(len(deltas), -1, 4) / self.weights).split(2, dim=2)
        centre, size = centre + shift * size, size * log_scale.clamp(max=math.log(1000 / 16)).exp()
        return torch.cat((centre - size / 2, centre + size / 2), dim=2).view_as(deltas)

    @staticmethod
    def _to_centre(boxes):
        return boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2


class Shifted(nn.Module):
    """Adds an offset to the deltas in the output of a module, on its next call only, and keeps the first deltas."""

    def __init__(self, module, position):
        super().__init__()
        self.module, self.position = module, position
        self.deltas = self.offset = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args):
        output = list(self.module(*args))
        deltas = output[self.position]
        one_level = isinstance(deltas, torch.Tensor)
        if not one_level:
            # Objectness decides on proposals. Detectron2's NMS wants it in float32, as it wants the boxes.
            output[0] = [x.float() for x in output[0]]
        if self.deltas is None:
            self.deltas = deltas
        if self.offset is not None:
            shifted = deltas + self.offset if one_level else [x + o for x, o in zip(deltas, self.offset)]
            output[self.position], self.offset = shifted, None
        return Predictions(*output) if one_level else tuple(output)


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    target = Instances((SIZE, SIZE))
    target.gt_boxes = Boxes(torch.tensor([[9.0, 11.0, 33.0, 37.0], [30.0, 28.0, 57.0, 55.0]]))
    target.gt_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 11:37, 9:33] = masks[1, 28:55, 30:57] = True
    target.gt_masks = BitMasks(masks)
    image = torch.rand(3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 255
    return [{"image": image, "instances": target}]


class Experiment:
    """A tiny cascade in float64 whose deltas, of the RPN or of the first pass, can be shifted."""

    def __init__(self, cfg):
        self.constants = Constants()
        torch.manual_seed(0)
        self.model = build_model(cfg).double()
        self.model.backbone.forward = self.constants.keep(self.model.backbone.forward)
        heads, rpn = self.model.roi_heads, self.model.proposal_generator
        classifier = heads.passes[0].classifier
        predictor = classifier.predictor
        for parent, weights in ((rpn, (1.0, 1.0, 1.0, 1.0)), (predictor, (10.0, 10.0, 5.0, 5.0))):
            moving = CausalGradients.parse(cfg.MODEL.MNC.GRADIENTS).moving_targets and parent is predictor
            parent.box2box_transform = BoxTransform(weights, self.constants, moving)
        for layer, std in ((predictor.bbox_pred, 0.05), (predictor.seg_cls_score, 0.3)):
            nn.init.normal_(layer.weight, std=std)
        self.rpn_head = rpn.rpn_head = Shifted(rpn.rpn_head, position=1)
        self.predictor = classifier.predictor = Shifted(predictor, position=2)

    def losses(self, rpn_offset=None, pass_offset=None):
        """Losses of the stages from 2 on; the first call fixes everything that is constant."""
        self.rpn_head.offset, self.predictor.offset = rpn_offset, pass_offset
        torch.manual_seed(0)
        with EventStorage():
            losses = self.model(make_inputs())
        self.constants.rewind()
        return {name: loss for name, loss in losses.items() if "rpn" not in name}


@pytest.fixture
def make_experiment(small_config, monkeypatch):
    """A function that builds the experiment; every gradient flows but for those that its arguments are about."""

    def keep_dtype(self, tensor):
        self.tensor = tensor if tensor.is_floating_point() else tensor.float()

    monkeypatch.setattr(Boxes, "__init__", keep_dtype)

    def make(**gradients):
        gradients = CausalGradients(
            **{
                "delta_clip": 0.0,
                "border": True,
                "masks": "all",
                "coordinates": "all",
                "mask_coordinates": True,
                "average_features": False,
                **gradients,
            }
        )
        cfg = small_config(
            **{
                "MODEL.MNC.GRADIENTS": str(gradients),
                "MODEL.ROI_HEADS.NAME": "PaperMNCROIHeads",
                "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
                "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
                "MODEL.FPN.OUT_CHANNELS": 8,
                "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
                "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
            }
        )
        cfg.merge_from_list(["MODEL.FPN.NORM", "", "MODEL.RESNETS.NORM", "BN"])
        experiment = Experiment(cfg)
        keep = experiment.constants.keep
        monkeypatch.setattr(mask_supervision, "match_masks", keep(mask_supervision.match_masks))
        monkeypatch.setattr(mnc_roi_heads, "sample_rois", keep(mnc_roi_heads.sample_rois))
        return experiment

    return make


def shapes_of_deltas(experiment):
    """Shapes of the deltas of the RPN, one per level, and of the first pass."""
    experiment.losses()
    return [x.shape for x in experiment.rpn_head.deltas], experiment.predictor.deltas.shape


def assert_gradients_are_central_differences(losses_of, offset, entries):
    """Compare, for each of several losses, where its gradient is largest, and at some entries where all are zero."""
    losses = losses_of(offset)
    gradients = [torch.autograd.grad(x, offset, retain_graph=True)[0].flatten() for x in losses]
    largest = [x.abs().argsort(descending=True)[:entries].tolist() for x in gradients]
    assert all(x[i] != 0 for x, order in zip(gradients, largest) for i in order)
    zero = sum(x.abs() for x in gradients).argsort()[:3].tolist()
    for i in sorted({*zero, *(i for order in largest for i in order)}):
        shift = torch.zeros_like(offset).flatten()
        shift[i] = STEP
        shift = shift.view_as(offset)
        with torch.no_grad():
            differences = (losses_of(offset + shift) - losses_of(offset - shift)) / (2 * STEP)
        for difference, expected in zip(differences, (x[i] for x in gradients)):
            # Rounding of a loss of order 1: 1e-16 / 1e-6; the third derivative times the step squared is less.
            assert abs(difference - expected) < 1e-6 * max(1, abs(expected)), f"entry {i}: {difference} != {expected}"


def masks_and_categories(losses):
    """The sums of the losses of masks and of those of categories and boxes."""
    of_masks = {name for name in losses if name.startswith("loss_mask")}
    assert 0 < len(of_masks) < len(losses)
    return torch.stack([sum(losses[x] for x in names) for names in (of_masks, losses.keys() - of_masks)])


@pytest.mark.parametrize("moving_targets", [False, True], ids=["constant targets", "moving targets"])
def test_gradients_to_the_rpn_deltas(make_experiment, moving_targets):
    experiment = make_experiment(moving_targets=moving_targets)
    shapes, _ = shapes_of_deltas(experiment)
    sizes = [shape.numel() for shape in shapes]

    def losses_of(flat):
        offset = [x.view(shape) for x, shape in zip(flat.split(sizes), shapes)]
        return masks_and_categories(experiment.losses(rpn_offset=offset))

    offset = torch.zeros(sum(sizes), dtype=torch.float64, requires_grad=True)
    assert_gradients_are_central_differences(losses_of, offset, entries=12)


@pytest.mark.parametrize("moving_targets", [False, True], ids=["constant targets", "moving targets"])
def test_gradients_to_the_deltas_of_the_first_pass(make_experiment, moving_targets):
    experiment = make_experiment(moving_targets=moving_targets)
    _, shape = shapes_of_deltas(experiment)
    offset = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def losses_of(offset):
        return masks_and_categories(experiment.losses(pass_offset=offset))

    assert_gradients_are_central_differences(losses_of, offset, entries=6)


def test_gradient_to_the_rpn_deltas_is_zero_with_the_switch_off(make_experiment):
    experiment = make_experiment(proposals=False)
    shapes, _ = shapes_of_deltas(experiment)
    offset = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    gradients = torch.autograd.grad(sum(experiment.losses(rpn_offset=offset).values()), offset, allow_unused=True)
    assert all(x is None or not x.any() for x in gradients)


def test_gradient_of_the_second_pass_to_the_deltas_of_the_first_is_zero_with_the_switch_off(make_experiment):
    experiment = make_experiment(boxes=False)
    _, shape = shapes_of_deltas(experiment)
    offset = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    losses = experiment.losses(pass_offset=offset)
    of_second_pass = sum(loss for name, loss in losses.items() if name[-1] in "45")
    (gradient,) = torch.autograd.grad(of_second_pass, offset, allow_unused=True, retain_graph=True)
    assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(losses["loss_box_reg_s3"], offset)
    assert gradient.any()
