"""FusedConv2d against Detectron2's Conv2d, which calls the operators one by one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnc_d2.layers import FusedConv2d, HalfPrecisionWeights
from mnc_d2.layers.onednn import has_onednn

IN, OUT = 4, 6
NORMS = {
    "none": lambda: None,
    "frozen": lambda: FrozenBatchNorm2d(OUT),
    "batch": lambda: nn.BatchNorm2d(OUT),
    "batch, not affine": lambda: nn.BatchNorm2d(OUT, affine=False),
    "batch, no statistics": lambda: nn.BatchNorm2d(OUT, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, OUT),
}


class ClippedReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp(max=0.5)


ACTIVATIONS = {
    "none": None,
    "module": nn.ReLU(),
    "in place": F.relu_,
    "function": F.relu,
    "another": F.silu,
    "of its own": ClippedReLU(),
}


def make_layer(norm="frozen", activation=F.relu_, kind=FusedConv2d, **options):
    """A layer in eval() with random weights and statistics, the same for any kind."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    layer = kind(IN, OUT, norm=NORMS[norm](), activation=activation, **options)
    with torch.no_grad():
        for name, x in layer.state_dict().items():
            if name.startswith("norm") and x.is_floating_point():
                x.uniform_(0.5, 2.0)
    return layer.eval()


def make_x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGES = make_x(2, IN, 7, 9)


def separately(layer, x):
    """What Detectron2's layer of the same weights returns."""
    return Conv2d.forward(layer, x)


def assert_right(layer, x=IMAGES):
    """Factors multiplied into the weights, and sums in another order: a few units in the last place of float32."""
    with torch.no_grad():
        expected = separately(copy.deepcopy(layer).double(), x.double()).float()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


class Operators(TorchDispatchMode):
    """Takes down the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def operators_of(function):
    with Operators() as operators:
        function()
    return operators.names


def is_fused(function):
    return "mkldnn::_convolution_pointwise" in operators_of(function)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_and_activations(norm, activation):
    assert_right(make_layer(norm, ACTIVATIONS[activation]))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"kernel_size": 1, "padding": 0},
        {"stride": 2, "padding": (0, 2)},
        {"dilation": 2, "groups": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_options_of_the_convolution(options):
    assert_right(make_layer(**options))


@pytest.mark.parametrize("shape", [(0, IN, 7, 9), (1, IN, 1, 1), (3, IN, 1, 20)])
def test_images_of_other_sizes_than_the_first(shape):
    layer = make_layer()
    assert_right(layer)
    assert_right(layer, make_x(*shape))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_orders_in_memory(memory_format):
    layer, x = make_layer(), IMAGES.to(memory_format=memory_format)
    assert_right(layer, x)
    assert_right(layer, x[..., ::2])


@pytest.mark.parametrize("autocast", [False, True])
def test_float64(autocast):
    layer = make_layer().double()
    with torch.no_grad(), torch.autocast(IMAGES.device.type, dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(IMAGES.double()), separately(layer, IMAGES.double()))


@torch.no_grad()
def test_an_image_without_a_batch_and_wrong_inputs_are_as_for_a_convolution():
    layer = make_layer("none")
    torch.testing.assert_close(layer(IMAGES[0]), separately(layer, IMAGES[0]))
    for x in (IMAGES[:, 1:], IMAGES.bfloat16()):
        with pytest.raises(RuntimeError, match="expected input|should be the same"):
            layer(x)


@pytest.mark.skipif(not has_onednn(torch.float32), reason="PyTorch is built without oneDNN")
def test_it_is_one_operator_for_inference_on_a_cpu_where_it_is_allowed():
    layer = make_layer()
    on_cpu = IMAGES.device.type == "cpu"
    with torch.no_grad():
        names = operators_of(lambda: layer(IMAGES))
        assert ("mkldnn::_convolution_pointwise" in names) == on_cpu
        assert any("batch_norm" in x or "relu" in x for x in names) != on_cpu
        with torch.backends.mkldnn.flags(enabled=False):
            assert not is_fused(lambda: layer(IMAGES))
    assert not is_fused(lambda: layer(IMAGES))  # gradients may be wanted
    with torch.no_grad():
        layer.train()
        assert not is_fused(lambda: layer(IMAGES))


def test_statistics_of_the_batch_are_taken_in_training():
    layer, plain = (make_layer("batch", kind=kind).train() for kind in (FusedConv2d, Conv2d))
    with torch.no_grad():
        assert torch.equal(layer(IMAGES), plain(IMAGES))
    assert torch.equal(layer.norm.running_mean, plain.norm.running_mean)


def test_a_norm_in_training_alone_is_not_folded():
    layer, plain = (make_layer("batch", kind=kind) for kind in (FusedConv2d, Conv2d))
    assert_right(layer)
    for x in (layer, plain):
        x.norm.train()
    with torch.no_grad():
        torch.testing.assert_close(layer(IMAGES), plain(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "frozen", "batch", "group"])
def test_gradients_are_those_of_the_operators(norm):
    layers = [make_layer(norm, kind=kind) for kind in (FusedConv2d, Conv2d)]
    result, expected = (
        torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        for layer, x in ((layer, IMAGES.clone().requires_grad_()) for layer in layers)
    )
    assert all(torch.equal(x, y) for x, y in zip(result, expected))


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def replace(layer):
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def load(layer):
    layer.load_state_dict({name: 2 * x for name, x in layer.state_dict().items()})


def change_norm(layer):
    layer.norm.running_var.mul_(3)


def change_offsets(layer):
    layer.norm.running_mean.add_(1)
    layer.norm.bias.mul_(2)


def replace_norm(layer):
    layer.norm = make_layer("batch").norm


def remove_norm(layer):
    layer.norm = None


def change_eps(layer):
    layer.norm.eps = 0.5


def change_data(layer):
    layer.weight.data = layer.weight.data * 2
    layer.eval()


def round_numbers(layer):
    layer.bfloat16().float()


def step_fused(layer):
    layer(IMAGES).sum().backward()
    torch.optim.SGD([layer.weight], lr=0.1, fused=True).step()
    layer.eval()


CHANGES = [
    *(change_in_place, replace, load, change_norm, change_offsets, replace_norm, remove_norm, change_eps),
    *(change_data, round_numbers, step_fused),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_are_used(change):
    layer = make_layer()
    assert_right(layer)
    change(layer)
    assert_right(layer)


@torch.no_grad()
@pytest.mark.skipif(not has_onednn(torch.float32), reason="PyTorch is built without oneDNN")
def test_the_copy_is_made_once():
    layer = make_layer()
    reorders = [operators_of(lambda: layer(IMAGES)).count("mkldnn::_reorder_convolution_weight") for _ in range(2)]
    assert reorders == ([1, 0] if IMAGES.device.type == "cpu" else [0, 0])


def test_tensors_made_in_inference_mode_may_change():
    with torch.inference_mode():
        layer = make_layer()
        for _ in range(2):
            assert_right(layer)
            layer.norm.running_var.mul_(2)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_layer_have_none_of_the_weight(make_copy):
    layer = make_layer()
    size = len(pickle.dumps(layer))
    assert_right(layer)
    other = make_copy(layer)
    assert len(pickle.dumps(layer)) == len(pickle.dumps(other)) == size
    assert_right(other)


def in_bfloat16(layer, x=IMAGES):
    with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.bfloat16):
        return HalfPrecisionWeights().call(layer, torch.bfloat16, layer, x)


@pytest.mark.parametrize("norm", ["none", "frozen", "group"])
def test_half_precision(norm):
    """With and without kept copies: weights, images and results rounded to 8 bits; 36 products of some units."""
    layer = make_layer(norm)
    with torch.no_grad():
        expected = separately(layer, IMAGES)
        with torch.autocast(IMAGES.device.type, dtype=torch.bfloat16):
            autocast, plain = layer(IMAGES), separately(layer, IMAGES)
    for x in (in_bfloat16(layer), autocast):
        assert x.dtype == plain.dtype
        torch.testing.assert_close(x.float(), expected, rtol=2**-6, atol=2**-4)


def test_both_precisions_in_turn():
    layer = make_layer()
    assert_right(layer)
    first = in_bfloat16(layer)
    assert_right(layer)
    assert torch.equal(in_bfloat16(layer), first)


def test_layers_of_several_norms_may_share_a_weight():
    layer, other = make_layer("frozen"), make_layer("batch")
    other.weight = layer.weight
    other.norm.running_var.mul_(3)
    both = nn.ModuleList([layer, other])
    with torch.no_grad():
        expected = [separately(x, IMAGES) for x in both]
        with torch.autocast(IMAGES.device.type, dtype=torch.bfloat16):
            results = HalfPrecisionWeights().call(both, torch.bfloat16, lambda: [x(IMAGES) for x in both])
    for x, y in zip(results, expected):
        torch.testing.assert_close(x.float(), y, rtol=2**-6, atol=2**-4)


def test_conversion_leaves_weights_and_layers_of_other_kinds():
    module = nn.Sequential(make_layer(kind=Conv2d), nn.Conv2d(OUT, IN, 1), nn.Sequential(make_layer(kind=Conv2d)))
    with torch.no_grad():
        expected = module(IMAGES)
        before = module.state_dict(keep_vars=True)
        FusedConv2d.convert(module)
        assert [type(x) for x in (module[0], module[1], module[2][0])] == [FusedConv2d, nn.Conv2d, FusedConv2d]
        after = module.state_dict(keep_vars=True)
        assert after.keys() == before.keys() and all(after[name] is x for name, x in before.items())
        torch.testing.assert_close(module(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_conversion_twice_keeps_copies():
    layer = make_layer()
    kept = layer._copy
    FusedConv2d.convert(layer)
    assert layer._copy is kept


def test_the_graph_of_an_exported_layer_has_operators_of_pytorch_alone():
    with torch.no_grad():
        program = torch.export.export(make_layer(), (IMAGES,))
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
