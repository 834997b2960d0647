"""Boxes at the border of their image."""

import torch
from detectron2.structures import Boxes

from mnc_d2.layers import batch_indices, clip_boxes, image_corners, inside_image


def test_boxes_are_clipped_as_by_detectron2_with_the_same_gradient():
    # Inside, across the border on each side, outside.
    rows = [[1, 2, 8, 9], [-3, 2, 25, 9], [1, -2, 8, 14], [30, 40, 35, 50], [-9, -9, -2, -1]]
    results = []
    for clip in (clip_to_image, clip_by_detectron2):
        boxes = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
        clipped = clip(boxes)
        clipped.backward(torch.arange(20.0).view(5, 4))
        results.append((clipped, boxes.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_a_box_on_the_border_passes_its_gradient():
    boxes = torch.tensor([[0.0, 0.0, 20.0, 10.0]], requires_grad=True)
    clipped = clip_to_image(boxes)
    clipped.sum().backward()
    assert torch.equal(clipped, boxes) and torch.equal(boxes.grad, torch.ones(1, 4))


def clip_to_image(x):
    return clip_boxes(x, image_corners([(10, 20)], x))


def clip_by_detectron2(x):
    boxes = Boxes(x)
    boxes.clip((10, 20))
    return boxes.tensor


def test_clipped_boxes_that_are_not_a_number_stay_so():
    ((x1, *rest),) = clip_to_image(torch.tensor([[float("nan"), 2.0, 30.0, 9.0]])).tolist()
    assert x1 != x1 and rest == [2, 20, 9]


def test_each_box_has_the_corner_of_its_image():
    like = torch.zeros(0, dtype=torch.float64)
    corners = image_corners([(10, 20), (30, 40)], like)
    assert corners.dtype == torch.float64
    assert corners.tolist() == [[20, 10, 20, 10], [40, 30, 40, 30]]
    assert batch_indices([1, 0, 2], torch.device("cpu")).tolist() == [0, 2, 2]
    assert image_corners([], like).shape == (0, 4)


def test_boxes_that_touch_the_border_are_inside():
    boxes = torch.tensor([[0.0, 0.0, 20.0, 10.0], [1.0, 1.0, 20.1, 9.0], [-0.1, 1.0, 3.0, 3.0], [1.0, 1.0, 9.0, 9.0]])
    corners = image_corners([(10, 20), (10, 8)], boxes)[[0, 0, 0, 1]]
    assert inside_image(boxes, corners).tolist() == [[True], [False], [False], [False]]
