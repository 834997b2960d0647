"""Drawing of instances: where labels lie, and in which colours."""

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from mnc_d2.visualizer import InstanceVisualizer, class_colors, draw_predictions

NAMES = Metadata(thing_classes=["disc", "square"])


def predict(size, boxes, classes=None):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    result.scores = torch.full((len(boxes),), 0.9)
    result.pred_classes = torch.tensor(classes or [0] * len(boxes))
    return result


def label_boxes(size, boxes):
    """Draw boxes; return those of the labels, x1, y1, x2, y2 in pixels of the image, by matplotlib's own measure."""
    visualizer = InstanceVisualizer(np.full((*size, 3), 128, dtype=np.uint8), NAMES)
    output = visualizer.draw_instance_predictions(predict(size, boxes))
    output.canvas.draw()
    extents = [text.get_window_extent() for text in output.ax.texts]
    assert all(text.get_text() == "disc 90%" for text in output.ax.texts)
    height = size[0] * output.scale  # matplotlib's y is upwards
    return np.array([(e.x0, height - e.y1, e.x1, height - e.y0) for e in extents]).reshape(-1, 4) / output.scale


def shared_area(a, b):
    return np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))


def grid(side, step, count):
    """Boxes of a side, in rows and columns."""
    corners = 100 + step * np.arange(count)
    return [[x, y, x + side, y + side] for y in corners for x in corners]


@pytest.mark.parametrize("boxes", [grid(12, 40, 6), grid(12, 14, 8), [[0, 0, 20, 10], [630, 470, 640, 480]]])
def test_labels_hide_neither_small_instances_nor_one_another(boxes):
    labels = label_boxes((480, 640), boxes)
    assert len(labels) > 0
    for i, label in enumerate(labels):
        assert (label >= -1).all() and label[2] <= 641 and label[3] <= 481
        assert all(shared_area(label, np.array(box)) <= 0.2 * 12**2 + 1 for box in boxes)
        assert all(shared_area(label, other) <= 1 for other in labels[:i])  # their rims


def test_instances_with_room_all_have_a_label():
    assert len(label_boxes((480, 640), grid(40, 120, 3))) == 9


def test_an_instance_that_fills_the_image_has_its_label_inside():
    (label,) = label_boxes((480, 640), [[0, 0, 640, 480]])
    assert (label >= -1).all() and label[3] < 40


def test_small_images_are_enlarged_and_large_ones_keep_their_size():
    for size, drawn in (((30, 64), (300, 640, 3)), ((480, 700), (480, 700, 3))):
        image = np.zeros((*size, 3), dtype=np.uint8)
        assert draw_predictions(image, predict(size, [[2.0, 2.0, 9.0, 9.0]]), NAMES).shape == drawn
        assert draw_predictions(image, predict(size, []), NAMES).shape == drawn


def box_colors(metadata, classes):
    """Return the colours of boxes of some classes, 0 to 255."""
    visualizer = InstanceVisualizer(np.zeros((480, 640, 3), dtype=np.uint8), metadata)
    output = visualizer.draw_instance_predictions(predict((480, 640), grid(30, 100, 2)[: len(classes)], classes))
    return [tuple(round(255 * x) for x in patch.get_edgecolor()[:3]) for patch in output.ax.patches]


def test_classes_have_the_colours_of_the_metadata():
    metadata = Metadata(thing_classes=["disc", "square"], thing_colors=[(255, 0, 0), (0, 0, 255)])
    assert box_colors(metadata, [0, 1, 0]) == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


def test_classes_without_colours_get_some_that_stay():
    first, second, third = box_colors(NAMES, [0, 1, 0])
    assert first == third != second
    assert box_colors(NAMES, [0, 1, 0]) == [first, second, first]


def test_instances_of_an_only_class_differ():
    assert len(set(box_colors(Metadata(thing_classes=["cell"]), [0, 0, 0]))) == 3


def test_colours_differ_however_many_there_are():
    assert len({tuple(color) for color in class_colors(80)}) == 80
