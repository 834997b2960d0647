"""Inference and training steps of MNC beside Detectron2's Mask R-CNN. One JSON line a row; see README.md here."""

import argparse
import json
import resource
from functools import partial

import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from measure import median_seconds
from torch import nn

from mnc_d2.model_zoo import get_config

HEIGHT, WIDTH = 600, 800
# Name of the pair: (config of MNC, Detectron2's config of Mask R-CNN, bars of inference and of a training step).
PAIRS = {
    "R-50-FPN": ("COCO-InstanceSegmentation/mnc_R_50_FPN.yaml", "mask_rcnn_R_50_FPN_1x.yaml", 1.0, 1.3),
    "R-50-C4": ("COCO-InstanceSegmentation/mnc_R_50_C4.yaml", "mask_rcnn_R_50_C4_1x.yaml", 1.2, 1.3),
}


def prepare(cfg: CfgNode, device: str) -> nn.Module:
    """Build a model with random weights of which every image gives 100 detections."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    model = build_model(cfg)
    # As they are initialised, the scores of all boxes are nearly the same.
    heads = model.roi_heads
    predictor = heads.predictor if hasattr(heads, "predictor") else heads.box_predictor
    for layer in (predictor.cls_score, getattr(predictor, "seg_cls_score", None)):
        if layer is not None:
            nn.init.normal_(layer.weight, std=0.05)

    # Frozen batch normalisation of weights that are not pretrained lets activations overflow: give it the statistics
    # of one image.
    def take_statistics(module: FrozenBatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        module.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        module.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    layers = [x for x in model.modules() if isinstance(x, FrozenBatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(take_statistics) for layer in layers]
    detect(model.eval(), make_inputs(1))
    for hook in hooks:
        hook.remove()
    return model


def make_inputs(batch: int) -> list[dict]:
    """Random images with ten ellipses each."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(HEIGHT)[:, None] + 0.5, torch.arange(WIDTH)[None] + 0.5
    inputs = []
    for _ in range(batch):
        target = Instances((HEIGHT, WIDTH))
        size = 60 + 200 * torch.rand(10, 2, generator=generator)
        start = torch.rand(10, 2, generator=generator) * (torch.tensor([WIDTH, HEIGHT]) - size)
        boxes = torch.cat((start, start + size), dim=1)
        x1, y1, x2, y2 = (boxes[:, i, None, None] for i in range(4))
        inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        target.gt_boxes, target.gt_masks = Boxes(boxes), BitMasks(inside)
        target.gt_classes = torch.randint(80, (10,), generator=generator)
        image = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": target, "height": HEIGHT, "width": WIDTH})
    return inputs


def train_step(model: nn.Module, inputs: list[dict]) -> None:
    model.zero_grad()
    with EventStorage():
        sum(model(inputs).values()).backward()


def detect(model: nn.Module, inputs: list[dict]) -> int:
    with torch.no_grad():
        return len(model(inputs)[0]["instances"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--no-training", action="store_true")
    options = parser.parse_args()

    for name in options.pairs:
        config, other, bar, training_bar = PAIRS[name]
        other_cfg = detectron2_zoo.get_config(f"COCO-InstanceSegmentation/{other}")
        other_cfg.INPUT.MASK_FORMAT = "bitmask"
        models = {"MNC": prepare(get_config(config), options.device), "Mask R-CNN": prepare(other_cfg, options.device)}

        for measure, limit in (("inference", bar), ("training step", training_bar)):
            if measure == "training step" and options.no_training:
                continue
            inputs = make_inputs(1 if measure == "inference" else 2)
            extra = {}
            for model in models.values():
                model.train(measure == "training step")
            if measure == "inference":
                extra["detections"] = {key: detect(model, inputs) for key, model in models.items()}
            work = detect if measure == "inference" else train_step
            calls = {key: partial(work, model, inputs) for key, model in models.items()}
            seconds = median_seconds(calls, options.repeats)
            row = {
                "pair": name,
                "measure": measure,
                "seconds": {key: round(value, 3) for key, value in seconds.items()},
                "ratio": round(seconds["MNC"] / seconds["Mask R-CNN"], 3),
                "bar": limit,
                **extra,
                "peak memory so far, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
