"""RoI warp: values, derivatives to features and boxes, and what it does with degenerate input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torchvision.ops import roi_align

from mnc_d2.layers import RoIWarp, roi_warp, roi_warp_pyramid

SCALE = 0.25
H, W = 9, 12  # of the feature map; the image is 36 x 48


def make_features(dtype=torch.float64, n=2, channels=3):
    return torch.rand(n, channels, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# (batch index, x1, y1, x2, y2) in image pixels.
ROIS = {
    "inside": (0, 5.3, 3.1, 30.2, 28.7),
    "second image": (1, 10.9, 2.2, 17.3, 33.9),
    "less than one feature pixel": (0, 20.1, 20.3, 21.2, 21.9),
    "over the top left corner": (1, -9.7, -14.2, 12.4, 11.1),
    "over the bottom right corner": (0, 37.3, 25.2, 60.6, 51.8),
    "around the whole image": (1, -31.3, -21.7, 77.1, 60.9),
    "outside": (0, 100.3, 100.9, 120.2, 130.7),
    "outside on the other side": (1, -50.1, -41.3, -30.6, -22.8),
    "just outside": (0, 47.3, 10.2, 51.2, 20.4),
    "negative size": (0, 30.2, 28.7, 5.3, 3.1),
    "no size": (1, 11.3, 9.7, 11.3, 9.7),
}
ALL_ROIS = torch.tensor(list(ROIS.values()), dtype=torch.float64)


# ---- sampling="center"


@pytest.mark.parametrize("roi", ROIS.values(), ids=ROIS.keys())
def test_center_is_aligned_roi_align_with_one_sample(roi):
    features, rois = make_features(), torch.tensor([roi], dtype=torch.float64)
    expected = roi_align(features, rois, 7, SCALE, sampling_ratio=1, aligned=True)
    # Both are float64; the positions are added up in different orders.
    torch.testing.assert_close(roi_warp(features, rois, 7, SCALE), expected, rtol=0, atol=1e-12)


def test_boxes_of_all_images_are_warped_at_once_in_their_order():
    features = make_features()
    expected = roi_align(features, ALL_ROIS, 5, SCALE, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(roi_warp(features, ALL_ROIS, 5, SCALE), expected, rtol=0, atol=1e-12)


def test_gradient_to_features_is_that_of_roi_align():
    features = make_features()
    weight = torch.rand(len(ALL_ROIS), 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for warp in (roi_warp, lambda *args: roi_align(*args, sampling_ratio=1, aligned=True)):
        leaf = features.clone().requires_grad_()
        (warp(leaf, ALL_ROIS, 5, SCALE) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("roi", ROIS.values(), ids=ROIS.keys())
def test_gradient_to_the_box_is_the_derivative(roi):
    features, rois = make_features(), torch.tensor([roi], dtype=torch.float64)

    def warp(coordinates):
        return roi_warp(features, torch.cat((rois[:, :1], coordinates), dim=1), 3, SCALE)

    # No sample of these boxes is within 1e-6 of a pixel centre, where the bilinear surface has its kinks.
    assert gradcheck(warp, rois[:, 1:].clone().requires_grad_(), eps=1e-6, atol=1e-6)


def test_box_gradient_is_not_zero_inside():
    rois = ALL_ROIS[:1].clone().requires_grad_()
    roi_warp(make_features(), rois, 3, SCALE).square().sum().backward()
    assert (rois.grad[0, 1:] != 0).all()


# ---- sampling="caffe"


def round_half_away(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def slow_caffe_warp(features, rois, size, scale):
    """Section 3 of the design, one sample at a time."""
    n, channels, height, width = features.shape
    result = torch.zeros(len(rois), channels, size, size, dtype=features.dtype)
    for r, roi in enumerate(rois.tolist()):
        batch = int(roi[0])
        x1, y1, x2, y2 = (round_half_away(v * scale) for v in roi[1:])
        for i in range(size):
            for j in range(size):
                y = y1 + i * max(y2 - y1, 0) / size
                x = x1 + j * max(x2 - x1, 0) / size
                if y < -0.5 or y > height - 1 + 0.5 or x < -0.5 or x > width - 1 + 0.5:
                    continue
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                for yy in (math.floor(y), math.floor(y) + 1):
                    for xx in (math.floor(x), math.floor(x) + 1):
                        weight = max(0, 1 - abs(y - yy)) * max(0, 1 - abs(x - xx))
                        if weight > 0:
                            result[r, :, i, j] += weight * features[batch, :, yy, xx]
    return result


CAFFE_ROIS = {
    **ROIS,
    # x * scale is 0.5, 1.5, 2.5, ... : half away from zero, not half to even.
    "corners at halves": (0, 2.0, 6.0, 34.0, 26.0),
    "corners at negative halves": (1, -2.0, -6.0, 14.0, 30.0),
    "sample exactly 0.5 outside": (0, -4.0, -4.0, 8.0, 8.0),
    "far corner left of the near one": (1, 30.0, 4.0, 10.0, 20.0),
}


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("roi", CAFFE_ROIS.values(), ids=CAFFE_ROIS.keys())
def test_caffe_follows_the_slow_reference(roi, size):
    features, rois = make_features(), torch.tensor([roi], dtype=torch.float64)
    expected = slow_caffe_warp(features, rois, size, SCALE)
    torch.testing.assert_close(roi_warp(features, rois, size, SCALE, "caffe"), expected, rtol=0, atol=1e-12)


def make_plane(slope_x, slope_y):
    """A feature map without kinks: the value at (x, y) is slope_x x + slope_y y."""
    x, y = torch.arange(W, dtype=torch.float64), torch.arange(H, dtype=torch.float64)
    return (slope_x * x[None, :] + slope_y * y[:, None])[None, None]


def test_caffe_passes_the_gradient_straight_through_the_rounding():
    # Corners 1, 1, 9, 7 after rounding: all samples are inside the map.
    rois = torch.tensor([[0, 5.3, 3.1, 34.2, 27.7]], dtype=torch.float64, requires_grad=True)
    size = 4
    result = roi_warp(make_plane(3.0, 5.0), rois, size, SCALE, "caffe")
    for i in range(size):
        for j in range(size):
            (gradient,) = torch.autograd.grad(result[0, 0, i, j], rois, retain_graph=True)
            # x = x1 + j (x2 - x1) / S, as if nothing were rounded; in image pixels, so times the scale.
            u, v = j / size, i / size
            expected = [SCALE * 3 * (1 - u), SCALE * 5 * (1 - v), SCALE * 3 * u, SCALE * 5 * v]
            torch.testing.assert_close(gradient[0, 1:], torch.tensor(expected, dtype=torch.float64))


def test_caffe_box_of_negative_size_has_no_gradient_to_the_far_corner():
    rois = torch.tensor([[0, 30.2, 27.7, 5.3, 3.1]], dtype=torch.float64, requires_grad=True)
    size = 4
    roi_warp(make_plane(3.0, 5.0), rois, size, SCALE, "caffe").sum().backward()
    expected = torch.tensor([SCALE * 3, SCALE * 5, 0, 0], dtype=torch.float64) * size**2
    torch.testing.assert_close(rois.grad[0, 1:], expected)


def test_caffe_gradient_to_features_is_the_derivative():
    features = make_features(n=2, channels=1).requires_grad_()
    rois = torch.tensor(list(CAFFE_ROIS.values()), dtype=torch.float64)
    # Linear in the features, so that finite differences are exact but for rounding.
    assert gradcheck(lambda x: roi_warp(x, rois, 2, SCALE, "caffe"), features, eps=1e-3, atol=1e-9)


def test_unknown_sampling_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match=r"caffe.*center.*'nearest'"):
        roi_warp(make_features(), ALL_ROIS, 2, SCALE, "nearest")


# ---- both


@pytest.fixture(params=["center", "caffe"])
def sampling(request):
    return request.param


def test_no_rois_give_an_empty_result_and_zero_gradient(sampling):
    features = make_features().requires_grad_()
    result = roi_warp(features, torch.zeros(0, 5, dtype=torch.float64), 4, SCALE, sampling)
    assert result.shape == (0, 3, 4, 4)
    result.sum().backward()
    assert features.grad.abs().sum() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_wild_coordinates_read_nothing_but_their_image(sampling, bad, column):
    # Only the first image has ones; the second, and with luck what lies beyond, has not.
    features = torch.stack((torch.ones(3, H, W), torch.full((3, H, W), 1e6)))
    rois = torch.tensor([ROIS["inside"], ROIS["inside"], ROIS["second image"]])
    rois[1, column] = bad
    result = roi_warp(features, rois, 4, SCALE, sampling)
    wild = result[1][result[1].isfinite()]
    # A few roundings of the float32 sum of four weights.
    assert ((wild >= -1e-5) & (wild <= 1 + 1e-5)).all()
    torch.testing.assert_close(result[0], torch.ones(3, 4, 4))
    torch.testing.assert_close(result[2], torch.full((3, 4, 4), 1e6))


def test_wild_coordinates_do_not_break_backward(sampling):
    features = make_features(torch.float32).requires_grad_()
    rois = torch.tensor([[0, math.nan, 1, 5, 9], [1, 1, -math.inf, 9, math.inf]], requires_grad=True)
    roi_warp(features, rois, 4, SCALE, sampling).sum().backward()
    assert features.grad.shape == features.shape and rois.grad.shape == rois.shape


@pytest.mark.parametrize(
    "relayout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat((x, -x), dim=1)[:, :3],
        lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    ],
    ids=["channels_last", "transposed", "slice of channels", "every second column"],
)
def test_memory_layout_of_features_does_not_matter(sampling, relayout):
    features = make_features()
    expected = roi_warp(features, ALL_ROIS, 5, SCALE, sampling)
    assert torch.equal(roi_warp(relayout(features), ALL_ROIS, 5, SCALE, sampling), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_dtype_of_the_features(sampling, dtype):
    assert roi_warp(make_features(dtype), ALL_ROIS.float(), 4, SCALE, sampling).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32_also_far_from_the_origin(sampling, dtype):
    # 1024 pixels from the origin bfloat16 resolves 8 pixels: the coordinates must have stayed in float32.
    features = torch.rand(1, 3, 4, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    rois = torch.tensor([[0, 1001.3, 1.2, 1043.1, 14.9]])
    expected = roi_warp(features.float(), rois, 7, SCALE, sampling)
    result = roi_warp(features, rois, 7, SCALE, sampling)
    # Features in [0, 1]; the four weights are rounded, then the sum.
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_gradients_to_features_and_boxes(sampling, dtype):
    gradients = []
    for features in (make_features(dtype), make_features(dtype).float()):
        features.requires_grad_()
        rois = ALL_ROIS[:3].float().requires_grad_()
        roi_warp(features, rois, 4, SCALE, sampling).sum().backward()
        gradients.append((features.grad.float(), rois.grad))
    for half, full in zip(*gradients):
        # Sums of some tens of terms of order 1, each with a relative error of about eps.
        torch.testing.assert_close(half, full, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_pyramid_takes_each_box_from_its_level(sampling):
    fine, coarse = make_features(), make_features().flip(1)[:, :, :5, :6].contiguous()
    levels = torch.arange(len(ALL_ROIS)) % 2
    result = roi_warp_pyramid([fine, coarse], ALL_ROIS, levels, 5, [SCALE, SCALE / 2], sampling)
    for level, (features, scale) in enumerate([(fine, SCALE), (coarse, SCALE / 2)]):
        expected = roi_warp(features, ALL_ROIS[levels == level], 5, scale, sampling)
        assert torch.equal(result[levels == level], expected)


# ---- module


@pytest.mark.parametrize("max_pool", [False, True])
def test_module_is_the_function_with_optional_max_pooling(sampling, max_pool):
    features = make_features()
    if max_pool:
        expected = F.max_pool2d(roi_warp(features, ALL_ROIS, 8, SCALE, sampling), kernel_size=2)
    else:
        expected = roi_warp(features, ALL_ROIS, 4, SCALE, sampling)
    module = RoIWarp(4, SCALE, sampling, max_pool)
    assert torch.equal(module(features, ALL_ROIS), expected)
