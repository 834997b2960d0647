"""Which gradients flow from a stage of the cascade to the stages before it (section 3), in one place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch

from ..layers import clip_gradient, inside_image, scale_gradient, stop_gradient_except

# What each preset sets to other than the default.
_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": {
        "coordinates": "all",
        "mask_coordinates": True,
        "moving_targets": False,
        "average_features": False,
    },
    "stepwise": {"proposals": False, "boxes": False, "masks": "none"},
}
_BOOLS = {"true": True, "false": False}
_ROIS = ("none", "foreground", "all")


@dataclass
class CausalGradients:
    """The rules of the causal gradients. The methods change gradients, never values.

    ``docs/causal-gradients.md`` has the reasons for the defaults.

    Args:
        proposals: whether boxes of the RPN pass gradients from the first pass.
        boxes: whether boxes that a pass regressed pass gradients from the next pass.
        masks: RoIs whose masks pass gradients from the classifier: "none", "foreground" (by mask-level label) or "all".
        coordinates: RoIs whose losses reach the coordinates of their box: "none", "foreground" (by box-level label) or
            "all". Background pushes boxes off objects, where it is easier to classify.
        mask_coordinates: whether the losses of the mask reach coordinates. No mask prefers a box that fits.
        moving_targets: whether the targets of box and mask move with the box. With constant targets, the regression
            loss mostly pushes boxes away from their object.
        average_features: whether k passes scale their gradient to the shared features by 1 / k, as Cascade R-CNN does.
        delta_clip: limit of each element of the gradient to box deltas, for the loss of one image; 0 for no limit.
        border: whether boxes pass gradients that the image border clips, or whose anchor crosses it.
        anchors: whether the anchor behind every sampled RoI joins the RPN's loss. It holds proposals on their objects.
    """

    proposals: bool = True
    boxes: bool = True
    masks: str = "foreground"
    coordinates: str = "foreground"
    mask_coordinates: bool = False
    moving_targets: bool = True
    average_features: bool = True
    delta_clip: float = 1.0 / 512
    border: bool = False
    anchors: bool = True
    # What the loss is multiplied by in mixed precision; the clip follows it.
    loss_scale: float = field(default=1.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("masks", "coordinates"):
            if getattr(self, name) not in _ROIS:
                _refuse(name, getattr(self, name), _ROIS)
        if not (math.isfinite(self.delta_clip) and self.delta_clip >= 0):
            raise ValueError(f"MODEL.MNC.GRADIENTS has delta_clip={self.delta_clip}. It must be a number, 0 or more.")

    @classmethod
    def parse(cls, text: str) -> CausalGradients:
        """Read a preset and what differs from it, such as "released, coordinates=foreground, delta_clip=0".

        Args:
            text: "default", "released" (the authors' code) or "stepwise" (no stage sends gradients to those before),
                then FIELD=VALUE pairs, all separated by commas. Without a preset, the pairs change the default.

        Raises:
            ValueError: the text has a word that is unknown, or in the wrong place.
        """
        words = [word.strip() for word in text.split(",")]
        values: dict[str, Any] = {}
        if "=" not in words[0]:
            preset = words.pop(0)
            if preset not in _PRESETS:
                _refuse("", preset, _PRESETS)
            values.update(_PRESETS[preset])
        for word in words:
            name, equals, value = (x.strip() for x in word.partition("="))
            if not equals and name in _PRESETS:
                raise ValueError(f"MODEL.MNC.GRADIENTS has {name!r} in the middle. One preset comes first.")
            if name not in _DEFAULTS:
                _refuse("", name, _DEFAULTS)
            values[name] = _parse_value(name, value)
        return cls(**values)

    def __str__(self) -> str:
        """Return the shortest text with a preset that :meth:`parse` reads these rules from."""
        texts = []
        for preset, changes in _PRESETS.items():
            base = {**_DEFAULTS, **changes}
            pairs = [f"{name}={getattr(self, name)}" for name in base if getattr(self, name) != base[name]]
            texts.append(", ".join([preset, *pairs]))
        return min(texts, key=lambda text: (text.count("="), len(text)))

    def scale_features(self, features: dict[str, torch.Tensor], num_passes: int) -> dict[str, torch.Tensor]:
        """Scale the gradient to features (N, C, H, W), by name, that ``num_passes`` passes share."""
        if not self.average_features:
            return features
        return {name: scale_gradient(x, 1 / num_passes) for name, x in features.items()}

    def detach_coordinates(self, rois: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
        """Return RoIs (R, 5), detached where they pass no gradients on.

        Args:
            rois: index of the image and box, in image pixels.
            foreground: (R,), bool, by box-level label.
        """
        if self.coordinates == "none":
            return rois.detach()
        return rois if self.coordinates == "all" else stop_gradient_except(rois, foreground[:, None])

    def detach_masks(self, masks: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
        """Return masks (R, m, m) for the classifier, detached where they pass no gradients on.

        Args:
            masks: probabilities.
            foreground: (R,), bool, by mask-level label.
        """
        if self.masks == "none":
            return masks.detach()
        return masks if self.masks == "all" else stop_gradient_except(masks, foreground[:, None, None])

    def clip_deltas(self, deltas: torch.Tensor, num_images: int) -> torch.Tensor:
        """Clip the gradient to box deltas of a batch, as boxes for a later stage are made of them.

        The limit is meant for the loss of one image. The loss of a batch is the mean over its images.
        """
        return clip_gradient(deltas, self.delta_clip * self.loss_scale / max(num_images, 1))

    def detach_at_border(
        self, boxes: torch.Tensor, corners: torch.Tensor, anchors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Detach those boxes that the border of their image is about to clip.

        Args:
            boxes: (R, 4), in image pixels.
            corners: (R, 4), of their images, see :func:`~mnc_d2.layers.image_corners`.
            anchors: (R, 4), that the boxes come from, if any. Those that cross the border detach their box, too.
        """
        if self.border:
            return boxes
        inside = inside_image(boxes, corners)
        return stop_gradient_except(boxes, inside if anchors is None else inside & inside_image(anchors, corners))


_DEFAULTS: dict[str, Any] = {x.name: x.default for x in fields(CausalGradients) if x.init}


def _parse_value(name: str, text: str) -> Any:
    default = _DEFAULTS[name]
    if isinstance(default, str):
        return text  # which the constructor checks
    if isinstance(default, bool):
        return _BOOLS[text.lower()] if text.lower() in _BOOLS else _refuse(name, text, ("True", "False"))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"MODEL.MNC.GRADIENTS has {name}={text}. It must be a number, 0 or more.") from None


def _refuse(name: str, word: Any, known: Iterable[str]) -> NoReturn:
    """Raise a ValueError about a word: the value of a field or, without ``name``, a preset or a field."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    what = f"{name}={word}" if name else repr(word)
    raise ValueError(f"MODEL.MNC.GRADIENTS has {what}. {hint}There are: {', '.join(known)}.")
