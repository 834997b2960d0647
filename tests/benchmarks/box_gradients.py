"""Where the losses of the cascade would move its boxes: towards their object or away from it.

    python tests/benchmarks/box_gradients.py --config-file ... --dataset ... MODEL.WEIGHTS model_final.pth

takes the arguments of train_net.py. For the foreground RoIs of batches of the training set (those with IoU 0.5 to 1
with an instance, without the ground-truth boxes themselves) it prints, by pass and by loss, the share whose IoU rises
after a step along the negative gradient, of 2 % of the box and of a tenth of that, and the mean cosine between that
direction and the way to the object; for all losses together also by the IoU of the RoI. RoIs without gradient are left
out. The gradients are those before MODEL.MNC.DELTA_GRADIENT_CLIP.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.engine import MNCTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_net  # noqa: E402

STEPS = (0.02, 0.002)
NUM_BATCHES = 12
IOU_RANGES = ((0.5, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0))


def measure(boxes: torch.Tensor, gradient: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    """What steps along the negative gradient do to foreground RoIs that have one and are no ground-truth boxes.

    Args:
        boxes, gradient, gt_boxes: (R, 4) each, in image pixels.

    Returns:
        (n, 4): whether each of the two steps raises the IoU, the cosine of their direction with the way to the object,
        and the IoU.
    """
    before = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
    chosen = (before >= 0.5) & (before < 0.999) & (gradient != 0).any(dim=1)
    boxes, gt_boxes, before = boxes[chosen], gt_boxes[chosen], before[chosen]
    direction = -F.normalize(gradient[chosen], dim=1)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1, keepdim=True).sqrt()
    after = [matched_pairwise_iou(Boxes(boxes + step * size * direction), Boxes(gt_boxes)) for step in STEPS]
    cosine = F.cosine_similarity(direction, gt_boxes - boxes)
    return torch.stack((*((x > before).float() for x in after), cosine, before), dim=1)


def measure_batch(model: torch.nn.Module, inputs: list[dict]) -> dict[tuple[int, str], torch.Tensor]:
    """What :func:`measure` returns by pass, from 1, and name of the loss without its stage; "all" for their sum."""
    boxes_of_pass = []
    hook = model.roi_heads.pooler.register_forward_pre_hook(
        lambda module, args: boxes_of_pass.append([x.tensor for x in args[1]])
    )
    with EventStorage():
        losses = model(inputs)
    hook.remove()
    boxes_of_pass = [boxes for boxes in boxes_of_pass if boxes[0].requires_grad]
    losses = {name: loss for name, loss in losses.items() if "rpn" not in name}
    losses["all"] = sum(losses.values())
    results = defaultdict(list)
    for number, boxes in enumerate(boxes_of_pass, start=1):
        targets = [x["instances"].gt_boxes for x in inputs]
        for name, loss in losses.items():
            stage = name.rsplit("_s", 1)
            if name != "all" and int(stage[1]) not in (2 * number, 2 * number + 1):
                continue
            gradients = torch.autograd.grad(loss, boxes, retain_graph=True, allow_unused=True)
            for box, gradient, target in zip(boxes, gradients, targets):
                if gradient is None or len(target) == 0:
                    continue
                matched = pairwise_iou(target, Boxes(box.detach())).argmax(dim=0)
                results[number, stage[0]].append(measure(box.detach(), gradient, target.tensor[matched]))
    return {key: torch.cat(values) for key, values in results.items()}


def main() -> None:
    cfg = train_net.build_config(train_net.argument_parser().parse_args())
    seed_all_rng(cfg.SEED)
    model = MNCTrainer.build_model(cfg)
    MNCCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    totals = defaultdict(list)
    for inputs in islice(iter(MNCTrainer.build_train_loader(cfg)), NUM_BATCHES):
        for key, values in measure_batch(model, inputs).items():
            totals[key].append(values)
    rows = []
    for (number, name), values in sorted(totals.items()):
        values = torch.cat(values)
        rows.append([number, name, "0.5 to 1", len(values), *values.mean(dim=0)[:-1].tolist()])
        if name != "all":
            continue
        for low, high in IOU_RANGES:
            part = values[(values[:, -1] >= low) & (values[:, -1] < high)]
            rows.append([number, name, f"{low} to {high}", len(part), *part.mean(dim=0)[:-1].tolist()])
    headers = ["pass", "loss", "IoU", "RoIs", *(f"rises, {step:.1%}" for step in STEPS), "cosine"]
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
