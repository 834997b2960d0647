"""Inference and training steps of MNC beside Detectron2's Mask R-CNN, and beside its own convolutions and fully
connected layers alone. One JSON line a row; see README.md here.

With --accelerate, inference of both models is that of their accelerated copies; without, of the models as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from measure import median_seconds, peak_process_memory
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mnc_d2.acceleration import accelerate
from mnc_d2.layers import HALF_PRECISIONS
from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import MultitaskNetworkCascade

HEIGHT, WIDTH = 600, 800
# Name of the pair: config of MNC, Detectron2's config of Mask R-CNN, and the bars that we set ourselves.
PAIRS = {
    "R-50-FPN": {
        "MNC": "COCO-InstanceSegmentation/mnc_R_50_FPN.yaml",
        "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "bars": {"inference": 0.66, "inference, shortcuts": 0.66, "training step": 1.3},
    },
    "R-50-C4": {
        "MNC": "COCO-InstanceSegmentation/mnc_R_50_C4.yaml",
        "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "bars": {"inference": 1.2, "inference, shortcuts": 0.85, "training step": 1.3},
    },
}
VGG_16 = "PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage.yaml"
ARITHMETIC_BARS = {"float32": 1.10, "bfloat16": 1.15}


def prepare(cfg: CfgNode, device: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> nn.Module:
    """Build a model with random weights of which every image gives 100 detections, and no box is skipped."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""
    if "MNC" in cfg.MODEL:
        cfg.MODEL.MNC.NEXT_PASS_MIN_SCORE = 0.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    model = build_model(cfg)
    # As they are initialised, the scores of all boxes are nearly the same.
    heads = model.roi_heads
    predictor = heads.passes[0].classifier.predictor if hasattr(heads, "passes") else heads.box_predictor
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
    model.eval()
    with torch.no_grad():
        model(make_inputs(1, size))
    for hook in hooks:
        hook.remove()
    return model


def make_inputs(batch: int, image_size: tuple[int, int] = (HEIGHT, WIDTH), classes: int = 80) -> list[dict]:
    """Random images of (height, width) with ten ellipses each."""
    height, width = image_size
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    inputs = []
    for _ in range(batch):
        target = Instances(image_size)
        size = (60 + 200 * torch.rand(10, 2, generator=generator)) * (height / HEIGHT)
        start = torch.rand(10, 2, generator=generator) * (torch.tensor([width, height]) - size)
        boxes = torch.cat((start, start + size), dim=1)
        x1, y1, x2, y2 = (boxes[:, i, None, None] for i in range(4))
        inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        target.gt_boxes, target.gt_masks = Boxes(boxes), BitMasks(inside)
        target.gt_classes = torch.randint(classes, (10,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": target, "height": height, "width": width})
    return inputs


def train_step(model: nn.Module, inputs: list[dict], precision: str = "float32") -> dict[str, torch.Tensor]:
    """Run a training step, forward and backward; return its losses."""
    model.zero_grad()
    dtype = HALF_PRECISIONS.get(precision)
    with EventStorage():
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            losses = model(inputs)
        sum(losses.values()).backward()
    return losses


@torch.no_grad()
def detect(model: nn.Module, inputs: list[dict], precision: str = "float32") -> int:
    """Run inference; return the number of detections in the first image."""
    dtype = HALF_PRECISIONS.get(precision)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return len(model(inputs)[0]["instances"])


def maybe_accelerate(model: nn.Module, precision: str, options: argparse.Namespace) -> nn.Module:
    """Return the accelerated copy of a model in a precision, if --accelerate asks for it, or else the model."""
    return accelerate(model, HALF_PRECISIONS.get(precision)) if options.accelerate else model


@torch.no_grad()
def let_some_boxes_on(model: MultitaskNetworkCascade, inputs: list[dict], share: float) -> None:
    """Let the share of the boxes with the best scores go on to the second pass, all of them if it is 1.

    Scores of random weights say nothing, but which boxes go on makes no difference to the time.
    """
    model.roi_heads.next_pass_min_score = 0.0
    if share < 1:
        model.outputs = ["instances", "passes"]
        first_pass = model(inputs)[0]["passes"][0]
        model.outputs = ["instances"]
        background = torch.minimum(first_pass.cls_probabilities[:, -1], first_pass.seg_cls_probabilities[:, -1])
        model.roi_heads.next_pass_min_score = (1 - background).quantile(1 - share).item()


@torch.no_grad()
def arithmetic_alone(model: nn.Module, inputs: list[dict], precision: str) -> Callable[[], None]:
    """Return a function that runs nothing but the convolutions and linear layers of an inference, on their inputs."""
    layers = [x for x in model.modules() if isinstance(x, (nn.Conv2d, nn.Linear))]
    calls = []
    hooks = [x.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0]))) for x in layers]
    detect(model, inputs, precision)
    for hook in hooks:
        hook.remove()
    dtype = HALF_PRECISIONS.get(precision, torch.float32)
    calls = [(layer, x.to(dtype)) for layer, x in calls]
    weights = {layer: [None if x is None else x.to(dtype) for x in (layer.weight, layer.bias)] for layer in layers}

    @torch.no_grad()
    def run() -> None:
        for layer, x in calls:
            if isinstance(layer, nn.Linear):
                F.linear(x, *weights[layer])
            else:
                F.conv2d(x, *weights[layer], layer.stride, layer.padding, layer.dilation, layer.groups)

    return run


def print_row(calls: dict[str, Callable], options: argparse.Namespace, **values: object) -> None:
    """Measure two calls, and print them with the ratio of the first to the second and the memory they took."""
    memory = peak_process_memory(calls)
    seconds = median_seconds(calls, options.repeats)
    first, second = seconds.values()
    row = {
        **values,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "ratio": round(first / second, 3),
        "peak memory, MiB": {key: value // 2**20 for key, value in memory.items()},
    }
    print(json.dumps(row), flush=True)


def pair_configs(name: str) -> dict[str, CfgNode]:
    """Return the configs of MNC and of the Mask R-CNN of a pair, with 80 classes."""
    pair = PAIRS[name]
    cfgs = {"MNC": get_config(pair["MNC"]), "Mask R-CNN": detectron2_zoo.get_config(pair["Mask R-CNN"])}
    cfgs["Mask R-CNN"].INPUT.MASK_FORMAT = "bitmask"
    for cfg in cfgs.values():
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    return cfgs


def compare_pair(name: str, options: argparse.Namespace) -> None:
    """Print the rows of MNC beside Mask R-CNN."""
    pair = PAIRS[name]
    models = {key: prepare(cfg, options.device) for key, cfg in pair_configs(name).items()}
    image = make_inputs(1)
    for measure, share in (("inference", 1.0), ("inference, shortcuts", options.share)):
        let_some_boxes_on(models["MNC"], image, share)
        for precision in options.precisions:
            row = {"pair": name, "measure": measure, "precision": precision, "bar": pair["bars"][measure]}
            row["accelerated"] = options.accelerate
            measured = {key: maybe_accelerate(model, precision, options) for key, model in models.items()}
            row["detections"] = {key: detect(model, image, precision) for key, model in measured.items()}
            calls = {key: partial(detect, model, image, precision) for key, model in measured.items()}
            print_row(calls, options, **row)
    if options.profile:
        print_profile(maybe_accelerate(models["MNC"], "float32", options), image)
    if not options.no_training:
        images = make_inputs(2)
        calls = {key: partial(train_step, model.train(), images) for key, model in models.items()}
        print_row(calls, options, pair=name, measure="training step", bar=pair["bars"]["training step"])


def compare_arithmetic(options: argparse.Namespace) -> None:
    """Print the rows of MNC with VGG-16 beside its own convolutions and fully connected layers alone."""
    cfg = get_config(VGG_16)
    model, image = prepare(cfg, options.device), make_inputs(1)
    measured = {precision: maybe_accelerate(model, precision, options) for precision in options.precisions}
    calls = {precision: partial(detect, x, image, precision) for precision, x in measured.items()}
    for precision, call in calls.items():
        alone = arithmetic_alone(model, image, precision)
        row = {"model": "VGG-16", "precision": precision, "bar": ARITHMETIC_BARS[precision]}
        row["accelerated"] = options.accelerate
        print_row({"whole call": call, "arithmetic alone": alone}, options, detections=call(), **row)
    if len(calls) > 1:
        print_row(calls, options, model="VGG-16", measure="float32 / bfloat16", bar="at least 3")
    if options.profile:
        print_profile(maybe_accelerate(model, "float32", options), image)


def print_profile(model: nn.Module, inputs: list[dict]) -> None:
    """Print where the time of an inference goes, operator by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        detect(model, inputs)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=[*PAIRS, "VGG-16"], default=[*PAIRS, "VGG-16"])
    parser.add_argument("--precisions", nargs="+", choices=list(ARITHMETIC_BARS), default=list(ARITHMETIC_BARS))
    parser.add_argument("--share", type=float, default=0.5, help="of the boxes that go on to the second pass")
    parser.add_argument("--accelerate", action="store_true", help="inference of both models, see mnc_d2.acceleration")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the time goes as well")
    options = parser.parse_args()
    for name in options.models:
        if name in PAIRS:
            compare_pair(name, options)
        else:
            compare_arithmetic(options)


if __name__ == "__main__":
    main()
