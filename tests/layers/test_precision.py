import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from mnc_d2.layers import HalfPrecisionWeights, at_least_float32


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


IMAGE = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)


def run(weights, module, dtype=torch.bfloat16):
    with torch.autocast(IMAGE.device.type, dtype=dtype):
        return weights.call(module, dtype, module, IMAGE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_that_of_autocast(module, dtype):
    with torch.autocast(IMAGE.device.type, dtype=dtype):
        expected = module(IMAGE)
    result = run(HalfPrecisionWeights(), module, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_layers_have_copies_during_the_call_and_their_own_weights_after_it(module):
    before = module.state_dict(keep_vars=True)
    seen = []
    module[4].register_forward_pre_hook(lambda layer, args: seen.append((layer.weight.dtype, module[1].weight.dtype)))
    run(HalfPrecisionWeights(), module)
    assert seen == [(torch.bfloat16, torch.float32)]  # normalisation stays as it is
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_own_weights_are_back_after_an_error(module):
    weight = module[0].weight

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        HalfPrecisionWeights().call(module, torch.bfloat16, fail)
    assert module[0].weight is weight


def test_copies_are_made_once(module):
    weights, seen = HalfPrecisionWeights(), []
    module[4].register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.data_ptr()))
    run(weights, module)
    run(weights, module)
    assert seen[0] == seen[1]


def change_in_place(module):
    with torch.no_grad():
        module[4].weight.mul_(2)


def replace(module):
    module[4].weight = nn.Parameter(2 * module[4].weight.detach())


def load(module):
    module.load_state_dict({name: 2 * x for name, x in module.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, replace, load])
def test_changed_weights_are_converted_again(module, change):
    weights = HalfPrecisionWeights()
    run(weights, module)
    change(module)
    assert torch.equal(run(weights, module), run(HalfPrecisionWeights(), module))


def test_another_precision_makes_other_copies(module):
    weights = HalfPrecisionWeights()
    run(weights, module)
    assert run(weights, module, torch.float16).dtype == torch.float16


def test_layers_that_share_a_weight_share_its_copy(module):
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    weights, x = HalfPrecisionWeights(), torch.ones(1, 8)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(weights.call(tied, torch.bfloat16, tied, x), tied(x))


def test_only_half_precision_is_promoted():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    promoted = [at_least_float32(torch.ones(1, dtype=dtype)).dtype for dtype in dtypes]
    assert promoted == [torch.float32, torch.float32, torch.float32, torch.float64]


class Standardised(nn.Linear):
    """A layer that changes its weight before use, in full precision."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


def test_layers_that_compute_with_their_weight_keep_it():
    torch.manual_seed(0)
    layer = Standardised(8, 8)
    nn.init.normal_(layer.weight, mean=0.2, std=0.01)  # which half precision would drown
    x = torch.randn(4, 8)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(HalfPrecisionWeights().call(layer, torch.bfloat16, layer, x), layer(x))


def test_calls_of_several_threads_leave_the_weights_as_they_were(module):
    weights, own, inside = HalfPrecisionWeights(), module[0].weight, threading.Barrier(2)

    def call():
        def wait():
            # Both would be inside at once if they could; one waits for the other in vain.
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(timeout=0.2)

        weights.call(module, torch.bfloat16, wait)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module[0].weight is own


def test_weights_made_in_inference_mode_are_converted():
    with torch.inference_mode():
        layer = nn.Linear(3, 3)
    assert HalfPrecisionWeights().call(layer, torch.bfloat16, lambda: layer.weight.dtype) == torch.bfloat16


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_not_copied(module, make_copy):
    weights = HalfPrecisionWeights()
    run(weights, module)
    assert len(pickle.dumps(make_copy(weights))) == len(pickle.dumps(HalfPrecisionWeights()))
    assert torch.equal(run(make_copy(weights), module), run(weights, module))
