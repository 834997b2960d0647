"""What each pass of the cascade changes, made visible."""

from __future__ import annotations

import numpy as np
from detectron2.layers import batched_nms
from detectron2.structures import Instances

from ..modeling.mask_pasting import paste_masks
from ..predictor import MNCPredictor
from ..visualizer import draw_predictions

_MIN_SCORE = 0.5
_NMS_THRESHOLD = 0.5


def draw_passes(predictor: MNCPredictor, image: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Draw the boxes, masks and scores of every pass, then the detections that mask voting makes of them.

    Args:
        predictor: of a model whose MODEL.MNC.OUTPUTS has "passes".
        image: uint8 (H, W, 3), BGR.

    Returns:
        captions and pictures, RGB.
    """
    output = predictor(image)
    pictures = []
    for index, of_pass in enumerate(output["passes"], start=1):
        shown = clear_detections(of_pass, predictor.model.mask_threshold)
        caption = f"pass {index}, stages {2 * index} and {2 * index + 1}: {len(shown)} of {len(of_pass)} boxes"
        pictures.append((caption, draw_predictions(image[:, :, ::-1], shown, predictor.metadata)))
    final = output["instances"]
    final = final[final.scores >= _MIN_SCORE]
    picture = draw_predictions(image[:, :, ::-1], final, predictor.metadata)
    return [*pictures, (f"after mask voting: {len(final)} detections", picture)]


def clear_detections(of_pass: Instances, mask_threshold: float, min_score: float = _MIN_SCORE) -> Instances:
    """Return the boxes of a pass that have a score and are not suppressed by a better one, with masks in the image."""
    of_pass = of_pass.to("cpu")
    of_pass = of_pass[of_pass.scores >= min_score]
    boxes = of_pass.pred_boxes.tensor
    kept = of_pass[batched_nms(boxes, of_pass.scores, of_pass.pred_classes, _NMS_THRESHOLD)]
    kept.pred_masks = paste_masks(kept.mask_probabilities, kept.pred_boxes.tensor, kept.image_size, mask_threshold)
    return kept
