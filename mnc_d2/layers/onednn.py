"""What convolutions and fully connected layers share that ask oneDNN for their products, at inference on a CPU.

The operators are those that torch.compile calls. They are tried out once, and left where PyTorch or the processor does
not have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether there is oneDNN for a dtype, and nobody has switched it off."""
    return torch.backends.mkldnn.enabled and _onednn_multiplies(dtype)


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    operators = torch.ops.mkldnn
    try:
        x = torch.ones(1, 1, dtype=dtype)
        operators._linear_pointwise(x, operators._reorder_linear_weight(x), None, "none", [], "")
        x, geometry = x[..., None, None], ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
        packed = operators._reorder_convolution_weight(x, *geometry, x.shape)
        operators._convolution_pointwise(x, packed, None, *geometry, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


class CopyOfWeights:
    """A copy of weights in another order, kept until one of them changes. Copies of this object are empty.

    Of changes that PyTorch does not count, through ``weight.data`` (as ``Module.to`` makes them) or by fused
    optimisers, it has to be told by :meth:`clear`. Weights that were made in inference mode count no changes at all,
    and are copied in every call.
    """

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple:
        return CopyOfWeights, ()

    def clear(self) -> None:
        """Forget the copy, and the memory it takes."""
        # Exchanged as a whole: several threads may ask for a copy, and not with the same key.
        self._kept: tuple[list[tuple], object, torch.Tensor | None] = [], None, None

    def get(
        self, weights: Sequence[torch.Tensor], make: Callable[[], torch.Tensor], key: object = None
    ) -> torch.Tensor:
        """Return the copy.

        Args:
            weights: all that it is made from.
            make: is called where there is none yet, or another one is needed.
            key: what else it depends on; compared by ``==``.
        """
        if any(x.is_inference() for x in weights):
            return make()
        made_from, kept_key, copy = self._kept
        unchanged = len(weights) == len(made_from) and all(
            x is old and x._version == version for x, (old, version) in zip(weights, made_from)
        )
        if not unchanged or key != kept_key:
            made_from = [(x, x._version) for x in weights]
            copy = make()
            self._kept = made_from, key, copy
        return copy
