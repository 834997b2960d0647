"""What a CUDA GPU does with this project: the tensor tests on it, agreement with the CPU, time, memory, waits.

    python tests/benchmarks/gpu.py

takes some minutes and prints one Markdown table; what this machine lacks is left out, with the reason. ``--device cpu``
is the dry run, with models and images so small that its figures say nothing. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import agreement
import detectron2
import torch
import torch.distributed as dist
import torchvision
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from inference import HEIGHT, VGG_16, WIDTH, detect, make_inputs, pair_configs, prepare, train_step
from measure import median_seconds, peak_device_memory, stage_seconds
from synchronisations import count_synchronisations
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnc_d2.engine import AccumulatingTrainer
from mnc_d2.files import open_atomically
from mnc_d2.layers import HALF_PRECISIONS
from mnc_d2.model_zoo import get_config

ROOT = Path(__file__).parents[2]
# Figures of the paper for an image of PASCAL VOC on a K40, by stage; the network is VGG-16.
PAPER_SECONDS = {
    "convolutions": 0.15,
    "stage 2": 0.01,
    "stage 3": 0.08,
    "stage 4": 0.01,
    "stage 5": 0.08,
    "rest": 0.03,
    "all": 0.36,
}
# What makes a quickstart config tiny.
TINY = [
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 2),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
]


class Bench:
    """The device, the sizes that it is given to do, and the rows of the table."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.repeats = repeats
        self.size, self.classes = ((HEIGHT, WIDTH), 80) if self.on_gpu else ((64, 96), 2)
        self.rows: list[dict] = []
        self.part = "all"
        # Of bfloat16, a CPU without instructions for it takes many times as long.
        self.precisions = list(self._find_precisions()) if self.on_gpu else [("float32", "float32", False)]

    def add(
        self, what: str, measure: str, value, *, beside: str = "", good: bool | None = None, note: str = ""
    ) -> None:
        """Add a row: a value, what it is held against, and whether it is good, None if that is no question."""
        row = {"part": self.part, "what": what, "measure": measure, "value": value}
        self.rows.append({**row, "beside": beside, "good": good, "note": note})

    def skip(self, what: str, reason: str) -> None:
        """Add a row that says why something was not run."""
        self.add(what, "skipped", None, note=reason)

    def tiny_config(self, name: str = "mnc_R_18_FPN") -> CfgNode:
        cfg = get_config(f"quickstart/{name}.yaml")
        cfg.merge_from_list([*TINY, "VIS_PERIOD", 0])
        return cfg

    def pair(self) -> dict[str, nn.Module]:
        """MNC and Mask R-CNN with random weights, as inference.py has them; tiny ones on a CPU."""
        if self.on_gpu:
            cfgs = pair_configs("R-50-FPN")
        else:
            cfgs = {"MNC": self.tiny_config(), "Mask R-CNN": self.tiny_config("mask_rcnn_R_18_FPN")}
        return {name: prepare(cfg, self.device, self.size) for name, cfg in cfgs.items()}

    def images(self, count: int) -> list[dict]:
        return make_inputs(count, self.size, self.classes)

    def _find_precisions(self) -> Iterator[tuple[str, str, bool]]:
        """Yield name, precision and whether TF32 is allowed, of all that the GPU can."""
        yield "float32", "float32", False
        newer = torch.cuda.get_device_capability(self.device) >= (8, 0)
        if newer:
            yield "float32 with TF32", "float32", True
        yield "float16", "float16", False
        if newer:
            yield "bfloat16", "bfloat16", False
        else:
            self.skip("TF32, bfloat16", "they need compute capability 8.0")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in matrix products and convolutions, or forbid it."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [x.allow_tf32 for x in flags]
    for x in flags:
        x.allow_tf32 = allowed
    try:
        yield
    finally:
        for x, value in zip(flags, before):
            x.allow_tf32 = value


def run_tests(bench: Bench) -> None:
    """The tests of layers and modeling, with the tensors that they make on the device."""
    folders = ["tests/layers", "tests/modeling"] if bench.on_gpu else ["tests/layers/test_gradient.py"]
    # The released model has conventions of its own, which it computes in numpy.
    options = ["-q", "--device", bench.device, "--ignore-glob=*test_caffe*"]
    if bench.on_gpu and importlib.util.find_spec("xdist"):
        # Each process has a CUDA context of its own, of some hundred MiB.
        at_most = torch.cuda.get_device_properties(bench.device).total_memory // 2**31
        options += ["--numprocesses", str(min(os.cpu_count(), at_most)), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *folders]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{output.stdout}{output.stderr}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = [
        f"{x.get('classname')}.{x.get('name')}"
        for x in suite.iter("testcase")
        if x.find("failure") is not None or x.find("error") is not None
    ]
    note = ", ".join(failed)
    bench.add(" ".join(folders), "passed", passed, beside=f"of {counts['tests']}", good=not failed, note=note)
    if counts["skipped"]:
        bench.add(" ".join(folders), "skipped", counts["skipped"], note="pytest -rs names them")


def run_agreement(bench: Bench) -> None:
    """What the device computes, beside what the CPU does; float32 without TF32."""
    tiny_work = {"scales": [1 / 4, 1 / 8], "maps": [(16, 24), (8, 12)], "channels": 8, "rois": 10}
    model = bench.pair()["MNC"]
    with tf32(False):
        rows = [
            *agreement.compare_warp(bench.device, *([] if bench.on_gpu else [tiny_work])),
            *agreement.compare_voting(bench.device, 600 if bench.on_gpu else 40),
            *agreement.compare_training(bench.device, bench.tiny_config(), (96, 128) if bench.on_gpu else (32, 64)),
            *agreement.compare_inference(bench.device, model, bench.images(1)),
        ]
    for row in rows:
        bench.add(row["what"], row["measure"], row["value"], beside=row["limit"], good=row["good"])


def run_speed(bench: Bench) -> None:
    """Seconds and peak memory of inference and of a training step, beside Mask R-CNN."""
    models = bench.pair()
    works = {
        "inference": (detect, {name: model.eval() for name, model in models.items()}, bench.images(1)),
        "training step of 2 images": (train_step, models, bench.images(2)),
    }
    for measure, (function, _, images) in works.items():
        for model in models.values():
            model.train(function is train_step)
        for name, precision, allow in bench.precisions:
            calls = {key: partial(function, model, images, precision) for key, model in models.items()}
            with tf32(allow):
                seconds = median_seconds(calls, bench.repeats)
                memory = {key: peak_device_memory(call, bench.device) for key, call in calls.items()}
            ratio = seconds["MNC"] / seconds["Mask R-CNN"]
            beside = f"Mask R-CNN {seconds['Mask R-CNN']:.4g}"
            bench.add(f"{measure}, {name}", "seconds", seconds["MNC"], beside=beside, note=f"ratio {ratio:.2f}")
            bench.add(f"{measure}, {name}", "MiB", memory["MNC"], beside=f"Mask R-CNN {memory['Mask R-CNN']}")


def run_stages(bench: Bench) -> None:
    """Seconds of each stage of 5-stage MNC with VGG-16, beside the paper's."""
    cfg = get_config(VGG_16)
    if not bench.on_gpu:
        cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 20])
    model = prepare(cfg, bench.device, bench.size)
    image = make_inputs(1, bench.size)
    stages = [("convolutions", model.backbone), ("stage 1", model.proposal_generator)]
    for index in range(model.roi_heads.num_passes_test):
        heads = model.roi_heads.get_pass(index)
        # Not the mask head itself: what is called is its layers().
        stages += [(f"stage {2 * index + 2}", heads.mask_head.fc2), (f"stage {2 * index + 3}", heads.classifier)]
    for name, precision, allow in bench.precisions:
        with tf32(allow):
            seconds = stage_seconds(partial(detect, model, image, precision), stages, bench.repeats)
        for stage, value in {**seconds, "all": sum(seconds.values())}.items():
            beside = f"paper {PAPER_SECONDS[stage]}" if stage in PAPER_SECONDS else ""
            bench.add(f"{name}, {stage}", "seconds", value, beside=beside)


def run_synchronisations(bench: Bench) -> None:
    """How often the host waits for the device in an inference and in a training step."""
    counted = {}
    for name, model in bench.pair().items():
        # Detectron2 pastes masks one by one on a CPU, and all at once on a GPU.
        infer = torch.no_grad()(partial(model.eval().inference, bench.images(1), do_postprocess=bench.on_gpu))
        counted[name, "inference"] = _count(infer, bench.device)
        trainer = make_trainer(model.train(), bench.images(2))
        with EventStorage() as trainer.storage:
            trainer.iter = 0
            counted[name, "training step of 2 images"] = _count(trainer.run_step, bench.device)
    for measure in ("inference", "training step of 2 images"):
        places, other = counted["MNC", measure], counted["Mask R-CNN", measure]
        bench.add(measure, "waits", sum(places.values()), beside=f"Mask R-CNN {sum(other.values())}")
        bench.rows[-1]["places"] = {"MNC": places, "Mask R-CNN": other}
        for place, count in sorted(places.items()):
            if place.startswith("mnc_d2"):
                bench.add(measure, "of these", count, note=place)


def _count(call: Callable, device: str) -> dict[str, int]:
    call()  # what waits only the first time
    with count_synchronisations(device) as places:
        call()
    return dict(places.most_common())


def make_trainer(model: nn.Module, images: list[dict], **options) -> AccumulatingTrainer:
    """A trainer that sees the same images again and again, and does not move the weights far."""
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1e-5)
    return AccumulatingTrainer(model, itertools.repeat(images), optimizer, **options)


def run_mixed_precision(bench: Bench) -> None:
    """Steps of the optimizer in mixed precision, each of two batches, in a process group of one process."""
    backend = "nccl" if bench.on_gpu else "gloo"
    precisions = bench.precisions
    if not bench.on_gpu:
        bench.skip("NCCL", "it needs CUDA; gloo takes its place")
        precisions = [("bfloat16", "bfloat16", False)]
    with one_process_group(backend):
        for name, precision, allow in precisions:
            # In float16 the loss scale is halved at each step whose gradients are not finite, until it fits.
            steps = 1 if not bench.on_gpu else 20 if precision == "float16" else 3
            model = bench.pair()["MNC"].train()
            devices = [torch.cuda.current_device()] if bench.on_gpu else None
            parallel = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
            trainer = make_trainer(
                parallel,
                bench.images(2 if bench.on_gpu else 1),
                num_batches=2,
                precision=HALF_PRECISIONS.get(precision),
                takes_loss_scale=True,
            )
            with tf32(allow):
                trainer.train(0, steps)  # ends with a FloatingPointError where a loss is not finite
            gradients = [x.grad for x in model.parameters() if x.grad is not None]
            finite = all(x.isfinite().all().item() for x in gradients)
            loss = trainer.storage.latest()["total_loss"][0]
            scale = f"loss scale {trainer.grad_scaler.get_scale():g}" if trainer.grad_scaler.is_enabled() else ""
            bench.add(f"{backend}, {name}", f"loss of step {steps}", loss, good=finite, note=scale)


@contextmanager
def one_process_group(backend: str) -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


PARTS = {
    "tests": run_tests,
    "agreement": run_agreement,
    "speed": run_speed,
    "stages": run_stages,
    "synchronisations": run_synchronisations,
    "mixed precision": run_mixed_precision,
}


def describe_machine(device: str) -> dict[str, str]:
    """What the figures are of."""
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }
    if torch.device(device).type != "cuda":
        return {"device": f"{platform.machine()} CPU, dry run: figures say nothing", **versions}
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    cudnn = str(torch.backends.cudnn.version())
    return {"device": f"{properties.name}, {memory}", "CUDA": torch.version.cuda, "cuDNN": cudnn, **versions}


def to_markdown(rows: list[dict]) -> str:
    """The table; a value that is not good is bold."""
    cells = []
    for row in rows:
        value = (
            ""
            if row["value"] is None
            else f"{row['value']:.4g}"
            if isinstance(row["value"], float)
            else str(row["value"])
        )
        value = f"**{value}**" if row["good"] is False else value
        cells.append([row["part"], row["what"], row["measure"], value, row["beside"], row["note"]])
    return tabulate(
        cells, ["part", "what", "measure", "value", "beside", "note"], tablefmt="github", disable_numparse=True
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; return 1 if one could not be run, or if a value is not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help='"cpu" for the dry run')
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=10, help="runs of which medians are taken")
    parser.add_argument("--output", metavar="FILE.json", help="write the rows, with all places of waits, to this file")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU on this machine. --device cpu is a dry run.")
    bench = Bench(options.device, options.repeats)
    if not bench.on_gpu:
        bench.skip("TF32, float16, bfloat16", "they say nothing of a CPU; one training in bfloat16 is run")
    for bench.part in options.parts:
        print(f"{bench.part} ...", file=sys.stderr, flush=True)
        try:
            PARTS[bench.part](bench)
        except torch.OutOfMemoryError:
            bench.skip("the rest of it", "the GPU has not enough memory")
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            bench.add("the rest of it", "failed", f"{type(error).__name__}", good=False, note=str(error).split("\n")[0])
        torch.cuda.empty_cache()
    machine = describe_machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), to_markdown(bench.rows), sep="\n\n")
    if options.output:
        with open_atomically(options.output) as file:
            file.write(json.dumps({"machine": machine, "rows": bench.rows}, indent=1).encode())
    return int(any(row["good"] is False for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
