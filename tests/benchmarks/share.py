"""Share of the boxes of a trained model that go on to the second pass, by MODEL.MNC.NEXT_PASS_MIN_SCORE.

    python tests/benchmarks/share.py --config-file CONFIG --eval-only ... MODEL.WEIGHTS MODEL.pth

takes the arguments of train_net.py, and runs the first pass on the first dataset of DATASETS.TEST.
"""

import json

import torch
from detectron2.config import CfgNode

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.engine import MNCTrainer, argument_parser, build_config

MIN_SCORES = (0.01, 0.02, 0.05)


@torch.no_grad()
def first_pass_scores(model: torch.nn.Module, cfg: CfgNode) -> torch.Tensor:
    """Return what decides whether a box goes on, for the boxes of all images."""
    scores = []
    for inputs in MNCTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        scores.append(model.roi_heads.predict(*model.propose(inputs))[0].foreground_probabilities)
    return torch.cat(scores)


def main() -> None:
    cfg = build_config(argument_parser().parse_args()).clone()
    cfg.defrost()
    cfg.MODEL.MNC.NUM_PASSES_TEST = 1
    model = MNCTrainer.build_model(cfg).eval()
    MNCCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    scores = first_pass_scores(model, cfg)
    shares = {str(x): round((scores >= x).float().mean().item(), 3) for x in MIN_SCORES}
    print(json.dumps({"dataset": cfg.DATASETS.TEST[0], "boxes": len(scores), "share": shares}))


if __name__ == "__main__":
    main()
