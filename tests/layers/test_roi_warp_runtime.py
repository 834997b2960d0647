"""RoI warp under what PyTorch runs models with: autocast, the compiler, export, and how much memory it takes."""

import io

import pytest
import torch
from benchmarks.measure import peak_memory
from torch import nn

from mnc_d2.layers import roi_warp

SCALE = 0.25


def make_features(channels=3, n=2, height=9, width=12):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def make_rois(count, seed=0, n=2):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 36
    end = start + torch.rand(count, 2, generator=generator) * 30
    return torch.cat((torch.randint(n, (count, 1), generator=generator), start, end), dim=1)


class Warp(nn.Module):
    """What can be exported: a module."""

    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, features, rois):
        return roi_warp(features, rois, 4, SCALE, **self.arguments)


@pytest.fixture(params=[("center", True), ("caffe", False)], ids=["center, max_pool", "caffe, plain"])
def warp(request):
    """Both kinds of sampling, with and without the maximum; the compiler takes many seconds for each."""
    sampling, max_pool = request.param
    return Warp(sampling=sampling, max_pool=max_pool)


def values_and_gradients(warp, features, rois):
    features, rois = features.clone().requires_grad_(), rois.clone().requires_grad_()
    result = warp(features, rois)
    return [result, *torch.autograd.grad(result.float().square().sum(), (features, rois))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(warp, dtype):
    inputs = make_features().to(dtype), make_rois(6)
    expected = values_and_gradients(warp, *inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        result = values_and_gradients(warp, *inputs)
    for x, y in zip(result, expected):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.cpu_only  # what puts the tensors of the tests on a GPU cannot be traced
def test_compiles_without_a_graph_break_for_any_number_of_boxes(warp):
    torch.compiler.reset()
    # Traced forward and backward as for every backend, but run without one: that would need a C++ compiler.
    compiled = torch.compile(warp, backend="aot_eager", fullgraph=True)
    for count in (5, 8, 0, 1):
        inputs = make_features(), make_rois(count, seed=count)
        for x, y in zip(values_and_gradients(compiled, *inputs), values_and_gradients(warp, *inputs)):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_exports_with_any_number_of_boxes_and_any_image(warp):
    dim = torch.export.Dim
    shapes = {0: dim("N", max=8), 2: dim("H"), 3: dim("W")}, {0: dim("R", min=0)}
    program = torch.export.export(warp, (make_features(), make_rois(7)), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for count, n, height, width in ((7, 2, 9, 12), (0, 2, 9, 12), (1, 2, 9, 12), (13, 3, 5, 17)):
        features, rois = make_features(3, n, height, width), make_rois(count, count, n)
        assert torch.equal(exported(features, rois), warp(features, rois))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_form_takes_at_most_twice_the_memory_of_its_result(dtype):
    features, rois = make_features(256, 1, 38, 50).to(dtype), make_rois(300, n=1)
    with torch.no_grad():
        result = roi_warp(features, rois, 14, SCALE, max_pool=True)
        peak = peak_memory(lambda: roi_warp(features, rois, 14, SCALE, max_pool=True))
    size = result.numel() * result.element_size()
    assert size <= peak <= 2 * size  # the result itself included


def test_result_is_channels_last(warp):
    assert warp(make_features(), make_rois(5)).is_contiguous(memory_format=torch.channels_last)
