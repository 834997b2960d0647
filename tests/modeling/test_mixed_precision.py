"""Training under autocast: layers compute in half precision; boxes, what is decided by them, and losses do not."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from modeling.inputs import make_inputs
from torch.nn import Conv2d, Linear
from torch.utils._python_dispatch import TorchDispatchMode


class NmsInputs(TorchDispatchMode):
    """Records the dtypes of the boxes and scores that NMS is given."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "torchvision::nms":
            self.dtypes |= {args[0].dtype, args[1].dtype}
        return function(*args, **(kwargs or {}))


class Step:
    """A training step, and the dtypes that were seen in it."""

    def __init__(self, model, precision):
        self.boxes, self.layers, self.outputs = set(), set(), set()
        heads = model.roi_heads
        hooks = [
            heads.register_forward_pre_hook(lambda module, args: self.see_proposals(args[2])),
            heads.pooler.register_forward_hook(self.see_pooling),
            *(x.register_forward_hook(self.see_layer) for x in model.modules() if isinstance(x, (Conv2d, Linear))),
        ]
        for module in (heads.passes[0].mask_head, heads.passes[0].classifier):
            hooks.append(module.register_forward_hook(self.see_output))
        torch.manual_seed(0)  # what is drawn is the same in every step
        model.zero_grad()
        with EventStorage(), NmsInputs() as nms:
            with torch.autocast(model.device.type, dtype=precision, enabled=precision is not None):
                self.losses = model(make_inputs())
            sum(self.losses.values()).backward()
        self.nms = nms.dtypes
        self.gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        for hook in hooks:
            hook.remove()

    def see_proposals(self, proposals):
        for x in proposals:
            self.boxes |= {x.proposal_boxes.tensor.dtype, x.objectness_logits.dtype, x.anchor_logits.dtype}

    def see_pooling(self, module, args, result):
        self.boxes.add(args[1].dtype)

    def see_layer(self, module, args, result):
        self.layers.add(result.dtype)

    def see_output(self, module, args, result):
        self.outputs |= {x.dtype for x in (result if isinstance(result, tuple) else (result,))}


@pytest.fixture(scope="module")
def steps(small_config):
    torch.manual_seed(0)
    model = build_model(small_config())
    return Step(model, torch.bfloat16), Step(model, None)


def test_layers_compute_in_half_precision(steps):
    # Not the normalisation between them: on a GPU autocast computes that in float32.
    assert steps[0].layers == {torch.bfloat16}


def test_boxes_nms_and_what_the_heads_predict_are_float32(steps):
    assert steps[0].boxes == steps[0].nms == steps[0].outputs == {torch.float32}


def test_losses_are_float32_and_near_those_without_autocast(steps):
    half, full = steps
    assert {x.dtype for x in half.losses.values()} == {torch.float32}
    assert half.losses.keys() == full.losses.keys()
    # bfloat16 has 8 bits, and other proposals may be drawn where their scores are near one another.
    total, expected = (sum(x.losses.values()).item() for x in steps)
    assert total == pytest.approx(expected, rel=0.1)


def test_gradients_are_finite_and_reach_the_weights_that_they_reach_without_autocast(steps):
    half, full = steps
    assert half.gradients.keys() == full.gradients.keys()
    assert all(x.isfinite().all() for x in half.gradients.values())
    assert {name for name, x in half.gradients.items() if not x.any()} == {
        name for name, x in full.gradients.items() if not x.any()
    }
