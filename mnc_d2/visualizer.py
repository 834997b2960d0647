"""One way to draw instances: for evaluation, predictions and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.colors
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.font_manager import FontProperties

_PANEL_WIDTH = 640  # pixels, at least
_FONT_SIZE = 9  # points
# A label may cover this part of an instance at most.
_MAX_COVERED = 0.2
_MARGIN = 2  # pixels of the picture between a box and its label


def draw_predictions(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draw predictions into an image.

    Args:
        image: uint8 (H, W, 3), RGB.
        instances: with pred_boxes, scores, pred_classes and possibly pred_masks or pred_masks_rle, in pixels of the
            image.
        metadata: thing_classes and possibly thing_colors, which are made up where there are none.

    Returns:
        uint8 (H', W', 3), RGB, the image at its size or, if it is small, enlarged.
    """
    instances = instances.to("cpu")
    if instances.has("pred_masks_rle"):
        instances.pred_masks = instances.pred_masks_rle.decode()
    return InstanceVisualizer(image, metadata).draw_instance_predictions(instances).get_image()


def draw_record(image: np.ndarray, record: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the ground truth of a record in Detectron2's dataset format; as :func:`draw_predictions`."""
    return InstanceVisualizer(image, metadata).draw_dataset_dict(record).get_image()


class InstanceVisualizer(Visualizer):
    """Detectron2's ``Visualizer`` whose labels leave instances in sight, and each class has its colour.

    Where there is but one class, each instance has a colour of its own. Small images are enlarged. A label lies beside
    its box, or in it if it is large, where it hides no more than a fifth of any instance and no other label; where it
    cannot, it is left out.
    """

    def __init__(self, image: np.ndarray, metadata: Metadata) -> None:
        """
        Args:
            image: uint8 (H, W, 3), RGB.
            metadata: thing_classes and possibly thing_colors.
        """
        names = list(metadata.get("thing_classes", ()))
        known = Metadata(thing_classes=names, thing_colors=list(metadata.get("thing_colors", class_colors(len(names)))))
        mode = ColorMode.SEGMENTATION if len(names) > 1 else ColorMode.IMAGE
        # A strip of few pixels' width would become a picture of many megapixels.
        scale = max(1.0, min(_PANEL_WIDTH / image.shape[1], 2 * _PANEL_WIDTH / image.shape[0]))
        super().__init__(image, known, scale=scale, instance_mode=mode)

    def overlay_instances(self, *, boxes=None, labels=None, assigned_colors=None, **kwargs):
        """As Detectron2's, with labels after everything else."""
        if assigned_colors is None and boxes is not None:
            assigned_colors = [[x / 255 for x in color] for color in class_colors(len(boxes))]
        super().overlay_instances(boxes=boxes, assigned_colors=assigned_colors, **kwargs)
        if labels is not None and boxes is not None and len(boxes):
            self._draw_labels(self._convert_boxes(boxes), labels, assigned_colors)
        return self.output

    def _jitter(self, color):
        # Detectron2's is random: the same picture would be another each time.
        return color

    def _draw_labels(self, boxes: np.ndarray, labels: Sequence[str], colors: Sequence) -> None:
        """Draw labels of boxes (N, 4) where they hide least, small boxes first."""
        taken = np.zeros((0, 4))
        font_size = _FONT_SIZE / self.output.scale  # which draw_text multiplies again
        for i in np.argsort(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable"):
            places = self._places(boxes[i], *self._text_size(labels[i]))
            hidden = [self._hides(place, boxes, taken) for place in places]
            best = int(np.argmin(hidden)) if hidden else 0
            if hidden and hidden[best] <= _MAX_COVERED:
                self.draw_text(
                    labels[i], places[best][:2], font_size=font_size, color=colors[i], horizontal_alignment="left"
                )
                taken = np.concatenate((taken, places[best][None]))

    def _text_size(self, text: str) -> tuple[float, float]:
        """Return width and height of a label in pixels of the image."""
        font = FontProperties(family="sans-serif", size=_FONT_SIZE)
        width, height, descent = self.output.canvas.get_renderer().get_text_width_height_descent(text, font, False)
        return (width + 2 * _MARGIN) / self.output.scale, (height + descent + 2 * _MARGIN) / self.output.scale

    def _places(self, box: np.ndarray, width: float, height: float) -> list[np.ndarray]:
        """Return where a label may lie inside the image, the place that readers expect first."""
        x1, y1, x2, y2 = box
        margin = _MARGIN / self.output.scale
        above, below = y1 - height - margin, y2 + margin
        corners = [(x1, above), (x1, below), (x2 - width, above), (x2 - width, below)]
        corners += [(x2 + margin, y1), (x1 - width - margin, y1), (x2 + margin, y2 - height)]
        corners += [(x1, y1), (x2 - width, y1), (x1, y2 - height)]  # inside
        places = np.array([(x, y, x + width, y + height) for x, y in corners])
        inside = (places[:, :2] >= 0).all(axis=1) & (places[:, 2:] <= (self.output.width, self.output.height)).all(1)
        return list(places[inside])

    def _hides(self, place: np.ndarray, boxes: np.ndarray, taken: np.ndarray) -> float:
        """Return the largest share of a box that a label hides; 1 where it meets another label."""
        if _overlaps(place, taken).any():
            return 1.0
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        return float(np.max(_overlaps(place, boxes) / np.maximum(areas, 1e-6)))


def _overlaps(place: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the area that a box (4,) shares with each of others (N, 4)."""
    sides = np.minimum(place[2:], boxes[:, 2:]) - np.maximum(place[:2], boxes[:, :2])
    return np.prod(np.maximum(sides, 0), axis=1)


def class_colors(number: int) -> list[list[int]]:
    """Return colours, red, green and blue from 0 to 255, that neighbours in the list differ in."""
    # Steps of the golden ratio around the circle of hues are never near one another.
    hues = (0.6 + 0.618034 * np.arange(number)) % 1
    return [[round(255 * x) for x in matplotlib.colors.hsv_to_rgb((hue, 0.85, 0.95))] for hue in hues]
