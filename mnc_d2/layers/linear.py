"""A fully connected layer of feature maps that lie in memory pixel after pixel, as the RoI warp gives them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .device import wants_operator
from .gradient import channels_last_gradient


class LinearOfMaps(nn.Linear):
    """``nn.Linear`` of flattened feature maps; at inference on a CPU in less time.

    Flattening channels_last features copies them all, which for large maps takes as long as half of the product. In
    ``eval()``, without gradients, the layer keeps a copy of its weight in the order of the features instead, made when
    it is first called and whenever the weight has changed; only of a change through ``weight.data``, which PyTorch does
    not count, it has to be told by ``train()``. Weights that were made in inference mode count no changes, and are used
    as they are.
    """

    def __init__(self, channels: int, height: int, width: int, out_features: int) -> None:
        """
        Args:
            channels, height, width: of the feature maps.
            out_features: units.
        """
        super().__init__(channels * height * width, out_features)
        self.channels = channels
        self._copy: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (R, out_features) of features (R, channels, height, width)."""
        if self.training or wants_operator(features) or features.is_contiguous() or self.weight.is_inference():
            return super().forward(channels_last_gradient(features).flatten(1))
        return F.linear(features.permute(0, 2, 3, 1).flatten(1), self._weight_by_pixel(), self.bias)

    def train(self, mode: bool = True) -> LinearOfMaps:
        """As ``nn.Module.train``. The copy is dropped."""
        self._copy = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_copy": None}

    def _weight_by_pixel(self) -> torch.Tensor:
        """The weight with its columns in the order of pixels, and of channels in each."""
        copy, version = self._copy, self.weight._version
        if copy is None or copy[0] is not self.weight or copy[1] != version:
            by_pixel = self.weight.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)
            copy = self._copy = self.weight, version, by_pixel
        return copy[2]
