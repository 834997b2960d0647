"""Masks in the image, as the authors' evaluation has them."""

from __future__ import annotations

import cv2
import numpy as np
import torch


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> torch.Tensor:
    """Binarise masks, resize them to their boxes, bilinearly, and binarise the result.

    The authors' evaluation writes masks that are binary already, and resizes these. Unlike Detectron2's pasting, the
    masks do not fade at the borders of their boxes.

    Args:
        masks: (D, m, m), probabilities.
        boxes: (D, 4), whole pixels of the image, far corners exclusive; within the image.
        image_size: (height, width).
        threshold: mask cells and pixels are foreground from this value on.

    Returns:
        (D, height, width), bool, on the device of ``masks``.
    """
    pasted = np.zeros((len(masks), *image_size), dtype=bool)
    binary = (masks >= threshold).cpu().numpy().astype(np.float32)
    for image, mask, (x1, y1, x2, y2) in zip(pasted, binary, boxes.round().int().tolist()):
        image[y1:y2, x1:x2] = cv2.resize(mask, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR) >= threshold
    return torch.from_numpy(pasted).to(masks.device)
