"""Whether a device computes what the CPU does: RoI warp, mask voting, a training step, detections."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances, pairwise_iou
from inference import make_inputs, train_step
from roi_warp import WORK, Case
from torch import nn
from voting import IMAGE, make_candidates

from mnc_d2.modeling import vote_masks

# Rounding: a coordinate of 1000 pixels is known to 6e-5, and sums of thousands of terms run in another order.
ROUNDING = 1e-4
# Where rounding moves a sample over the edge of a pixel, or the larger of two samples is another one, single terms of a
# gradient change by as much as they are large: one in some thousands.
GRADIENT = 1e-2
# Of detections, and of boxes from masks: scores of random weights lie near one another, so that rounding decides some
# of the comparisons with thresholds and in NMS.
SAME = 0.9


def compare_warp(device: str, work: dict = WORK["FPN"]) -> list[dict]:
    """Compare RoI warp and its gradients; ``work`` as in roi_warp.py."""
    results = []
    for case in (Case(**work), Case(**work, device=device)):
        result = case.warp()
        gradients = torch.autograd.grad(result, [*case.features, case.boxes], case.gradient)
        results.append([x.detach().cpu() for x in (result, *gradients)])
    (expected, *expected_gradients), (result, *gradients) = results
    return [
        _row("warp", "largest difference / largest value", _largest_difference([result], [expected]), ROUNDING),
        _row("warp, features", "gradient", _relative_error(gradients[:-1], expected_gradients[:-1]), GRADIENT),
        _row("warp, boxes", "gradient", _relative_error(gradients[-1:], expected_gradients[-1:]), GRADIENT),
    ]


def compare_voting(device: str, candidates: int = 600) -> list[dict]:
    """Compare the detections of mask voting, which come in the order of their scores."""
    results = []
    for place in ("cpu", device):
        voted = vote_masks(*make_candidates(candidates, 20, place), IMAGE, score_threshold=0.001)
        results.append(voted.to("cpu"))
    return _compare_detections("voting", *results)


def compare_training(device: str, cfg: CfgNode, size: tuple[int, int]) -> list[dict]:
    """Compare losses and gradients of a training step on two images of (height, width).

    So that nothing is drawn at random, and no comparison of scores decides which boxes there are, all anchors are
    proposals and all proposals are trained on.
    """
    cfg = cfg.clone()
    everything = 10**5
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]),
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096, "MODEL.RPN.NMS_THRESH", 1.0),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", everything, "MODEL.RPN.POST_NMS_TOPK_TRAIN", everything),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", everything, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
        ]
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    results = []
    for place in ("cpu", device):
        placed = copy.deepcopy(model).to(place)
        losses = train_step(placed, make_inputs(2, size, cfg.MODEL.ROI_HEADS.NUM_CLASSES))
        gradients = [x.grad.cpu() for x in placed.parameters() if x.grad is not None]
        results.append((torch.stack(list(losses.values())).detach().cpu(), gradients))
    (expected, expected_gradients), (result, gradients) = results
    worst = ((result - expected).abs() / expected.abs().clamp(min=1e-6)).max().item()
    return [
        _row("training step", "largest relative difference of a loss", worst, 10 * ROUNDING),
        _row("training step", "gradient", _relative_error(gradients, expected_gradients), GRADIENT),
    ]


@torch.no_grad()
def compare_inference(device: str, model: nn.Module, inputs: list[dict]) -> list[dict]:
    """Compare the detections of a model, which is on the device, and of its copy on the CPU in one image."""
    on_cpu = copy.deepcopy(model).to("cpu").eval()
    results = [x(inputs)[0]["instances"].to("cpu") for x in (on_cpu, model.eval())]
    return _compare_detections("detections", *results)


def _compare_detections(part: str, expected: Instances, result: Instances) -> list[dict]:
    if len(expected) == 0 or len(result) == 0:
        return [_row(part, "detections", min(len(expected), len(result)), 1, at_least=True)]
    same_box = pairwise_iou(expected.pred_boxes, result.pred_boxes) > 0.99
    same_class = expected.pred_classes[:, None] == result.pred_classes
    same_score = (expected.scores[:, None] - result.scores).abs() < 1e-3
    found = same_box & same_class & same_score
    rows = [_row(part, f"share of {len(expected)} found", found.any(dim=1).float().mean().item(), SAME, at_least=True)]
    pairs = found.to(torch.uint8).argmax(dim=1)[found.any(dim=1)]
    masks = [x.pred_masks.float() for x in (expected[found.any(dim=1)], result[pairs])]
    rows.append(_row(part, "mean difference of their masks", (masks[0] - masks[1]).abs().mean().item(), 1e-3))
    return rows


def _largest_difference(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of any element, relative to the largest element."""
    difference = max((x - y).abs().max().item() for x, y in zip(results, expected))
    return difference / max(y.abs().max().item() for y in expected)


def _relative_error(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The length of the difference of all elements together, relative to that of what is expected."""
    squares = [
        sum(x.double().square().sum().item() for x in xs)
        for xs in ([x - y for x, y in zip(results, expected)], expected)
    ]
    return (squares[0] / squares[1]) ** 0.5


def _row(what: str, measure: str, value: float, limit: float, at_least: bool = False) -> dict:
    good = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    measure = "relative error of the gradient" if measure == "gradient" else measure
    return {"what": what, "measure": measure, "value": value, "limit": f"{sign} {limit:g}", "good": bool(good)}
