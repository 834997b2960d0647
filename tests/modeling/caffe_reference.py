"""Slow, obvious computations with boxes of inclusive corners."""

import math

import torch


def random_boxes(count, limit=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = limit * torch.rand(count, 2, generator=generator)
    return torch.cat((start, start + 0.6 * limit * torch.rand(count, 2, generator=generator)), dim=1)


def slow_decode(box, delta):
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = delta
    width, height = x2 - x1 + 1, y2 - y1 + 1
    x, y = x1 + 0.5 * width + dx * width, y1 + 0.5 * height + dy * height
    width, height = math.exp(dw) * width, math.exp(dh) * height
    return [x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height]


def slow_iou(a, b):
    def area(box):
        return max(0.0, box[2] - box[0] + 1) * max(0.0, box[3] - box[1] + 1)

    both = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    return area(both) / (area(a) + area(b) - area(both))
