"""Where the losses of the cascade would move its boxes: towards their object or away from it.

    python tests/benchmarks/box_gradients.py --config-file ... --dataset ... MODEL.WEIGHTS model_final.pth

takes the arguments of train_net.py. For the foreground RoIs of batches of the training set (those with IoU 0.5 to 1
with an instance, without the ground-truth boxes themselves) it prints, by pass and by loss, the share whose IoU rises
after a step along the negative gradient, of 2 % of the box and of a tenth of that, and the mean cosine between that
direction and the way to the object; for all losses together also by the IoU of the RoI. RoIs without gradient are left
out.

The gradients of single losses, and of "all later", their sum, are those with respect to the coordinates of the box:
what later stages would do with it, before delta_clip of MODEL.MNC.GRADIENTS. "All" is where training moves the box: the
gradient of all losses with respect to the deltas that the box was decoded from, its own regression loss and the clip
included. Of the RPN's own losses this has that of the anchors behind RoIs (its field anchors).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.engine import MNCTrainer, argument_parser, build_config
from mnc_d2.modeling.roi_heads.output_layers import Predictions
from mnc_d2.modeling.roi_heads.outputs import split_by_image

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


class Capture:
    """What a training step makes its boxes of, by pass: boxes, and the deltas that they were decoded from."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rois: list[torch.Tensor] = []  # of each pass
        self.proposals: list[Instances] = []
        self.predictions: list[Predictions] = []  # of each pass
        heads = model.roi_heads
        predictor = heads.get_pass(0).classifier.predictor
        self.decode_anchors = model.proposal_generator.box2box_transform.apply_deltas
        self.regress_boxes, self.num_classes = predictor.regress_boxes, heads.num_classes
        self.hooks = [
            heads.register_forward_pre_hook(lambda module, args: setattr(self, "proposals", args[2])),
            heads.pooler.register_forward_pre_hook(lambda module, args: self.rois.append(args[1])),
        ]
        for of_pass in heads.passes:
            hook = of_pass.classifier.predictor.register_forward_hook(
                lambda module, args, output: self.predictions.append(output)
            )
            self.hooks.append(hook)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def split(self, rois: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split a tensor (R, 5) like the RoIs (R, 5) into coordinates (n, 4) of each image."""
        return split_by_image(rois, tensor[:, 1:], len(self.proposals))

    def decoders(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], Callable]]:
        """For each pass, its boxes by image, the deltas behind them, and the function that decodes all of these."""
        boxes = [x.proposal_boxes.tensor for x in self.proposals]
        anchors = torch.cat([x.anchor_boxes for x in self.proposals])
        yield boxes, [x.anchor_deltas for x in self.proposals], partial(self.decode_anchors, boxes=anchors)
        for rois, next_rois, predictions in zip(self.rois, self.rois[1:], self.predictions):
            classes = predictions.seg_cls_logits[:, : self.num_classes].detach().argmax(dim=1)
            # Without the ground-truth boxes that may have been appended.
            next_boxes = [x[: len(y)] for x, y in zip(self.split(next_rois, next_rois), self.split(rois, rois))]
            decode = partial(self.regress_boxes, rois[:, 1:].detach(), classes=classes)
            yield next_boxes, [predictions.deltas], decode


def measure_batch(model: torch.nn.Module, inputs: list[dict]) -> dict[tuple[int, str], torch.Tensor]:
    """What :func:`measure` returns by pass, from 1, and name of the loss without its stage; and "all"."""
    capture = Capture(model)
    with EventStorage():
        losses = model(inputs)
    capture.remove()
    targets = [x["instances"].gt_boxes for x in inputs]
    results = defaultdict(list)

    def add(key: tuple[int, str], boxes: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        for box, gradient, target in zip(boxes, gradients, targets):
            if len(target):
                matched = pairwise_iou(target, Boxes(box.detach())).argmax(dim=0)
                results[key].append(measure(box.detach(), gradient, target.tensor[matched]))

    for number, (boxes, deltas, decode) in enumerate(capture.decoders(), start=1):
        gradients = torch.autograd.grad(sum(losses.values()), deltas, retain_graph=True)
        decoded, change = torch.func.jvp(decode, (torch.cat(deltas).detach(),), (torch.cat(gradients),))
        # Not those that were clipped to the image: where they move is another matter.
        change = change * ((decoded - torch.cat(boxes).detach()).abs() < 1e-3).all(dim=1, keepdim=True)
        add((number, "all"), boxes, change.split([len(x) for x in boxes]))
    losses = {name: loss for name, loss in losses.items() if "rpn" not in name}
    losses["all later"] = sum(losses.values())
    for number, rois in enumerate(capture.rois, start=1):
        # Without the gradient of proposals or boxes (step-wise training) nothing comes through coordinates.
        for name, loss in losses.items() if rois.requires_grad else ():
            stage = name.rsplit("_s", 1)
            if name == "all later" or int(stage[1]) in (2 * number, 2 * number + 1):
                (gradient,) = torch.autograd.grad(loss, rois, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    add((number, stage[0]), capture.split(rois, rois), capture.split(rois, gradient))
    return {key: torch.cat(values) for key, values in results.items()}


def main() -> None:
    cfg = build_config(argument_parser().parse_args())
    seed_all_rng(cfg.SEED)
    model = MNCTrainer.build_model(cfg)
    model.vis_period = 0  # pictures would run the cascade once more
    MNCCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    totals = defaultdict(list)
    for inputs in islice(iter(MNCTrainer.build_train_loader(cfg)), NUM_BATCHES):
        for key, values in measure_batch(model, inputs).items():
            totals[key].append(values)
    rows = []
    for (number, name), values in sorted(totals.items()):
        values = torch.cat(values)
        rows.append([number, name, "0.5 to 1", len(values), *values.mean(dim=0)[:-1].tolist()])
        if not name.startswith("all"):
            continue
        for low, high in IOU_RANGES:
            part = values[(values[:, -1] >= low) & (values[:, -1] < high)]
            rows.append([number, name, f"{low} to {high}", len(part), *part.mean(dim=0)[:-1].tolist()])
    headers = ["pass", "loss", "IoU", "RoIs", *(f"rises, {step:.1%}" for step in STEPS), "cosine"]
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
