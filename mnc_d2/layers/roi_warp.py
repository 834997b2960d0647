"""RoI warp: crop and resize a box of a feature map, differentiable in the features and in the box (section 3.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def roi_warp(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling: str = "center",
) -> torch.Tensor:
    """Sample an S x S grid of points in each box bilinearly.

    Gradients flow to ``features`` and to the four coordinates of ``rois``, both exact away from the kinks of the
    bilinear interpolation.

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

    Returns:
        (R, C, S, S), dtype of ``features``, in channels_last memory format.
    """
    levels = torch.zeros(len(rois), dtype=torch.long, device=rois.device)
    return roi_warp_pyramid([features], rois, levels, output_size, [spatial_scale], sampling)


def roi_warp_pyramid(
    features: Sequence[torch.Tensor],
    rois: torch.Tensor,
    levels: torch.Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling: str = "center",
) -> torch.Tensor:
    """:func:`roi_warp` where each box samples its own level of a feature pyramid.

    All levels and images are rows of one table, one row per pixel, so that a sample is a weighted sum of four rows
    (an embedding bag): there is no loop over boxes, images or levels, and the gradient of the weights is the gradient
    of the boxes.

    Args:
        features: one (N, C, H_l, W_l) per level l.
        rois: (R, 5), as in :func:`roi_warp`.
        levels: (R,), int64, index into ``features``.
        spatial_scales: feature-map pixels per image pixel, per level.
        output_size, sampling: as in :func:`roi_warp`.

    Returns:
        (R, C, S, S), dtype of ``features``, in channels_last memory format.
    """
    if sampling not in _SAMPLE_POSITIONS:
        raise ValueError(f"sampling must be one of {sorted(_SAMPLE_POSITIONS)}, got {sampling!r}")
    channels, device = features[0].shape[1], rois.device
    table = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels) for x in features])  # (rows, C)

    # Coordinates stay in float32 (or float64) under any autocast and any dtype of the features.
    boxes = rois[:, 1:] if rois.dtype == torch.float64 else rois[:, 1:].float()
    heights = torch.tensor([x.shape[2] for x in features], device=device)[levels]  # (R,)
    widths = torch.tensor([x.shape[3] for x in features], device=device)[levels]
    scales = torch.tensor(spatial_scales, dtype=boxes.dtype, device=device)[levels]
    first_rows = torch.tensor([0] + [x.shape[0] * x.shape[2] * x.shape[3] for x in features], device=device)
    first_row = first_rows.cumsum(0)[levels] + rois[:, 0].detach().long() * heights * widths

    positions, reach = _SAMPLE_POSITIONS[sampling]
    boxes = boxes * scales[:, None]
    y_index, y_weight = _bilinear_taps(positions(boxes[:, 1], boxes[:, 3], output_size), heights[:, None], reach)
    x_index, x_weight = _bilinear_taps(positions(boxes[:, 0], boxes[:, 2], output_size), widths[:, None], reach)

    # Outer products of the two taps along y and the two along x: (R, S, S, 2, 2).
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    index = y_index[:, :, None, :, None] * widths[:, None, None, None, None] + x_index[:, None, :, None, :]
    index = index + first_row[:, None, None, None, None]
    samples = F.embedding_bag(
        index.flatten(3).flatten(0, 2), table, per_sample_weights=weight.flatten(3).flatten(0, 2).to(table), mode="sum"
    )
    return samples.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)


def _center_positions(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Centres of the bins that divide [start, end): (R, size), in feature pixels, 0 at the first pixel's centre."""
    steps = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    return start[:, None] + steps * ((end - start) / size)[:, None] - 0.5


def _caffe_positions(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Left edges of the bins that divide [round(start), round(end)): (R, size), in feature pixels."""
    start, end = _round_straight_through(start), _round_straight_through(end)
    steps = torch.arange(size, dtype=start.dtype, device=start.device)
    return start[:, None] + steps * ((end - start).clamp(min=0) / size)[:, None]


# Sample positions and how far outside the map a sample may lie before it is 0, by the name of the convention.
_SAMPLE_POSITIONS = {"center": (_center_positions, 1.0), "caffe": (_caffe_positions, 0.5)}


def _round_straight_through(x: torch.Tensor) -> torch.Tensor:
    """Round half away from zero, with the gradient of the identity."""
    rounded = torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)).detach()
    return rounded + (x - x.detach())


def _bilinear_taps(position: torch.Tensor, size: torch.Tensor, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions along one axis into their two neighbouring pixels and the weights of these.

    Args:
        position: (R, S), in pixels.
        size: (R, 1), number of pixels along the axis.
        reach: positions further outside [0, size - 1] than this get weight 0.

    Returns:
        indices (R, S, 2), int64, always valid; weights (R, S, 2), NaN where the position is.
    """
    last = (size - 1).to(position)
    outside = (position < -reach) | (position > last + reach)
    clamped = torch.minimum(position.clamp(min=0), last)
    # The clamp after nan_to_num keeps NaN and infinite coordinates from reading out of bounds.
    low = torch.minimum(clamped.detach().nan_to_num().floor().clamp(min=0), last)
    high = torch.minimum(low + 1, last)
    fraction = clamped - low
    weight = torch.stack((1 - fraction, fraction), dim=-1).masked_fill(outside[..., None], 0.0)
    return torch.stack((low, high), dim=-1).long(), weight


class RoIWarp(nn.Module):
    """:func:`roi_warp`, optionally sampled twice as densely and reduced by 2 x 2 max pooling as in the paper.

    Args:
        output_size: side S of the result.
        spatial_scale, sampling: as in :func:`roi_warp`.
        max_pool: whether to warp to 2S x 2S and take the maximum of each 2 x 2 samples.
    """

    def __init__(
        self, output_size: int, spatial_scale: float = 1.0, sampling: str = "center", max_pool: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling = sampling
        self.max_pool = max_pool

    def forward(self, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """Return (R, C, S, S) for features (N, C, H, W) and rois (R, 5)."""
        if not self.max_pool:
            return roi_warp(features, rois, self.output_size, self.spatial_scale, self.sampling)
        samples = roi_warp(features, rois, 2 * self.output_size, self.spatial_scale, self.sampling)
        return F.max_pool2d(samples, kernel_size=2)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling={self.sampling!r}, max_pool={self.max_pool}"
        )
