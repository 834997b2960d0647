"""Max pooling of RoIs and images against PyTorch's, with and without gradients."""

import pytest
import torch
import torch.nn.functional as F

from mnc_d2.layers import max_pool, max_pool_images, pooling


def make_rois(count=7, size=6, dtype=torch.float32):
    """Features (R, C, S, S), as the warp gives them, and masks."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, size, size, 5, generator=generator).permute(0, 3, 1, 2).to(dtype)
    return features, torch.rand(count, size, size, generator=generator)


@pytest.mark.parametrize("elements", [1, 400, 2**20])  # one RoI, two, and all at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_without_gradients_it_is_exactly_that_of_pytorch(monkeypatch, size, dtype, elements):
    monkeypatch.setattr(pooling, "_MAX_ELEMENTS", elements)
    features, masks = make_rois(dtype=dtype)
    with torch.no_grad():
        pooled, masked = max_pool(features, size), max_pool(features, size, masks)
    assert pooled.dtype == masked.dtype == dtype
    assert torch.equal(pooled, F.max_pool2d(features, 6 // size))
    assert torch.equal(masked, F.max_pool2d(features * masks[:, None].to(dtype), 6 // size))


def test_no_rois():
    with torch.no_grad():
        assert max_pool(make_rois(count=0)[0], 3).shape == (0, 5, 3, 3)


def test_nan_stays_nan():
    features, masks = make_rois()
    features[2, 1, 3, 3] = torch.nan
    with torch.no_grad():
        pooled = max_pool(features, 3, masks)
    assert pooled[2, 1, 1, 1].isnan() and pooled.isnan().sum() == 1


def test_gradients_are_those_of_pytorch():
    """Where several elements are the largest, the first has the gradient."""
    features, masks = make_rois()
    results = []
    for pool in (lambda x, m: max_pool(x, 3, m), lambda x, m: F.max_pool2d(x * m[:, None], 2)):
        inputs = [x.clone().requires_grad_() for x in (features.relu(), masks)]
        results.append(torch.autograd.grad(pool(*inputs).square().sum(), inputs))
    for result, expected in zip(*results):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("elements", [1, 300, 2**20])  # one row of windows, some, and all at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 7, 9), (1, 2, 3), (0, 4, 4)])
@pytest.mark.parametrize("stride, ceil_mode", [(1, False), (2, False), (2, True)])
def test_images_without_gradients(monkeypatch, stride, ceil_mode, shape, dtype, elements):
    monkeypatch.setattr(pooling, "_MAX_ELEMENTS", elements)
    count, height, width = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, height, width, 5, generator=generator).to(dtype).permute(0, 3, 1, 2)
    for x in (images, images.contiguous()):
        with torch.no_grad():
            pooled = max_pool_images(x, stride, ceil_mode)
        expected = F.max_pool2d(x, stride, ceil_mode=ceil_mode)
        assert pooled.dtype == dtype and torch.equal(pooled, expected)
        assert pooled.stride() == expected.stride() or count == 0


def test_gradients_of_images():
    images = make_rois()[0].relu().requires_grad_()
    (result,) = torch.autograd.grad(max_pool_images(images, 2).square().sum(), images)
    (expected,) = torch.autograd.grad(F.max_pool2d(images, 2).square().sum(), images)
    assert torch.equal(result, expected)
