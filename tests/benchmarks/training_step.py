"""Training steps of two configs side by side, on the same images: MNC first, then for example Mask R-CNN.

    python tests/benchmarks/training_step.py --config-file MNC.yaml --beside MASK_RCNN.yaml --dataset ... KEY VALUE ...

takes the arguments of train_net.py, which hold for both. Both models begin with the weights of their configs, see the
batches of the first one's loader, each as often, and are updated. One JSON line: seconds of a step (forward, backward,
optimizer), the median over rounds of the mean over batches, and their ratio.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import islice

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from measure import median_seconds

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.data import num_classes_from_datasets, prepare_dataset, register_coco_dataset
from mnc_d2.engine import MNCTrainer, argument_parser
from mnc_d2.model_zoo import load_config


def build_config(path: str, options: argparse.Namespace) -> CfgNode:
    """Return a config with the overrides of the command line, without pictures, for as many classes as there are."""
    cfg = load_config(path, [*options.opts, "VIS_PERIOD", "0", "MODEL.ROI_HEADS.NUM_CLASSES", "-1"])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes_from_datasets(cfg)
    return cfg


def make_steps(cfg: CfgNode, batches: list[list[dict]]) -> partial:
    """Return a call that trains the model of a config on each of the batches once."""
    seed_all_rng(cfg.SEED)
    model = MNCTrainer.build_model(cfg).train()
    MNCCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return partial(train_once, model, MNCTrainer.build_optimizer(cfg, model), batches)


def train_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[list[dict]]) -> None:
    with EventStorage():
        for inputs in batches:
            optimizer.zero_grad()
            sum(model(inputs).values()).backward()
            optimizer.step()


def main() -> None:
    parser = argument_parser()
    parser.add_argument("--beside", required=True, metavar="CONFIG", help="the second config")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median is printed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dataset in options.dataset:
        register_coco_dataset(*dataset)
    cfg, beside = (build_config(path, options) for path in (options.config_file, options.beside))
    for name in cfg.DATASETS.TRAIN:
        prepare_dataset(name)
    seed_all_rng(cfg.SEED)
    batches = list(islice(MNCTrainer.build_train_loader(cfg), options.batches))
    seconds = median_seconds(
        {"first": make_steps(cfg, batches), "beside": make_steps(beside, batches)}, options.repeats
    )
    row = {"ratio": round(seconds["first"] / seconds["beside"], 3)}
    row["seconds"] = {name: round(value / options.batches, 4) for name, value in seconds.items()}
    print(json.dumps({**row, "threads": options.threads}))


if __name__ == "__main__":
    main()
