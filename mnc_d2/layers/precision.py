"""The precision of coordinates, scores and losses."""

import torch

# By the names that configs have for them.
HALF_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
