"""The loss of a batch is the mean over its images."""

import pytest
import torch

from mnc_d2.modeling.roi_heads.loss_reduction import mean_over_images

LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])


@pytest.mark.parametrize(
    ("counts", "where", "expected"),
    [
        ([5], None, 31 / 5),
        ([2, 3], None, (3 / 2 + 28 / 3) / 2),
        ([2, 0, 3], None, (3 / 2 + 28 / 3) / 3),
        ([2, 3], [True, False, False, True, True], (1 + 24 / 2) / 2),
        ([2, 3], [False, False, False, True, False], 8 / 2),
    ],
    ids=str,
)
def test_mean_over_images(counts, where, expected):
    where = None if where is None else torch.tensor(where)
    assert mean_over_images(LOSSES, counts, where).item() == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[], [0], [0, 0]], ids=str)
def test_without_rois_it_is_zero(counts):
    losses = torch.zeros(0, requires_grad=True)
    mean = mean_over_images(losses, counts)
    mean.backward()
    assert mean.item() == 0


def test_several_losses_of_the_same_rois_each_have_their_mean():
    where = torch.tensor([True, False, False, True, True])
    means = mean_over_images(torch.stack((LOSSES, 3 * LOSSES)), [2, 3], where)
    expected = mean_over_images(LOSSES, [2, 3], where).item()
    assert means.tolist() == pytest.approx([expected, 3 * expected])
