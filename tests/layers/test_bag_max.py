"""The largest of weighted sums of feature vectors: values and gradients against a computation with plain indexing."""

import pytest
import torch
from torch.autograd import gradcheck

from mnc_d2.layers import bag_max as module
from mnc_d2.layers.bag_max import bag_max


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_inputs(boxes, bins, sums, terms, channels, dtype=torch.float64):
    """Maps of two levels with two images, and sums of random pixels with random weights."""
    generator = make_generator()
    features = [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in ((5, 7), (3, 4))]
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features)
    index = torch.randint(rows, (boxes, bins, sums, terms), generator=generator)
    weight = torch.randn(index.shape, generator=generator, dtype=torch.float64)
    return features, index, weight if dtype == torch.float64 else weight.float()


def slow_bag_max(features, index, weight):
    table = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in features])
    sums = (table[index] * weight[..., None]).sum(dim=3)  # (R, B, P, C)
    return sums.max(dim=2).values


def gradients(function, features, index, weight, seed=1):
    features, weight = [x.clone().requires_grad_() for x in features], weight.clone().requires_grad_()
    result = function(features, index, weight)
    factor = torch.randn(result.shape, generator=make_generator(seed)).to(result)
    return torch.autograd.grad(result, [*features, weight], factor)


# The last is several chunks of boxes, the last of them not full.
SHAPES = [(3, 4, 1, 4, 5), (3, 4, 4, 4, 5), (2, 3, 3, 2, 1), (1, 1, 2, 1, 9), (7, 100, 4, 4, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_plain_indexing(shape):
    inputs = make_inputs(*shape)
    torch.testing.assert_close(bag_max(*inputs), slow_bag_max(*inputs), rtol=0, atol=1e-12)
    for result, expected in zip(gradients(bag_max, *inputs), gradients(slow_bag_max, *inputs)):
        # Sums of up to some thousand terms of order 1.
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.cpu_only  # a GPU takes larger chunks
def test_the_last_shape_of_this_file_takes_several_chunks():
    boxes, bins, _, _, channels = SHAPES[-1]
    chunks = module._chunks((boxes, bins, channels), torch.empty(0, dtype=torch.float64))
    assert len(chunks) > 2 and boxes % chunks[0].stop != 0


def test_gradcheck():
    features, index, weight = make_inputs(2, 3, 4, 4, 2)
    leaves = [x.requires_grad_() for x in (*features, weight)]
    assert gradcheck(lambda *x: bag_max(list(x[:-1]), index, x[-1]), leaves)


@pytest.mark.parametrize("first", range(4))
def test_the_first_of_equal_sums_takes_the_gradient(first):
    features = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    # Four pixels of value 1; those before `first` are taken with a smaller weight.
    index = torch.arange(4).view(1, 1, 4, 1)
    weight = torch.ones(1, 1, 4, 1, dtype=torch.float64)
    weight[:, :, :first] = 0.5
    feature_gradient, weight_gradient = gradients(lambda *x: bag_max(*x) * 3, [features], index, weight)
    assert feature_gradient.flatten().nonzero().tolist() == [[first]]
    assert weight_gradient.flatten().nonzero().tolist() == [[first]]
    assert feature_gradient.sum() == weight_gradient.sum() != 0


@pytest.mark.parametrize("needed", ["features", "one map of two", "weight"])
def test_only_what_needs_a_gradient_is_given_one(needed):
    features, index, weight = make_inputs(3, 4, 4, 4, 5)
    expected = gradients(slow_bag_max, features, index, weight)
    leaves = {"features": [0, 1], "one map of two": [1], "weight": [2]}[needed]
    inputs = [*features, weight]
    for i in leaves:
        inputs[i].requires_grad_()
    result = bag_max(inputs[:2], index, inputs[2])
    result.backward(torch.randn(result.shape, generator=make_generator(1)).to(result))
    for i, x in enumerate(inputs):
        if i in leaves:
            torch.testing.assert_close(x.grad, expected[i], rtol=1e-12, atol=1e-12)
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    features, index, weight = make_inputs(3, 4, 4, 4, 5, dtype)
    full = [x.float() for x in features]
    result = bag_max(features, index, weight)
    assert result.dtype == dtype
    torch.testing.assert_close(result, bag_max(full, index, weight).to(dtype), rtol=0, atol=0)
    # The rounding of the result in `rounded` rounds its gradient too, so that both start from the same.
    rounded = gradients(lambda *x: bag_max(*x).to(dtype).float(), full, index, weight)
    for half, expected in zip(gradients(bag_max, features, index, weight), rounded):
        assert half.dtype == (torch.float32 if half.shape == weight.shape else dtype)
        assert torch.equal(half, expected.to(half.dtype))


def test_result_is_the_same_on_every_run():
    inputs = make_inputs(7, 100, 4, 4, 40, torch.float32)
    for first, second in zip(gradients(bag_max, *inputs), gradients(bag_max, *inputs)):
        assert torch.equal(first, second)


@pytest.mark.cpu_only  # on CUDA it ends the process
def test_a_row_beyond_the_table_is_an_error_and_not_read():
    features, index, weight = make_inputs(1, 1, 1, 1, 2)
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features)
    for beyond in (rows, -1):
        with pytest.raises((RuntimeError, IndexError)):
            bag_max(features, torch.full_like(index, beyond), weight)


def test_second_derivative_is_an_error():
    features, index, weight = make_inputs(2, 2, 4, 4, 2)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(bag_max(features, index, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="bag_max_backward"):
        torch.autograd.grad(gradient.sum(), weight)


def test_rows_that_occur_and_all_rows_give_the_same_sums():
    index = torch.tensor([0, 0, 3, 4, 4, 4, 7])  # of 9 rows
    values = torch.arange(7.0) + 1
    expected = torch.zeros(9).index_add(0, index, values)
    for rows, offsets in (module._occurring_rows(index), module._all_rows(index, 9)):
        bags = torch.nn.functional.embedding_bag(torch.arange(7), values[:, None], offsets, mode="sum")
        assert torch.equal(torch.zeros(9).index_add(0, rows, bags[:, 0]), expected)


def test_operator_is_registered_as_pytorch_expects():
    features, index, weight = make_inputs(2, 3, 4, 4, 2)
    torch.library.opcheck(bag_max, ([x.requires_grad_() for x in features], index, weight.requires_grad_()))
