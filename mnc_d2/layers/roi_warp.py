"""RoI warp: crop and resize a box of a feature map, differentiable in the features and in the box (section 3.2)."""

from collections.abc import Sequence

import torch

from .bag_max import bag_max, pass_gradient_to_weight
from .device import to_device


def roi_warp(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling: str = "center",
    max_pool: bool = False,
) -> torch.Tensor:
    """Sample an S x S grid of points in each box bilinearly.

    Gradients flow to ``features`` and to the four coordinates of ``rois``, both exact away from the kinks of the
    bilinear interpolation (and, with ``max_pool``, of the maximum). There is no second derivative.

    Args:
        features: (N, C, H, W), floating point.
        rois: (R, 5), each (batch index, x1, y1, x2, y2) in image pixels, where (0, 0) is the top-left corner of the
            top-left pixel.
        output_size: S.
        spatial_scale: feature-map pixels per image pixel, 1 / stride.
        sampling: "center" samples the centre of each of the S x S bins, in Detectron2's pixel convention. A sample
            more than 1 outside the map is 0, others are clamped to the border; the result is that of
            ``torchvision.ops.roi_align(..., sampling_ratio=1, aligned=True)``. "caffe" reproduces the authors'
            released layer: corners rounded to feature pixels (half away from zero; the rounding passes the gradient
            straight through), samples at the start of each bin, and 0 for samples more than 0.5 outside the map.
        max_pool: sample 2S x 2S points and keep the largest of each 2 x 2, as the paper does; in less time and memory
            than :func:`torch.nn.functional.max_pool2d` of the samples, with the same result.

    Returns:
        (R, C, S, S), dtype of ``features``, in channels_last memory format. NaN for a box with a NaN coordinate or
        without an image; under ``torch.autograd.set_detect_anomaly(True)`` such a box is an error instead.

    Raises:
        ValueError: a shape, dtype or ``sampling`` that is none of the above; in anomaly mode, a RoI that is not finite
            or whose batch index is not in [0, N).
    """
    levels = torch.zeros(rois.shape[0], dtype=torch.long, device=rois.device)
    return roi_warp_pyramid([features], rois, levels, output_size, [spatial_scale], sampling, max_pool)


def roi_warp_pyramid(
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
    levels: torch.Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling: str = "center",
    max_pool: bool = False,
) -> torch.Tensor:
    """:func:`roi_warp` where each box samples its own level of a feature pyramid.

    Args:
        features: one (N, C, H_l, W_l) per level l.
        rois: (R, 5), as in :func:`roi_warp`.
        levels: (R,), int64, index into ``features``.
        output_size: S.
        spatial_scales: feature-map pixels per image pixel, per level.
        sampling, max_pool: as in :func:`roi_warp`.

    Returns, Raises:
        as :func:`roi_warp`.
    """
    index, weight = _bags(features, rois, levels, output_size, spatial_scales, sampling, max_pool)
    return _as_images(bag_max(features, index, weight), output_size)


def roi_warp_pyramid_twice(
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
    levels: torch.Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling: str = "center",
    max_pool: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of :func:`roi_warp_pyramid` without and with a gradient to the boxes, sampled once."""
    index, weight = _bags(features, rois, levels, output_size, spatial_scales, sampling, max_pool)
    detached = bag_max(features, index, weight.detach())
    attached = pass_gradient_to_weight(detached, features, index, weight) if weight.requires_grad else detached
    return _as_images(detached, output_size), _as_images(attached, output_size)


def _as_images(samples: torch.Tensor, size: int) -> torch.Tensor:
    """(R, S * S, C) as (R, C, S, S), in channels_last memory format."""
    return samples.unflatten(1, (size, size)).permute(0, 3, 1, 2)


def _bags(
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
    levels: torch.Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling: str,
    max_pool: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``index`` and ``weight`` with which :func:`bag_max` is the RoI warp of a pyramid.

    A sample is the sum of four pixels' feature vectors, each times a product of a weight along y and one along x. The
    weights and the positions of the pixels, a few numbers a sample, are computed here under autograd, hence the
    gradient of the boxes. The sums and maxima over channels are :func:`mnc_d2.layers.bag_max.bag_max`.

    Why so: embedding bags go along the channels, which on a CPU takes a small part of ROIAlign's time for the same
    samples, and with the maximum taken chunk by chunk of the boxes no sample reaches the main memory. Measured and
    slower: one ``grid_sample`` of all boxes, products with sparse matrices, one bag of all samples or one of all boxes
    for each sample of a bin. ``tests/benchmarks`` compares with ROIAlign.

    Args, Raises:
        as :func:`roi_warp_pyramid`.
    """
    _check_arguments(features, rois, output_size, spatial_scales, sampling)
    images, device = features[0].shape[0], rois.device

    # Coordinates stay in float32 (or float64) under any autocast and any dtype of the features.
    boxes = rois[:, 1:] if rois.dtype == torch.float64 else rois[:, 1:].float()
    batch = rois[:, 0].detach()
    has_image = (batch >= 0) & (batch < images)
    boxes = boxes.masked_fill(~has_image[:, None], torch.nan)
    batch = torch.where(has_image, batch, 0).long()

    sizes = to_device([[x.shape[3], x.shape[2]] for x in features], device)[levels]  # (R, 2), width and height
    scales = to_device(spatial_scales, device, boxes.dtype)[levels]
    first_rows = to_device([0] + [images * x.shape[2] * x.shape[3] for x in features], device).cumsum(0)
    widths, heights = sizes.unbind(dim=1)
    first_row = first_rows[levels] + batch * heights * widths

    positions, reach = _SAMPLE_POSITIONS[sampling]
    pool = 2 if max_pool else 1
    start, end = (boxes * scales[:, None]).split(2, dim=1)
    # Along x and along y at once: on a GPU each operator takes its time to start.
    indices, weights = _bilinear_taps(positions(start, end, output_size * pool), sizes, reach)
    x_index, y_index = indices.unbind(dim=1)
    x_weight, y_weight = weights.unbind(dim=1)
    y_index = y_index * widths[:, None, None] + first_row[:, None, None]

    # Outer products of the taps along y and along x, (R, S, S, ...), of what is by sample of the bin and tap.
    by_sample_and_tap = (-1, output_size, pool, pool, 2, 2)

    def along_y(y):
        return y.view(-1, output_size, pool, 1, 2, 1).expand(by_sample_and_tap).flatten(2)[:, :, None]

    def along_x(x):
        return x.view(-1, output_size, 1, pool, 1, 2).expand(by_sample_and_tap).flatten(2)[:, None]

    bags = (-1, output_size**2, pool**2, 4)
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    index = along_y(y_index) + along_x(x_index)
    weight = along_y(y_weight) * along_x(x_weight)
    return index.view(bags), weight.view(bags).to(dtype)


def _check_arguments(
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling: str,
) -> None:
    """Raise a ValueError that says what is wrong with the arguments of :func:`roi_warp_pyramid`."""
    if sampling not in _SAMPLE_POSITIONS:
        raise ValueError(f"sampling must be one of {sorted(_SAMPLE_POSITIONS)}, got {sampling!r}")
    if output_size < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5): batch index, x1, y1, x2, y2; got {tuple(rois.shape)}")
    if len(features) == 0 or len(features) != len(spatial_scales):
        raise ValueError(f"{len(features)} feature maps with {len(spatial_scales)} spatial scales; give one each")
    for x in features:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"features must be (N, C, H, W), floating point; got {tuple(x.shape)}, {x.dtype}")
        if x.shape[:2] != features[0].shape[:2] or x.dtype != features[0].dtype:
            raise ValueError(
                "feature maps must agree in N, C and dtype; got "
                + " and ".join(f"{tuple(y.shape)}, {y.dtype}" for y in (features[0], x))
            )
        if min(x.shape[0], x.shape[2], x.shape[3]) == 0 and rois.shape[0] > 0:
            raise ValueError(f"{rois.shape[0]} RoIs, but nothing to sample in features of shape {tuple(x.shape)}")
    # Reading values back from the device costs time that only somebody who searches for an error wants to spend.
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        images = features[0].shape[0]
        bad = ~(rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < images))
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"{int(bad.sum())} of {len(rois)} RoIs are not finite or have a batch index outside [0, {images}); "
                f"the first is RoI {first}: {rois[first].tolist()}"
            )


def _center_positions(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Centres of the bins that divide [start, end): (R, 2, size), in feature pixels, 0 at the first pixel's centre."""
    steps = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    return start[..., None] + steps * ((end - start) / size)[..., None] - 0.5


def _caffe_positions(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Left edges of the bins that divide [round(start), round(end)): (R, 2, size), in feature pixels."""
    start, end = _round_straight_through(start), _round_straight_through(end)
    steps = torch.arange(size, dtype=start.dtype, device=start.device)
    return start[..., None] + steps * ((end - start).clamp(min=0) / size)[..., None]


# Sample positions and how far outside the map a sample may lie before it is 0, by the name of the convention.
_SAMPLE_POSITIONS = {"center": (_center_positions, 1.0), "caffe": (_caffe_positions, 0.5)}


def _round_straight_through(x: torch.Tensor) -> torch.Tensor:
    """Round half away from zero, with the gradient of the identity."""
    magnitude = x.detach().abs()
    whole = magnitude.floor()
    # Not floor(magnitude + 0.5): that sum rounds up for the largest number below 0.5.
    whole = torch.where(magnitude - whole >= 0.5, whole + 1, whole)
    return torch.copysign(whole, x.detach()) + (x - x.detach())


def _bilinear_taps(position: torch.Tensor, size: torch.Tensor, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions along x and along y into their two neighbouring pixels and the weights of these.

    Args:
        position: (R, 2, S), in pixels.
        size: (R, 2), number of pixels along each axis.
        reach: positions further outside [0, size - 1] than this get weight 0.

    Returns:
        indices (R, 2, S, 2), int64, always valid; weights (R, 2, S, 2), NaN where the position is.
    """
    last = (size - 1).to(position)[..., None]
    outside = (position < -reach) | (position > last + reach)
    clamped = torch.minimum(position.clamp(min=0), last)
    # The clamp after nan_to_num keeps NaN and infinite coordinates from reading out of bounds.
    low = torch.minimum(clamped.detach().nan_to_num().floor().clamp(min=0), last)
    high = torch.minimum(low + 1, last)
    fraction = clamped - low
    weight = torch.stack((1 - fraction, fraction), dim=-1).masked_fill(outside[..., None], 0.0)
    return torch.stack((low, high), dim=-1).long(), weight
