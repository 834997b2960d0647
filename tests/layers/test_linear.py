"""Linear against nn.Linear, and LinearOfMaps against nn.Linear of the flattened features."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnc_d2.layers import HalfPrecisionWeights, Linear, LinearOfMaps
from mnc_d2.layers.onednn import has_onednn

UNITS, CHANNELS, SIZE = 5, 6, 4


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return LinearOfMaps(CHANNELS, SIZE, SIZE, UNITS).eval()


def make_features(count=3, dtype=torch.float32):
    """Features (R, C, S, S) in channels_last, as the warp gives them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, SIZE, SIZE, CHANNELS, generator=generator).to(dtype).permute(0, 3, 1, 2)


def expect(layer, features):
    return F.linear(features.flatten(1), layer.weight, layer.bias)


def assert_right(layer, features):
    """Sums in another order: a few units in the last place of float32."""
    with torch.no_grad():
        torch.testing.assert_close(layer(features), expect(layer, features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_channels_last(layer, count):
    assert_right(layer, make_features(count))


def test_other_orders_in_memory(layer):
    assert_right(layer, make_features().contiguous())
    assert_right(layer, make_features().transpose(2, 3))
    assert_right(layer, make_features(6)[::2])


def test_float64(layer):
    assert_right(layer.double(), make_features(dtype=torch.float64))


def test_gradients_are_those_of_the_linear_layer(layer):
    features = make_features().requires_grad_()
    inputs = [features, *layer.parameters()]
    result = torch.autograd.grad(layer(features).square().sum(), inputs)
    expected = torch.autograd.grad(expect(layer, features).square().sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(result, expected))


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def replace(layer):
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach())


def load(layer):
    layer.load_state_dict({name: 2 * x for name, x in layer.state_dict().items()})


def step(layer):
    layer(make_features()).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def change_data(layer):
    layer.weight.data = layer.weight.data * 2
    layer.eval()


def round_numbers(layer):
    layer.bfloat16().float()


@pytest.mark.parametrize("change", [change_in_place, replace, load, step, change_data, round_numbers])
def test_a_changed_weight_is_used(layer, change):
    assert_right(layer, make_features())
    change(layer)
    assert_right(layer, make_features())


def test_the_copy_is_made_once(layer):
    assert_right(layer, make_features())
    first = layer._copy.get([layer.weight], lambda: None)
    assert_right(layer, make_features())
    assert first is not None and layer._copy.get([layer.weight], lambda: None) is first


def test_half_precision(layer):
    """With bfloat16's copies of the weights, and with autocast's: products of the same numbers, summed in float32."""
    weights, features = HalfPrecisionWeights(), make_features(dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast(features.device.type, dtype=torch.bfloat16):
        results = [layer(features), weights.call(layer, torch.bfloat16, layer, features)]
        expected = expect(layer, features)
    for result in results:
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-9)  # rounded once, to 8 bits


def test_weights_made_in_inference_mode_may_change(layer):
    with torch.inference_mode():
        layer = LinearOfMaps(CHANNELS, SIZE, SIZE, UNITS).eval()
        for _ in range(2):
            assert_right(layer, make_features())
            layer.weight.mul_(2)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_layer_have_none_of_the_weight(layer, make_copy):
    size = len(pickle.dumps(layer))
    assert_right(layer, make_features())
    other = make_copy(layer)
    assert len(pickle.dumps(other)) == size and len(pickle.dumps(layer)) == size
    assert_right(other, make_features())


def test_state_dict_has_the_weight_as_it_is(layer):
    assert_right(layer, make_features())
    assert {name: x.shape for name, x in layer.state_dict().items()} == {
        "weight": (UNITS, CHANNELS * SIZE**2),
        "bias": (UNITS,),
    }


class Operators(TorchDispatchMode):
    """Takes down whether oneDNN is asked for a product directly."""

    def __init__(self):
        super().__init__()
        self.use_onednn = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.use_onednn |= function.name() == "mkldnn::_linear_pointwise"
        return function(*args, **(kwargs or {}))


def uses_onednn(function):
    with Operators() as operators:
        function()
    return operators.use_onednn


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Linear(6, 5).eval()


def make_x(*shape):
    return torch.linspace(-1, 1, 6 * math.prod(shape)).view(*shape, 6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 0)])
def test_the_product_is_that_of_pytorch(plain, shape, dtype, tolerance):
    """Of float32, sums in another order; of float64 the same."""
    x = make_x(*shape).to(dtype)
    plain.to(dtype)
    expected = F.linear(x, plain.weight, plain.bias)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=tolerance)
    plain.bias = None
    torch.testing.assert_close(plain(x), F.linear(x, plain.weight), rtol=0, atol=tolerance)


@torch.no_grad()
def test_x_of_any_strides(plain):
    x = make_x(4)
    for same in (x.t().contiguous().t(), x.repeat_interleave(2, dim=0)[::2], x.repeat_interleave(2, dim=1)[:, ::2]):
        torch.testing.assert_close(plain(same), F.linear(x, plain.weight, plain.bias), rtol=0, atol=1e-6)


@pytest.mark.skipif(not has_onednn(torch.float32), reason="PyTorch is built without oneDNN")
def test_onednn_is_for_inference_in_float32_on_a_cpu_where_it_is_allowed(plain):
    x = make_x(4)
    with torch.no_grad():
        assert uses_onednn(lambda: plain(x)) == (x.device.type == "cpu")
        with torch.backends.mkldnn.flags(enabled=False):
            assert not uses_onednn(lambda: plain(x))
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            assert not uses_onednn(lambda: plain(x))
            assert torch.equal(plain(x), F.linear(x, plain.weight, plain.bias))
    assert not uses_onednn(lambda: plain(x))  # gradients may be wanted


def test_gradients_are_those_of_pytorch(plain):
    inputs = [make_x(4).requires_grad_(), *plain.parameters()]
    result = torch.autograd.grad(plain(inputs[0]).square().sum(), inputs)
    expected = torch.autograd.grad(F.linear(*inputs).square().sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(result, expected))


def test_conversion_leaves_weights_seeds_and_layers_of_other_kinds():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False), LinearOfMaps(1, 1, 5, 2)))
    before, state = module.state_dict(keep_vars=True), torch.get_rng_state()
    Linear.convert(module)
    assert [type(x) for x in (module[0], *module[1])] == [Linear, Linear, LinearOfMaps]
    assert torch.equal(torch.get_rng_state(), state)
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is x for name, x in before.items())


@pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("name, x, tolerance", [("plain", make_x(4), 0), ("layer", make_features(), 2**-8)])
def test_weights_of_half_precision_are_packed(request, name, x, tolerance):
    """The results are those of autocast: of maps with sums in another order, rounded to 8 bits."""
    one, weights = request.getfixturevalue(name), HalfPrecisionWeights()
    with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.bfloat16):
        expected = F.linear(x.flatten(1), one.weight, one.bias)
        with Operators() as operators:
            result = weights.call(one, torch.bfloat16, one, x)
    assert operators.use_onednn == (x.device.type == "cpu")
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def test_half_precision_of_maps_in_another_order(layer):
    features = make_features(dtype=torch.bfloat16)
    with torch.no_grad():
        results = [
            HalfPrecisionWeights().call(layer, torch.bfloat16, layer, x) for x in (features, features.contiguous())
        ]
    assert torch.equal(*results)


def test_gradients_pass_through_layers_in_half_precision(plain):
    """Packed weights have none: where they are wanted, there are no such."""
    x, weights = make_x(4).requires_grad_(), HalfPrecisionWeights()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        with torch.no_grad():
            weights.call(plain, torch.bfloat16, plain, x)
        (gradient,) = torch.autograd.grad(weights.call(plain, torch.bfloat16, plain, x).sum(), x)
    torch.testing.assert_close(gradient, plain.weight.sum(dim=0).expand_as(x), rtol=2**-6, atol=2**-6)


def test_layers_of_both_kinds_may_share_a_weight(layer):
    other = Linear(layer.in_features, UNITS).eval()
    other.weight, other.bias = layer.weight, layer.bias
    both, features = nn.ModuleList([layer, other]), make_features(dtype=torch.bfloat16)
    with torch.no_grad():
        call = partial(HalfPrecisionWeights().call, both, torch.bfloat16)
        of_maps, of_vectors = call(lambda: (layer(features), other(features.flatten(1))))
    torch.testing.assert_close(of_maps, of_vectors, rtol=2**-7, atol=2**-8)


def test_the_graph_of_an_exported_layer_has_operators_of_pytorch_alone(plain):
    with torch.no_grad():
        program = torch.export.export(plain, (make_x(4),))
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
