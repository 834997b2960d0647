"""Which RoIs of the first pass are trained on."""

import pytest
import torch

from mnc_d2.modeling.roi_heads.labels import sample_rois

NUM_CLASSES = 3
BANDS = [(0.1, 0.5, 0.85), (0.0, 0.1, 0.15)]


def sample(num_fg, num_near, num_far, num_ignored=0, batch_size=64, positive_fraction=0.3, seed=0, refill=True):
    """Draw from RoIs in random order; return how many of each kind were drawn, and the indices."""
    torch.manual_seed(seed)
    kinds = torch.tensor([0] * num_fg + [1] * num_near + [2] * num_far + [3] * num_ignored)
    kinds = kinds[torch.randperm(len(kinds))]
    classes = torch.tensor([1, NUM_CLASSES, NUM_CLASSES, -1])[kinds]
    ious = torch.tensor([0.7, 0.3, 0.05, 0.3])[kinds]
    drawn = sample_rois(classes, ious, NUM_CLASSES, batch_size, positive_fraction, BANDS, refill)
    counts = torch.bincount(kinds[drawn], minlength=4).tolist()
    return counts, drawn, kinds


@pytest.mark.parametrize(
    ("available", "drawn"),
    [
        # 30 % of 64 is 19; 85 % of the other 45 is 38.
        ((100, 100, 100), (19, 38, 7)),
        # Few foreground: 85 % of the other 60.
        ((4, 100, 100), (4, 51, 9)),
        ((0, 100, 100), (0, 54, 10)),
        # One band makes up for the other.
        ((100, 10, 100), (19, 10, 35)),
        ((100, 100, 2), (19, 43, 2)),
        # Foreground never makes up for background.
        ((100, 5, 5), (19, 5, 5)),
        ((100, 0, 0), (19, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((3, 4, 5), (3, 4, 5)),
    ],
    ids=str,
)
def test_number_of_each_kind(available, drawn):
    counts, indices, _ = sample(*available, num_ignored=20)
    assert counts == [*drawn, 0]
    assert len(indices.unique()) == len(indices)


@pytest.mark.parametrize(
    ("available", "drawn"),
    [((100, 100, 100), (19, 38, 7)), ((100, 10, 100), (19, 10, 7)), ((100, 100, 2), (19, 38, 2))],
    ids=str,
)
def test_without_refill_no_band_makes_up_for_another(available, drawn):
    counts, _, _ = sample(*available, refill=False)
    assert counts == [*drawn, 0]


def test_foreground_comes_first():
    _, indices, kinds = sample(30, 30, 30)
    assert kinds[indices].tolist() == sorted(kinds[indices].tolist())


def test_draws_are_random_and_repeatable():
    draws = [tuple(sample(50, 50, 50, batch_size=10, seed=s)[1].tolist()) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_every_roi_of_a_kind_is_drawn_sooner_or_later():
    torch.manual_seed(0)
    classes, ious = torch.full((20,), NUM_CLASSES), torch.full((20,), 0.2)
    drawn = [sample_rois(classes, ious, NUM_CLASSES, 5, 0.3, BANDS) for _ in range(60)]
    # Each is missed 60 times with probability 0.75 ** 60 = 3e-8.
    assert torch.cat(drawn).unique().numel() == 20


@pytest.mark.parametrize(("iou", "band"), [(0.0, 1), (0.0999, 1), (0.1, 0), (0.4999, 0)])
def test_a_band_holds_its_lower_end_but_not_its_upper(iou, band):
    # One RoI is wanted, and the band in question has the whole share.
    bands = [(low, high, float(i == band)) for i, (low, high, _) in enumerate(BANDS)]
    other = 0.05 if band == 0 else 0.3
    classes, ious = torch.full((2,), NUM_CLASSES), torch.tensor([iou, other])
    assert sample_rois(classes, ious, NUM_CLASSES, 1, 0.3, bands).tolist() == [0]


def test_every_foreground_class_counts_as_foreground():
    classes = torch.arange(NUM_CLASSES + 1)
    drawn = sample_rois(classes, torch.tensor([0.9, 0.9, 0.9, 0.2]), NUM_CLASSES, 4, 0.75, BANDS)
    assert sorted(drawn.tolist()) == [0, 1, 2, 3]
