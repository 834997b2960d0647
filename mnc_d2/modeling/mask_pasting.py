"""From masks in the frames of boxes to masks of the image, in no more memory than these take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch

from .roi_heads.mask_voting import batch_by_size

# Pixels rendered at once: 4 MiB of float32. A single mask is rendered in strips.
_MAX_PIXELS = 2**20


class RLEMasks:
    """Masks of one image as run lengths, COCO's compressed RLE: a few hundred bytes a mask, however large the image.

    A field of Detectron2's ``Instances``: it has a length, and an index, slice, list or tensor of indices or of bool
    selects from it.
    """

    def __init__(self, rles: Sequence[dict], image_size: tuple[int, int]) -> None:
        """
        Args:
            rles: dicts of "size", [height, width], and "counts", bytes, as pycocotools has them.
            image_size: (height, width).
        """
        self.rles = list(rles)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, item: int | slice | Sequence[int] | torch.Tensor) -> RLEMasks:
        chosen = np.arange(len(self))[item.cpu().numpy() if isinstance(item, torch.Tensor) else item]
        return RLEMasks([self.rles[i] for i in np.atleast_1d(chosen)], self.image_size)

    def decode(self) -> torch.Tensor:
        """Return the pixels: bool (N, height, width)."""
        masks = np.zeros((len(self), *self.image_size), dtype=np.uint8)
        for mask, rle in zip(masks, self.rles):
            mask[:] = mask_util.decode(rle)
        return torch.from_numpy(masks.view(bool))


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> torch.Tensor:
    """Resize masks to their boxes and binarise them, as Detectron2's ``paste_masks_in_image`` does; in less time.

    A pixel takes the value at its centre, bilinearly between the centres of the mask cells. Beyond the outer ones, it
    fades to 0 over the size of a cell.

    Args:
        masks: (D, m, m), probabilities.
        boxes: (D, 4), float32, of positive width and height, in image pixels.
        image_size: (height, width).
        threshold: pixels are foreground from this value on; more than 0.

    Returns:
        (D, height, width), bool.
    """
    pasted = torch.zeros(len(masks), *image_size, dtype=torch.bool, device=masks.device)
    for index, x, y, pixels in _paste(masks, boxes, image_size, threshold):
        pasted[index, y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return pasted


def encode_masks(masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float) -> RLEMasks:
    """As :func:`paste_masks`, but of the image there is never more than the boxes of a few masks."""
    regions = _paste(masks, boxes, image_size, threshold)
    rles = {index: _encode(pixels.cpu().numpy(), x, y, image_size) for index, x, y, pixels in regions}
    return RLEMasks([rles[index] for index in range(len(masks))], image_size)


def _paste(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Yield for each mask its index, the corner x, y of a region, and its pixels, bool (h, w); outside all are 0."""
    with torch.autocast(masks.device.type, enabled=False):
        masks, boxes, size = masks.float(), boxes.float(), masks.shape[-1]
        limit = boxes.new_tensor([image_size[1], image_size[0]])
        # No pixel whose centre is a cell or more away from the box has a value.
        margin = (boxes[:, 2:] - boxes[:, :2]) / size
        start = (boxes[:, :2] - margin).floor().clamp(min=0).minimum(limit)
        sizes = (boxes[:, 2:] + margin).ceil().minimum(limit).maximum(start) - start
        order = sizes.prod(dim=1).argsort()
        masks, start, sizes = masks[order], start[order], sizes[order]
        boxes = boxes[order] - start.repeat(1, 2)
        corners, regions = torch.stack((start, sizes)).int().tolist()  # with the next, where the host waits
        for batch, (width, height) in batch_by_size(regions, _MAX_PIXELS):
            rows = _cell_weights(boxes[batch, 1], boxes[batch, 3], height, size)
            stretched = masks[batch] @ _cell_weights(boxes[batch, 0], boxes[batch, 2], width, size).transpose(1, 2)
            strips = rows.split(max(1, _MAX_PIXELS // max(1, len(rows) * width)), dim=1)
            pixels = torch.cat([strip @ stretched >= threshold for strip in strips], dim=1)
            for index, (x, y), (w, h), image in zip(order[batch].tolist(), corners[batch], regions[batch], pixels):
                yield index, x, y, image[:h, :w]


def _cell_weights(start: torch.Tensor, end: torch.Tensor, pixels: int, size: int) -> torch.Tensor:
    """The weights of mask cells along an axis of boxes from start to end, (D,), in its pixels: (D, pixels, size)."""
    pixel = torch.arange(pixels, dtype=torch.float32, device=start.device) + 0.5
    position = (pixel - start[:, None]) * (size / (end - start))[:, None] - 0.5
    cell = torch.arange(size, dtype=torch.float32, device=start.device)
    return (1 - (position[..., None] - cell).abs()).clamp(min=0)


def _encode(pixels: np.ndarray, x1: int, y1: int, image_size: tuple[int, int]) -> dict:
    """Encode a mask whose pixels, bool (h, w), are a region of the image at x1, y1."""
    height, width = image_size
    columns = np.zeros((pixels.shape[1], pixels.shape[0] + 2), dtype=np.int8)  # with a border that ends all runs
    columns[:, 1:-1] = pixels.T
    column, row = np.nonzero(np.diff(columns, axis=1))
    changes = (x1 + column) * height + y1 + row  # where runs of the image, column by column, begin and end
    # A run to the lower border of the image goes on where the next column begins with one.
    joined = np.flatnonzero(changes[1:] == changes[:-1])
    changes = np.delete(changes, np.concatenate((joined, joined + 1)))
    ends = changes if len(changes) and changes[-1] == height * width else np.append(changes, height * width)
    counts = np.diff(ends, prepend=0)
    return mask_util.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
