"""LinearOfMaps against nn.Linear of the flattened features."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from mnc_d2.layers import HalfPrecisionWeights, LinearOfMaps

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


@pytest.mark.parametrize("change", [change_in_place, replace, load, step, change_data])
def test_a_changed_weight_is_used(layer, change):
    assert_right(layer, make_features())
    change(layer)
    assert_right(layer, make_features())


def test_the_copy_is_made_once(layer):
    assert_right(layer, make_features())
    first = layer._weight_by_pixel()
    assert_right(layer, make_features())
    assert layer._weight_by_pixel() is first


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
    assert other._copy is None and len(pickle.dumps(layer)) == size
    assert_right(other, make_features())


def test_state_dict_has_the_weight_as_it_is(layer):
    assert_right(layer, make_features())
    assert {name: x.shape for name, x in layer.state_dict().items()} == {
        "weight": (UNITS, CHANNELS * SIZE**2),
        "bias": (UNITS,),
    }
