"""Which RoIs of the first pass are trained on."""

from collections.abc import Sequence

import torch


@torch.no_grad()
def sample_rois(
    classes: torch.Tensor,
    ious: torch.Tensor,
    num_classes: int,
    batch_size: int,
    positive_fraction: float,
    bands: Sequence[tuple[float, float]],
    band_fractions: Sequence[float],
) -> torch.Tensor:
    """Draw RoIs of one image at random: some foreground, the rest background from bands of IoU.

    Where a band has fewer RoIs than its share, the others make up for it, as far as they can.

    Args:
        classes: (R,), int64, labels in [0, num_classes], the last for background; -1 is never drawn.
        ious: (R,), largest IoU of each RoI with a ground-truth box.
        num_classes: number of foreground classes.
        batch_size: number of RoIs to draw; fewer are returned only if the image has fewer to draw from.
        positive_fraction: largest part of ``batch_size`` that is foreground.
        bands: (low, high) of each band; a background RoI with low <= IoU < high belongs to it.
        band_fractions: share of the background that each band gets.

    Returns:
        indices of the drawn RoIs, int64, foreground first.
    """
    foreground = _shuffle((classes >= 0) & (classes < num_classes))[: int(batch_size * positive_fraction)]
    wanted = batch_size - len(foreground)
    candidates = [_shuffle((classes == num_classes) & (ious >= low) & (ious < high)) for low, high in bands]
    shares = [round(wanted * fraction) for fraction in band_fractions]
    drawn = [band[:share] for band, share in zip(candidates, shares)]
    spare = [band[share:] for band, share in zip(candidates, shares)]
    background = torch.cat(drawn + spare)[:wanted]
    return torch.cat((foreground, background))


def _shuffle(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices where ``mask`` (R,) is true, in random order."""
    indices = mask.nonzero().squeeze(1)
    return indices[torch.randperm(len(indices), device=mask.device)]
