"""RoI warp pooler: Detectron2's ROIPooler with one sample a bin, and gradients to the boxes."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from mnc_d2.modeling import RoIWarpPooler
from mnc_d2.modeling.roi_heads.labels import boxes_to_rois

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
IMAGE = 512


def make_maps(scales, n=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, int(IMAGE * s), int(IMAGE * s), generator=generator) for s in scales]


def make_boxes(count, seed):
    """Boxes of 8 to 800 pixels, for all levels, some over the border."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=generator) * IMAGE
    size = 8 * (800 / 8) ** torch.rand(count, 1, generator=generator) * torch.tensor([1.0, 0.8])
    return Boxes(torch.cat((centre - size / 2, centre + size / 2), dim=1))


@pytest.mark.parametrize("scales", [SCALES, SCALES[1:3], SCALES[:1], [1.0, 0.5]], ids=["4", "2", "1", "from stride 1"])
@pytest.mark.parametrize("counts", [(20, 30), (20, 0), (0, 20)], ids=str)
def test_equals_roi_pooler_with_one_sample(scales, counts):
    maps, boxes = make_maps(scales), [make_boxes(count, seed) for seed, count in enumerate(counts)]
    expected = ROIPooler(7, scales, sampling_ratio=1, pooler_type="ROIAlignV2")(maps, boxes)
    # float32 positions up to 512 are resolved to 3e-5 pixels; the features' slope is at most 1 a pixel.
    torch.testing.assert_close(
        RoIWarpPooler(7, scales, sampling_ratio=1)(maps, boxes_to_rois(boxes)), expected, rtol=0, atol=2e-4
    )


def test_boxes_of_this_file_use_every_level():
    maps, boxes = make_maps(SCALES), [make_boxes(20, 0), make_boxes(30, 1)]
    for level in maps:
        level.requires_grad_()
    RoIWarpPooler(7, SCALES, sampling_ratio=1)(maps, boxes_to_rois(boxes)).sum().backward()
    assert all(level.grad.abs().sum() > 0 for level in maps)


def test_sampling_ratio_2_is_the_maximum_of_2_x_2_samples():
    maps, boxes = make_maps(SCALES), [make_boxes(20, 0), make_boxes(30, 1)]
    samples = ROIPooler(14, SCALES, sampling_ratio=1, pooler_type="ROIAlignV2")(maps, boxes)
    pooled = RoIWarpPooler(7, SCALES, sampling_ratio=2)(maps, boxes_to_rois(boxes))
    torch.testing.assert_close(pooled, F.max_pool2d(samples, 2), rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampling_ratio", [1, 2])
def test_gradient_reaches_every_box(sampling_ratio):
    tensors = [
        torch.tensor([[8.3, 9.1, 30.7, 41.9], [5.1, 20.3, 300.7, 250.1]]),
        torch.tensor([[60.2, 1.7, 99.9, 80.3]]),
    ]
    for tensor in tensors:
        tensor.requires_grad_()
    pooled = RoIWarpPooler(7, SCALES, sampling_ratio)(make_maps(SCALES), boxes_to_rois([Boxes(x) for x in tensors]))
    pooled.square().sum().backward()
    assert all((tensor.grad != 0).all() for tensor in tensors)


def test_caffe_sampling_is_handed_on():
    maps, boxes = make_maps(SCALES[:1]), [make_boxes(5, 0), make_boxes(5, 1)]
    # Corners on whole feature pixels: the first sample is the feature pixel at the corner.
    boxes = [Boxes((x.tensor.clamp(0, IMAGE - 4) / 4).round() * 4) for x in boxes]
    pooled = RoIWarpPooler(4, SCALES[:1], sampling_ratio=1, sampling="caffe")(maps, boxes_to_rois(boxes))
    corners = torch.cat([x.tensor for x in boxes])[:, :2].div(4).long()
    batch = torch.arange(2).repeat_interleave(5)
    torch.testing.assert_close(pooled[:, :, 0, 0], maps[0][batch, :, corners[:, 1], corners[:, 0]])


def test_no_boxes_at_all():
    pooled = RoIWarpPooler(7, SCALES)(make_maps(SCALES), boxes_to_rois([make_boxes(0, 0), make_boxes(0, 1)]))
    assert pooled.shape == (0, 3, 7, 7)


@pytest.mark.parametrize("scales", [[1 / 4, 1 / 16], [1 / 8, 1 / 4], [1 / 3], [1 / 6, 1 / 12]], ids=str)
def test_scales_that_are_no_pyramid_are_an_error(scales):
    with pytest.raises(ValueError, match="halving powers of 2"):
        RoIWarpPooler(7, scales)


@pytest.mark.parametrize("sampling_ratio", [0, 3])
def test_other_sampling_ratios_are_an_error_that_names_the_key(sampling_ratio):
    with pytest.raises(ValueError, match=f"POOLER_SAMPLING_RATIO must be 1 or 2, got {sampling_ratio}"):
        RoIWarpPooler(7, SCALES, sampling_ratio)


@pytest.mark.parametrize("sampling_ratio", [1, 2])
def test_pooling_without_and_with_box_gradient_is_that_of_two_poolings(sampling_ratio):
    pooler = RoIWarpPooler(7, SCALES, sampling_ratio)
    maps, boxes = [x.requires_grad_() for x in make_maps(SCALES)], make_boxes(30, 0).tensor.requires_grad_()
    both = boxes_to_rois([Boxes(boxes), Boxes(boxes + 3)])
    expected = pooler(maps, both.detach()), pooler(maps, both)
    found = pooler.without_and_with_box_gradient(maps, both)
    # Different uses of the two: gradients that are mixed up do not agree.
    weights = torch.rand(2, *found[0].shape, generator=torch.Generator().manual_seed(0))
    for pooled, separate in zip(found, expected):
        assert torch.equal(pooled, separate)
    gradients = [
        torch.autograd.grad((weights[0] * x + weights[1] * y).sum(), [*maps, boxes]) for x, y in (found, expected)
    ]
    # Sums of up to some hundred float32 terms, in another order.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
