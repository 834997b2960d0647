"""The client of exported models: its arithmetic in numpy beside the model's, and its files."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from PIL import Image

from mnc_d2.data import read_image
from mnc_d2.data.resize import ResizeShortestEdge
from mnc_d2.modeling import vote_masks

pytest.importorskip("onnxruntime")
from mnc_d2.export import client  # noqa: E402  after the check that it can be imported

SIZE = (61, 83)  # height, width
CLASSES = 3
SETTINGS = {
    "score_threshold": 0.05,
    "nms_threshold": 0.3,
    "voting_iou_threshold": 0.5,
    "mask_threshold": 0.4,
    "max_detections": 12,
}


def make_candidates(count, seed=0):
    """Candidates in a few clusters: boxes, scores, masks, class boxes. The last has no finite score."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.tensor([[4.0, 6, 33, 31], [40, 10, 83, 50], [10, 30, 28, 61], [50, 50, 52, 54]])
    boxes = clusters[torch.arange(count) % 4] + 3 * torch.randn(count, 4, generator=generator)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([SIZE[1], SIZE[0]] * 2))
    scores = (2 * torch.rand(count, CLASSES + 1, generator=generator)).softmax(dim=1)[:, :CLASSES]
    masks = torch.nn.functional.interpolate(torch.rand(count, 1, 4, 4, generator=generator), size=(14, 14))[:, 0]
    class_boxes = boxes.repeat(1, CLASSES) + torch.randn(count, 4 * CLASSES, generator=generator)
    if count:
        scores[-1, 0] = torch.nan
    return boxes, scores, masks, class_boxes


@pytest.mark.parametrize("detection_box", ["tight", "regressed"])
@pytest.mark.parametrize("count", [120, 5, 1, 0])
def test_voting_is_that_of_the_model(count, detection_box):
    boxes, scores, masks, class_boxes = candidates = make_candidates(count)
    expected = vote_masks(boxes, scores, masks, SIZE, class_boxes=class_boxes, detection_box=detection_box, **SETTINGS)
    found = client.vote_masks(*(x.numpy() for x in candidates), SIZE, detection_box=detection_box, **SETTINGS)
    assert len(found["scores"]) == len(expected) == (12 if count == 120 else len(expected))
    mask_boxes = expected.mask_boxes if detection_box == "regressed" else expected.pred_boxes
    for name, reference, tolerance in (
        ("scores", expected.scores, 0),
        ("classes", expected.pred_classes, 0),
        ("boxes", expected.pred_boxes.tensor, 1e-4),  # pixels
        ("mask_boxes", mask_boxes.tensor, 1e-4),
        ("masks", expected.pred_masks[:, 0], 1e-5),  # sums in another order
    ):
        np.testing.assert_allclose(found[name], reference.numpy(), atol=tolerance, rtol=0, err_msg=name)


def test_all_detections_may_be_asked_for():
    boxes, scores, masks, class_boxes = candidates = make_candidates(60)
    settings = {**SETTINGS, "max_detections": -1, "score_threshold": 0.0}
    found = client.vote_masks(*(x.numpy() for x in candidates), SIZE, detection_box="tight", **settings)
    assert len(found["scores"]) == len(vote_masks(boxes, scores, masks, SIZE, **settings)) > 12


def test_a_detection_below_the_mask_threshold_has_the_box_of_its_candidate():
    boxes, scores, masks, class_boxes = make_candidates(40)
    candidates = (boxes, scores, masks * 0.3, class_boxes)
    expected = vote_masks(*candidates[:3], SIZE, **SETTINGS)
    found = client.vote_masks(*(x.numpy() for x in candidates), SIZE, detection_box="tight", **SETTINGS)
    np.testing.assert_allclose(found["boxes"], expected.pred_boxes.tensor, atol=1e-4)
    np.testing.assert_allclose(found["masks"], expected.pred_masks[:, 0], atol=1e-5)


def test_rendering_in_strips_makes_no_difference(monkeypatch):
    candidates = [x.numpy() for x in make_candidates(60)]
    whole = client.vote_masks(*candidates, SIZE, detection_box="tight", **SETTINGS)
    monkeypatch.setattr(client, "_MAX_RENDERED", 5000)
    in_strips = client.vote_masks(*candidates, SIZE, detection_box="tight", **SETTINGS)
    np.testing.assert_allclose(in_strips["masks"], whole["masks"], atol=1e-6)


def test_masks_are_pasted_as_detectron2_does():
    boxes, _, masks, _ = make_candidates(20)
    boxes[0] = torch.tensor([3.3, 4.9, 3.6, 5.2])  # less than a pixel
    boxes[1] = torch.tensor([0.0, 0.0, SIZE[1], SIZE[0]])
    boxes, masks = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)], masks[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    expected = paste_masks_in_image(masks, boxes, SIZE, threshold=0.4).numpy()
    found = np.zeros_like(expected)
    for mask, box, image in zip(masks.numpy(), boxes.numpy(), found):
        client.paste_mask(mask, box, 0.4, image)
    # A value may be on the other side of the threshold by rounding.
    assert (found != expected).sum() <= 1 and expected.any(axis=(1, 2)).sum() > 10


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (37, 1000), (100, 100), (333, 500), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("sides", [(600, 1000), (256, 1333), (0, 1333)])
def test_images_are_resized_as_the_model_does(size, sides):
    image = np.zeros((*size, 3), dtype=np.uint8)
    expected = ResizeShortestEdge([sides[0]] * 2, sides[1]).get_transform(image).apply_image(image)
    assert client.network_size(size, *sides) == expected.shape[:2]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_images_are_read_as_the_model_does(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 250, (9, 12, 3)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 16)
    else:
        image = Image.fromarray(pixels).convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / "image.png"
    image.save(path, exif=exif)
    np.testing.assert_array_equal(client.read_image(path), read_image(path))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (400, 301)])
def test_run_lengths_are_those_of_coco(share, size):
    mask = np.random.default_rng(0).random(size) < share
    encoded = client.encode_rle(mask)
    assert encoded["counts"].encode() == mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    np.testing.assert_array_equal(mask_util.decode({**encoded, "counts": encoded["counts"].encode()}), mask)


def test_a_picture_of_masks_shows_the_best_on_top():
    masks = np.zeros((2, 2, 3), dtype=bool)
    masks[0, 0] = masks[1, :, 1] = True
    np.testing.assert_array_equal(np.asarray(client.draw_labels(masks)), [[1, 1, 1], [0, 2, 0]])
