"""RoI warp: values, derivatives to features and boxes, and what it does with degenerate input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torchvision.ops import roi_align

from mnc_d2.layers import roi_warp, roi_warp_pyramid
from mnc_d2.layers.roi_warp import _round_straight_through

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


def test_center_is_aligned_roi_align_for_any_box():
    features = make_features()
    generator = torch.Generator().manual_seed(3)
    # Corners up to an image's size outside of it, in any order.
    corners = (3 * torch.rand(400, 4, generator=generator, dtype=torch.float64) - 1) * torch.tensor([48, 36, 48, 36])
    rois = torch.cat((torch.arange(400)[:, None] % 2, corners), dim=1)
    expected = roi_align(features, rois, 6, SCALE, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(roi_warp(features, rois, 6, SCALE), expected, rtol=0, atol=1e-12)


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


# All samples of a box of no size are equal: their maximum has no derivative.
SMOOTH_ROIS = [
    pytest.param(roi, max_pool, id=f"{name}, {'max' if max_pool else 'plain'}")
    for name, roi in ROIS.items()
    for max_pool in (False, True)
    if not (max_pool and name == "no size")
]


# No sample of these boxes is within 1e-6 of a pixel centre, where the bilinear surface has its kinks, and no two
# samples of a bin are within 1e-6 of each other, where their maximum has one.


@pytest.mark.parametrize("roi, max_pool", SMOOTH_ROIS)
def test_gradient_to_a_box_is_the_derivative(roi, max_pool):
    batch, box = torch.tensor([roi], dtype=torch.float64).split((1, 4), dim=1)

    def warp(box):
        return roi_warp(make_features(), torch.cat((batch, box), dim=1), 4, SCALE, max_pool=max_pool)

    assert gradcheck(warp, box.requires_grad_(), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_pool", [False, True], ids=["plain", "max"])
def test_gradient_to_the_features_is_the_derivative(max_pool):
    rois = torch.tensor([roi for name, roi in ROIS.items() if name != "no size"], dtype=torch.float64)
    features = make_features(channels=1).requires_grad_()
    assert gradcheck(lambda x: roi_warp(x, rois, 4, SCALE, max_pool=max_pool), features, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_pool", [False, True])
def test_gradient_of_a_loss_is_its_central_difference(max_pool):
    """As gradcheck, but of one scalar of boxes on two levels at once, and written down here."""
    rois = torch.tensor([roi for name, roi in ROIS.items() if name != "no size"], dtype=torch.float64)
    maps, scales = [make_features(), make_features()[:, :, :5, :6].flip(3).contiguous()], [SCALE, SCALE / 2]
    levels = torch.arange(len(rois)) % 2
    factors = torch.randn(len(rois), 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(fine, coarse, rois):
        warped = roi_warp_pyramid([fine, coarse], rois, levels, 4, scales, max_pool=max_pool)
        return (factors * (3 * warped).sin()).sum()

    inputs = [*maps, rois]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss(*leaves).backward()
    step = 1e-6
    for x, leaf in zip(inputs, leaves):
        # Of the RoIs all but the batch index, of the maps every seventh pixel.
        entries = [i for i in range(x.numel()) if (i % 5 != 0 if x is inputs[2] else i % 7 == 0)]
        for i in entries:
            value = x.view(-1)[i].item()
            x.view(-1)[i] = value + step
            above = loss(*inputs)
            x.view(-1)[i] = value - step
            below = loss(*inputs)
            x.view(-1)[i] = value
            # The loss is of order 10 and rounded to 1e-15: differences are good to 1e-8.
            assert abs((above - below) / (2 * step) - leaf.grad.view(-1)[i]) < 1e-7


def test_box_gradient_is_not_zero_inside():
    rois = ALL_ROIS[:1].clone().requires_grad_()
    roi_warp(make_features(), rois, 3, SCALE).square().sum().backward()
    assert (rois.grad[0, 1:] != 0).all()


# ---- sampling="caffe"


def round_half_away(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def slow_caffe_warp(features, rois, size, scale):
    """The released layer, one sample at a time."""
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


@pytest.mark.parametrize("half", [0.5, 1.5, 2.5, 1048576.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_half_away_from_zero_to_the_last_bit(half, sign):
    half = torch.tensor(half, dtype=torch.float32)
    below, above = torch.nextafter(half, -half), torch.nextafter(half, 2 * half)
    values = torch.stack((below, half, above)) * sign
    expected = torch.tensor([half - 0.5, half + 0.5, half + 0.5]) * sign
    assert torch.equal(_round_straight_through(values), expected)


GOLDEN = np.load(Path(__file__).with_name("golden_roi_warp.npz"))


def test_caffe_is_what_the_released_network_computes():
    """The first pass samples 28 x 28 and takes the maximum of 2 x 2; the second samples 14 x 14.

    The RoIs and their warped features are those of an independent re-creation of the authors' released network. The
    features that they are taken from, the first 32 channels of conv5_3, are those of our own forward pass of the same
    weights and image, which agrees with what is recorded of theirs.
    """
    features = torch.from_numpy(GOLDEN["features"])[None]
    for suffix, max_pool in (("", True), ("_second_pass", False)):
        rois = torch.from_numpy(GOLDEN["rois" + suffix])
        result = roi_warp(features, rois, 14, 1 / 16, "caffe", max_pool)
        # Values up to 5; 2e-5 is the noise of the convolutions.
        torch.testing.assert_close(result, torch.from_numpy(GOLDEN["warp" + suffix]), rtol=0, atol=1e-4)


def test_golden_data_are_those_of_the_released_network():
    path = Path(__file__).parents[3] / "shared" / "golden" / "forward_2008_000533.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    original = np.load(path)
    for suffix, theirs in (("", ""), ("_second_pass", "_ext")):
        assert np.array_equal(GOLDEN["rois" + suffix], original["rois" + theirs][original["sub_rois"]])
        assert np.array_equal(GOLDEN["warp" + suffix], original["warp_sub" + theirs])
    features = GOLDEN["features"]
    np.testing.assert_allclose(features[:16, 10:18, 10:18], original["conv5_3_slice"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features.mean(axis=(1, 2)), original["conv5_3_channel_mean"][:32], rtol=0, atol=1e-5)


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
    # Features in [0, 1]: only the result is rounded.
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_gradients_to_features_and_boxes(sampling, dtype):
    gradients = []
    for features in (make_features(dtype), make_features(dtype).float()):
        features.requires_grad_()
        rois = ALL_ROIS[:3].float().requires_grad_()
        roi_warp(features, rois, 4, SCALE, sampling).sum().backward()
        gradients.append((features.grad.float(), rois.grad))
    (half_features, half_rois), (full_features, full_rois) = gradients
    torch.testing.assert_close(half_features, full_features, rtol=torch.finfo(dtype).eps, atol=0)
    # The gradient that arrives, 1, is exact in any dtype, and float32 from there on.
    assert torch.equal(half_rois, full_rois)


@pytest.mark.parametrize("batch", [-1, 2, math.nan, math.inf])
def test_box_without_an_image_is_nan(sampling, batch):
    rois = torch.tensor([ROIS["inside"], ROIS["inside"]], dtype=torch.float64)
    expected = roi_warp(make_features(), rois[:1], 4, SCALE, sampling)
    rois[1, 0] = batch
    result = roi_warp(make_features(), rois, 4, SCALE, sampling)
    assert torch.equal(result[:1], expected) and result[1].isnan().all()


@pytest.mark.parametrize("column, value", [(0, 2), (0, -1), (1, math.nan), (3, math.inf), (4, -math.inf)])
def test_anomaly_mode_names_a_box_that_cannot_be(sampling, column, value):
    rois = ALL_ROIS[:3].clone()
    rois[1, column] = value
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="1 of 3 RoIs are not finite.*RoI 1:"):
        roi_warp(make_features(), rois, 4, SCALE, sampling)
    with torch.autograd.set_detect_anomaly(True):
        roi_warp(make_features(), ALL_ROIS, 4, SCALE, sampling)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
        ({"rois": torch.zeros(3, 4)}, r"rois must be \(R, 5\).*got \(3, 4\)"),
        ({"features": torch.zeros(3, 9, 12)}, r"features must be \(N, C, H, W\).*got \(3, 9, 12\)"),
        ({"features": torch.zeros(1, 3, 9, 12, dtype=torch.long)}, "floating point.*int64"),
        ({"features": torch.zeros(0, 3, 9, 12)}, r"nothing to sample in features of shape \(0, 3, 9, 12\)"),
        ({"features": torch.zeros(1, 3, 9, 0)}, r"nothing to sample in features of shape \(1, 3, 9, 0\)"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_bad_arguments_are_errors_that_name_them(change, message):
    arguments = {"features": make_features(), "rois": ALL_ROIS, "output_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        roi_warp(**arguments)


def test_maps_of_a_pyramid_must_agree():
    levels = torch.zeros(len(ALL_ROIS), dtype=torch.long)
    with pytest.raises(ValueError, match="2 feature maps with 1 spatial scales"):
        roi_warp_pyramid([make_features()] * 2, ALL_ROIS, levels, 4, [SCALE])
    with pytest.raises(ValueError, match="agree in N, C and dtype.*float32"):
        roi_warp_pyramid([make_features(), make_features().float()], ALL_ROIS, levels, 4, [SCALE] * 2)


@pytest.mark.parametrize("output_size", [1, 3, 7])
def test_max_pool_is_that_of_the_samples_and_so_are_its_gradients(sampling, output_size):
    # Outside the map, samples are equal: the gradient must still go to one of them, the same as in PyTorch.
    results = []
    for fused in (False, True):
        features, rois = make_features().requires_grad_(), ALL_ROIS.clone().requires_grad_()
        if fused:
            result = roi_warp(features, rois, output_size, SCALE, sampling, max_pool=True)
        else:
            result = F.max_pool2d(roi_warp(features, rois, 2 * output_size, SCALE, sampling), kernel_size=2)
        factor = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((result, *torch.autograd.grad(result, (features, rois), factor)))
    (expected, *expected_gradients), (result, *gradients) = results
    assert torch.equal(result, expected)
    for gradient, expected in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_pyramid_takes_each_box_from_its_level(sampling):
    fine, coarse = make_features(), make_features().flip(1)[:, :, :5, :6].contiguous()
    levels = torch.arange(len(ALL_ROIS)) % 2
    result = roi_warp_pyramid([fine, coarse], ALL_ROIS, levels, 5, [SCALE, SCALE / 2], sampling)
    for level, (features, scale) in enumerate([(fine, SCALE), (coarse, SCALE / 2)]):
        expected = roi_warp(features, ALL_ROIS[levels == level], 5, scale, sampling)
        assert torch.equal(result[levels == level], expected)
