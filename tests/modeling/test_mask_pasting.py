"""Pasting of masks into the image against Detectron2's, and their run lengths against pycocotools'."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances

from mnc_d2.modeling import mask_pasting
from mnc_d2.modeling.mask_pasting import RLEMasks, encode_masks, paste_masks

THRESHOLD = 0.4


def make_masks(size=(60, 90), count=40, largest=70.0, seed=0):
    """Smooth masks in boxes of all sizes, also of less than a pixel, some of them at the border."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    half = torch.rand(count, 2, generator=generator) ** 2 * largest / 2 + 0.1
    boxes = Boxes(torch.cat((centre - half, centre + half), dim=1))
    boxes.clip(size)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bilinear")[:, 0]
    return masks[boxes.nonempty()], boxes.tensor[boxes.nonempty()]


def test_pixels_are_those_of_detectron2():
    masks, boxes = make_masks()
    expected = paste_masks_in_image(masks, boxes, (60, 90), THRESHOLD)
    pasted = paste_masks(masks, boxes, (60, 90), THRESHOLD)
    assert pasted.dtype == torch.bool and len(pasted) > 30
    # Sums in another order move a pixel over the threshold now and then.
    assert (pasted != expected).sum() <= 2 and expected.sum() > 1000


@pytest.mark.parametrize("limit", [1, 200, 3000])
def test_strips_and_batches_do_not_change_the_pixels(monkeypatch, limit):
    masks, boxes = make_masks()
    whole = paste_masks(masks, boxes, (60, 90), THRESHOLD)
    monkeypatch.setattr(mask_pasting, "_MAX_PIXELS", limit)
    assert (paste_masks(masks, boxes, (60, 90), THRESHOLD) != whole).sum() <= 2


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_are_those_of_pycocotools(seed):
    masks, boxes = make_masks(seed=seed)
    masks = torch.cat((masks, torch.ones(4, 14, 14), torch.zeros(1, 14, 14)))
    # The whole image, its lower half, where runs go on from one column to the next, its last pixel; nothing; nothing.
    corners = [[-9.0, -9, 99, 99], [-9, 30, 99, 69], [89, 59, 90, 60], [95, 10, 99, 20], [0, 0, 90, 60]]
    boxes = torch.cat((boxes, torch.tensor(corners)))
    pasted = paste_masks(masks, boxes, (60, 90), THRESHOLD)
    encoded = encode_masks(masks, boxes, (60, 90), THRESHOLD)
    assert encoded.rles == [mask_util.encode(np.asfortranarray(x)) for x in pasted.numpy().view(np.uint8)]
    assert torch.equal(encoded.decode(), pasted.cpu())
    assert pasted[-5].all() and pasted[-3].sum() == 1 and not pasted[-2:].any()


def test_no_masks():
    none = torch.zeros(0, 14, 14), torch.zeros(0, 4), (6, 9), THRESHOLD
    assert paste_masks(*none).shape == (0, 6, 9)
    assert len(encode_masks(*none)) == 0 and encode_masks(*none).decode().shape == (0, 6, 9)


def test_run_lengths_are_a_field_of_instances():
    masks, boxes = make_masks()
    encoded = encode_masks(masks, boxes, (60, 90), THRESHOLD)
    instances = Instances((60, 90), pred_masks_rle=encoded, scores=torch.arange(len(masks)))
    pixels = encoded.decode()
    for item in (slice(3, 5), torch.tensor([4, 1]), instances.scores > 10):
        chosen = item if isinstance(item, slice) else item.cpu()  # run lengths are decoded on the CPU
        assert torch.equal(instances[item].pred_masks_rle.decode(), pixels[chosen])
    assert torch.equal(instances[2].pred_masks_rle.decode(), pixels[2:3])
    assert isinstance(encoded[[]], RLEMasks) and len(encoded[[]]) == 0
