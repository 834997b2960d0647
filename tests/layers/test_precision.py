import pytest
import torch

from mnc_d2.layers import at_least_float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_half_precision_is_promoted(given, expected):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == expected
