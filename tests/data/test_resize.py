"""Resizing by an exact factor, against samples computed one by one."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from mnc_d2.data import MNCDatasetMapper, ResizeByExactScale, build_test_resize, exact_scale, scaled_size
from mnc_d2.data.resize import ExactScaleTransform
from mnc_d2.model_zoo import get_config


def make_image(height=7, width=11):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow_resize(image, scale):
    """Bilinear samples between pixel centres, a step of 1 / scale apart, the border repeated."""
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    result = np.zeros((height, width, 3))

    def neighbours(i, size):
        position = min(max((i + 0.5) / scale - 0.5, 0), size - 1)
        low = math.floor(position)
        return low, min(low + 1, size - 1), position - low

    for y in range(height):
        top, bottom, v = neighbours(y, image.shape[0])
        for x in range(width):
            left, right, u = neighbours(x, image.shape[1])
            upper = (1 - u) * image[top, left] + u * image[top, right]
            lower = (1 - u) * image[bottom, left] + u * image[bottom, right]
            result[y, x] = (1 - v) * upper + v * lower
    return result


@pytest.mark.parametrize("scale", [1.68, 2.31, 1.0, 0.61])
def test_samples_are_a_step_of_the_exact_factor_apart(scale):
    image = make_image()
    resized = ExactScaleTransform(scale).apply_image(image)
    assert resized.dtype == np.float32
    # Weights in float32, of grey levels up to 255.
    np.testing.assert_allclose(resized, slow_resize(image, scale), rtol=0, atol=1e-3)


def test_the_factor_of_the_rounded_size_would_differ():
    """7 x 1.31 is 9.17, so the size says 9 / 7."""
    image, scale = make_image(), 1.31
    by_size = T.ResizeTransform(7, 11, *scaled_size((7, 11), scale)).apply_image(image.astype(np.float32))
    assert np.abs(ExactScaleTransform(scale).apply_image(image) - by_size).max() > 1


def test_the_mean_may_be_subtracted_before_or_after():
    image, mean = make_image(), np.array([102.9801, 115.9465, 122.7717])
    before = slow_resize(image - mean, 1.68)
    after = ExactScaleTransform(1.68).apply_image(image) - mean
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((357, 500), 600 / 357),
        ((500, 357), 600 / 357),
        ((203, 500), 1000 / 500),  # the long side limits
        ((600, 1000), 1.0),
        ((1200, 2000), 0.5),
        ((300, 500), 2.0),
        ((6000, 10004), 0.1),  # 1000.4 is 1000 whole pixels
        ((6000, 10006), 1000 / 10006),  # 1000.6 is 1001
    ],
)
def test_scale(size, expected):
    scale = exact_scale(size, 600, 1000)
    assert scale == expected
    height, width = scaled_size(size, scale)
    assert max(height, width) <= 1000 and min(height, width) <= 600


@pytest.mark.parametrize("size, scale", [((5, 7), 0.5), ((7, 9), 1.5), ((3, 5), 2.5), ((10, 11), 0.333)])
def test_size_is_that_of_the_resized_image(size, scale):
    resized = ExactScaleTransform(scale).apply_image(make_image(*size))
    assert resized.shape == (*scaled_size(size, scale), 3)


def test_points_and_labels_move_with_the_image():
    transform = ExactScaleTransform(2.5)
    assert transform.apply_coords(np.array([[2.0, 4.0]])).tolist() == [[5.0, 10.0]]
    labels = np.array([[0, 3], [7, 9]], dtype=np.uint8)
    resized = transform.apply_segmentation(labels)
    assert resized.dtype == np.uint8 and resized.shape == (5, 5) and set(np.unique(resized)) == {0, 3, 7, 9}


@pytest.mark.parametrize("exact", [True, False])
def test_the_key_chooses_the_resizing(exact, tmp_path):
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.INPUT.EXACT_SCALE_TEST = exact
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 10, 16
    image = make_image()
    path = tmp_path / "image.png"
    Image.fromarray(image[:, :, ::-1]).save(path)
    cfg.INPUT.FORMAT = "BGR"
    expected = build_test_resize(cfg).get_transform(image).apply_image(image)
    given = MNCDatasetMapper(cfg, is_train=False)({"file_name": str(path), "height": 7, "width": 11})["image"]
    assert torch.equal(given, torch.from_numpy(expected.transpose(2, 0, 1).copy()))
    assert given.dtype == (torch.float32 if exact else torch.uint8)
    if exact:
        np.testing.assert_allclose(expected, slow_resize(image, 10 / 7), rtol=0, atol=1e-3)


def test_training_is_resized_as_ever():
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.INPUT.EXACT_SCALE_TEST = True
    augmentations = MNCDatasetMapper(cfg, is_train=True).augmentations.augs
    assert not any(isinstance(x, ResizeByExactScale) for x in augmentations)


@pytest.mark.parametrize("size, resized", [((1, 30), (1, 9)), ((50, 2), (9, 1)), ((1, 1), (6, 6))])
@pytest.mark.parametrize("exact", [True, False])
def test_one_pixel_of_the_short_side_is_left(exact, size, resized):
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.INPUT.EXACT_SCALE_TEST = exact
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 6, 9
    image = make_image(*size)
    found = build_test_resize(cfg).get_transform(image).apply_image(image)
    assert found.shape == (*resized, 3)
    if exact:
        assert scaled_size(size, exact_scale(size, 6, 9)) == resized
        higher = np.pad(image, [(0, 3), (0, 3), (0, 0)], mode="edge")
        expected = slow_resize(higher, exact_scale(size, 6, 9))[: resized[0], : resized[1]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
