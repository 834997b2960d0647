"""Identities that shape the gradient."""

import pytest
import torch

from mnc_d2.layers import clip_gradient, stop_gradient_except

GRADIENT = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])


def gradient_through(function):
    x = torch.arange(5.0).requires_grad_()
    y = function(x)
    assert torch.equal(y, x)
    y.backward(GRADIENT)
    return x.grad


@pytest.mark.parametrize("limit", [1.0, 0.25, 10.0])
def test_clip_gradient_clamps_each_element(limit):
    expected = torch.tensor([min(max(g, -limit), limit) for g in GRADIENT.tolist()])
    assert torch.equal(gradient_through(lambda x: clip_gradient(x, limit)), expected)


def test_clip_gradient_with_limit_zero_does_not_clamp():
    assert torch.equal(gradient_through(lambda x: clip_gradient(x, 0)), GRADIENT)


def test_clip_gradient_leaves_other_uses_alone():
    x = torch.zeros(5, requires_grad=True)
    (clip_gradient(x, 1.0) + x).backward(GRADIENT)
    assert torch.equal(x.grad, GRADIENT.clamp(-1, 1) + GRADIENT)


def test_clip_gradient_takes_constants():
    x = torch.arange(5.0)
    assert torch.equal(clip_gradient(x, 1.0), x)


def test_pass_gradient_passes_only_where_true():
    where = torch.tensor([True, False, True, False, True])
    assert torch.equal(gradient_through(lambda x: stop_gradient_except(x, where)), GRADIENT * where)


def test_pass_gradient_broadcasts_the_mask():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    y = stop_gradient_except(x, torch.tensor([[True], [False]]))
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.tensor([[1.0] * 3, [0.0] * 3]))
