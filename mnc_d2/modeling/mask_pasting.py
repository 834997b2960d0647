"""From masks in the frames of boxes to masks of the image, in no more memory than these take."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch

# Pixels of one mask rendered at once, and weights of texels computed at once: 16 and 64 MiB of float32.
_MAX_RENDERED_PIXELS = 2**22
# Pixels of images rendered at once on a GPU, 128 MiB.
_MAX_IMAGE_PIXELS = 2**25
_MAX_WEIGHTS = 2**24


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
        self.image_size = tuple(image_size)

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

    A pixel takes the value at its centre, bilinearly between the centres of the texels, and 0 beyond the outer ones, as
    far as a texel reaches.

    Args:
        masks: (D, m, m), probabilities.
        boxes: (D, 4), float32, of positive width and height, in image pixels.
        image_size: (height, width).
        threshold: pixels are foreground from this value on; more than 0.

    Returns:
        (D, height, width), bool.
    """
    if masks.device.type != "cpu":
        return _paste_in_whole_images(masks, boxes, image_size, threshold)
    pasted = _make_empty_masks(len(masks), *image_size)
    for of_image, (x1, y1, pixels) in zip(pasted, _paste(masks, boxes, image_size, threshold)):
        of_image[y1 : y1 + pixels.shape[0], x1 : x1 + pixels.shape[1]] = pixels
    return pasted


def _make_empty_masks(*shape: int) -> torch.Tensor:
    """Return ``torch.zeros(shape, dtype=torch.bool)``, whose memory is taken page by page as it is written or read.

    The most of it never is. PyTorch would write it all. NumPy would not, but ask for huge pages, for which the kernel
    may have to make room first: 0.1 s for 48 MiB.
    """
    size = math.prod(shape)
    if size == 0:
        return torch.zeros(shape, dtype=torch.bool)
    return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=torch.bool).view(shape)


def encode_masks(masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float) -> RLEMasks:
    """As :func:`paste_masks`, but of the image there is never more than the box of one mask."""
    regions = _paste(masks, boxes, image_size, threshold)
    return RLEMasks([_encode(pixels.cpu().numpy(), x1, y1, image_size) for x1, y1, pixels in regions], image_size)


def _paste(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield for each mask the corner x, y of a region of the image, and its pixels, bool (h, w); outside all are 0."""
    with torch.autocast(masks.device.type, enabled=False):
        masks, boxes, size = masks.float(), boxes.float(), masks.shape[-1]
        limit = boxes.new_tensor([image_size[1], image_size[0]])
        # No pixel whose centre is a texel or more away from the box has a value.
        margin = (boxes[:, 2:] - boxes[:, :2]) / size
        start = (boxes[:, :2] - margin).floor().clamp(min=0).minimum(limit)
        end = (boxes[:, 2:] + margin).ceil().minimum(limit).maximum(start)
        regions = torch.cat((start, end), dim=1).int().tolist()  # the one time that the host waits
        at_once = max(1, _MAX_WEIGHTS // (sum(image_size) * size))
        for first in range(0, len(masks), at_once):
            part = slice(first, first + at_once)
            rows = _texel_weights(boxes[part, 1], boxes[part, 3], image_size[0], size)
            columns = _texel_weights(boxes[part, 0], boxes[part, 2], image_size[1], size).transpose(1, 2)
            for of_rows, mask, of_columns, (x1, y1, x2, y2) in zip(rows, masks[part], columns, regions[part]):
                stretched = mask @ of_columns[:, x1:x2]
                strips = of_rows[y1:y2].split(max(1, _MAX_RENDERED_PIXELS // max(1, x2 - x1)))
                pixels = [strip @ stretched >= threshold for strip in strips]
                yield x1, y1, pixels[0] if len(pixels) == 1 else torch.cat(pixels)


def _paste_in_whole_images(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> torch.Tensor:
    """As :func:`paste_masks`, by few and large operators, which on a GPU are done before many small ones begin."""
    height, width = image_size
    with torch.autocast(masks.device.type, enabled=False):
        masks, boxes, size = masks.float(), boxes.float(), masks.shape[-1]
        pasted = torch.empty(len(masks), *image_size, dtype=torch.bool, device=masks.device)
        at_once = max(1, _MAX_IMAGE_PIXELS // (height * width))
        for part in (slice(first, first + at_once) for first in range(0, len(masks), at_once)):
            rows = _texel_weights(boxes[part, 1], boxes[part, 3], height, size)
            columns = _texel_weights(boxes[part, 0], boxes[part, 2], width, size)
            pasted[part] = rows @ masks[part] @ columns.transpose(1, 2) >= threshold
    return pasted


def _texel_weights(start: torch.Tensor, end: torch.Tensor, pixels: int, size: int) -> torch.Tensor:
    """The weights of the texels along an axis of boxes from start to end, (D,), in its pixels: (D, pixels, size)."""
    pixel = torch.arange(pixels, dtype=torch.float32, device=start.device) + 0.5
    position = (pixel - start[:, None]) * (size / (end - start))[:, None] - 0.5
    texel = torch.arange(size, dtype=torch.float32, device=start.device)
    return (position[..., None] - texel).abs_().neg_().add_(1).clamp_(min=0)


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
