"""Train variants of MNC, and Mask R-CNN, under the same conditions, and say how far their differences can be trusted.

    python tests/benchmarks/compare.py --dataset NAME ANNOTATIONS.json IMAGE_ROOT --folds 3 --seeds 1 2 3 4 \\
        --variant mask_rcnn --variant mnc --variant narrow MODEL.MNC.MASK_FC_DIM 64 --iterations 250

The datasets are in COCO format, with the arguments of train_net.py. With --folds they are pooled and divided: each fold
is the test set once, and --stratify KEY gives every fold its share of the images that have the same value of KEY in
their records. With --train and --test they are used as they are, by name.

All variants have the backbone, the schedule and, for the same seed, the order of images and augmentations. Every run is
a process of train_net.py with one thread, --jobs of them at a time, each on a core of its own. The results of each run
are appended to a file of JSON lines as soon as it ends; the same command later goes on where it was stopped. It prints
the table of what is there, by variant: mean and standard deviation over folds and seeds, the mean difference from the
first variant within a fold and seed with its 95 % interval (Student's t; folds share training images, so it is a little
too narrow), the p-value of no difference corrected for the number of variants (Holm), and the median of the seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from scipy import stats
from tabulate import tabulate

from mnc_d2.model_zoo import load_config

ROOT = Path(__file__).parents[2]
STEPWISE = ["MODEL.MNC.GRADIENTS", "stepwise"]
# Overrides of the MNC config, by name of the variant.
MNC_VARIANTS = {
    "mnc": [],
    "paper": ["MODEL.MNC.GRADIENTS", "released", "MODEL.ROI_HEADS.NAME", "PaperMNCROIHeads"],
    "stepwise": STEPWISE,
    "3stage": ["MODEL.MNC.NUM_PASSES_TRAIN", "1"],
    "3stage_stepwise": ["MODEL.MNC.NUM_PASSES_TRAIN", "1", *STEPWISE],
}
METRICS = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP")


class Variant(NamedTuple):
    """A config with overrides, under a name."""

    name: str
    config: str
    overrides: list[str]


class Run(NamedTuple):
    """One training with its evaluation. Two runs with the same key are comparable pairs of their variants."""

    variant: Variant
    fold: int  # 0 without folds
    seed: int
    train: list[tuple[str, str, str]]  # datasets: name, annotations, image root
    test: list[tuple[str, str, str]]

    @property
    def name(self) -> str:
        return f"{self.variant.name}/fold_{self.fold}_seed_{self.seed}"


def parse_variant(words: Sequence[str], options: argparse.Namespace) -> Variant:
    """A variant from what follows --variant: the name of a known one, or a name and overrides of the MNC config."""
    name, *overrides = words
    if name == "mask_rcnn":
        return Variant(name, options.mask_rcnn_config, overrides)
    if name not in MNC_VARIANTS and not overrides:
        raise ValueError(f"--variant {name}: known are mask_rcnn, {', '.join(MNC_VARIANTS)}; another needs KEY VALUE")
    return Variant(name, options.mnc_config, [*MNC_VARIANTS.get(name, []), *overrides])


def write_folds(
    datasets: Sequence[tuple[str, str, str]], count: int, stratify: str | None, folder: Path
) -> list[tuple[tuple[str, str, str], tuple[str, str, str]]]:
    """Pool datasets and divide their images into folds, the same whenever it is called.

    Args:
        datasets: names, annotations and image roots.
        count: number of folds.
        stratify: key of the image records; None not to stratify.
        folder: where to write the annotations.

    Returns:
        for each fold, the datasets to train on and to test on.

    Raises:
        ValueError: the categories of the datasets differ, or an image record lacks the key.
    """
    images, annotations, categories = [], defaultdict(list), None
    for _, file, root in datasets:
        content = json.loads(Path(file).read_text())
        if categories not in (None, content["categories"]):
            raise ValueError(f"{file}: its categories are not those of {datasets[0][1]}")
        categories = content["categories"]
        new_ids = {}
        for image in content["images"]:
            if stratify is not None and stratify not in image:
                raise ValueError(f"{file}: image {image['id']} has no {stratify!r}, which --stratify names")
            new_ids[image["id"]] = len(images) + 1
            path = os.path.abspath(os.path.join(root, image["file_name"]))
            images.append({**image, "id": len(images) + 1, "file_name": path})
        for annotation in content["annotations"]:
            image_id = new_ids[annotation["image_id"]]
            annotations[image_id].append({**annotation, "image_id": image_id})
    strata = defaultdict(list)
    for image in images:
        strata[str(image.get(stratify))].append(image)
    generator = random.Random(0)
    shuffled = [image for _, stratum in sorted(strata.items()) for image in generator.sample(stratum, len(stratum))]
    folds = []
    folder.mkdir(parents=True, exist_ok=True)
    for fold in range(count):
        split = []
        for name, chosen in (
            ("train", [x for i, x in enumerate(shuffled) if i % count != fold]),
            ("test", shuffled[fold::count]),
        ):
            own = [a for image in chosen for a in annotations[image["id"]]]
            content = {
                "images": chosen,
                "annotations": [{**annotation, "id": i} for i, annotation in enumerate(own, start=1)],
                "categories": categories,
            }
            path = folder / f"fold_{fold + 1}_{name}.json"
            path.write_text(json.dumps(content))
            split.append((f"compare_{name}", str(path), datasets[0][2]))
        folds.append(tuple(split))
    return folds


def plan_runs(options: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed and fold by fold, so that what is there after an interruption compares all variants."""
    if options.iterations < 3:
        raise ValueError(f"--iterations {options.iterations}: at least 3, since the first two are not timed")
    variants = [parse_variant(words, options) for words in options.variant or [["mask_rcnn"], ["mnc"]]]
    if len({x.name for x in variants}) < len(variants):
        raise ValueError("Two variants have the same name.")
    datasets = [tuple(x) for x in options.dataset]
    if options.folds:
        folds = write_folds(datasets, options.folds, options.stratify, options.output / "folds")
        splits = [(i, [train], [test]) for i, (train, test) in enumerate(folds, start=1)]
    else:
        by_name = {x[0]: x for x in datasets}
        missing = [x for x in (*options.train, *options.test) if x not in by_name]
        if missing or not options.train or not options.test:
            raise ValueError(f"Name datasets of --dataset with --train and --test, or give --folds. Unknown: {missing}")
        splits = [(0, [by_name[x] for x in options.train], [by_name[x] for x in options.test])]
    return [
        Run(variant, fold, seed, train, test)
        for seed in options.seeds
        for fold, train, test in splits
        for variant in variants
    ]


def digest(config: str) -> str:
    """Return a digest of what a config sets to other than the default: what a new key's default leaves as it is."""
    defaults = dict(_flatten(load_config("")))
    values = {key: value for key, value in _flatten(load_config(config)) if value != defaults[key]}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:12]


def _flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings_of(run: Run, options: argparse.Namespace) -> dict:
    """What must agree for results of before to count as those of a run."""
    return {
        "config": run.variant.config,
        "config_digest": digest(run.variant.config),
        "overrides": [*run.variant.overrides, *options.opts],
        "iterations": options.iterations,
        "datasets": [x[0] for x in options.dataset],
        "folds": options.folds,
        "stratify": options.stratify,
    }


def train(run: Run, options: argparse.Namespace, cores: queue.SimpleQueue) -> dict:
    """Train and evaluate once in a process of its own; return its metrics and seconds."""
    output = options.output / run.name
    shutil.rmtree(output, ignore_errors=True)  # what a run that was interrupted left
    output.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(ROOT / "configs" / run.variant.config)]
    for dataset in (*run.train, *run.test):
        command += ["--dataset", *dataset]
    command += [
        "DATASETS.TRAIN",
        str(tuple(x[0] for x in run.train)),
        "DATASETS.TEST",
        str(tuple(x[0] for x in run.test)),
    ]
    command += ["SOLVER.MAX_ITER", str(options.iterations), "SOLVER.CHECKPOINT_PERIOD", str(options.iterations)]
    command += ["SEED", str(run.seed), "OUTPUT_DIR", str(output), "MODEL.ROI_HEADS.NUM_CLASSES", "-1"]
    command += ["DATALOADER.NUM_WORKERS", "0", "VIS_PERIOD", "0", "TEST.NUM_PICTURES", "0"]
    core = cores.get()
    try:
        start = time.time()
        with open(output / "stdout.txt", "w") as log:
            done = subprocess.run(
                [*command, *run.variant.overrides, *options.opts],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: os.sched_setaffinity(0, {core}) if core is not None else None,
            )
        seconds = time.time() - start
    finally:
        cores.put(core)
    if done.returncode:
        raise RuntimeError(f"train_net.py ended with {done.returncode}, see {output / 'stdout.txt'}")
    metrics = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    log = (output / "log.txt").read_text()
    if not options.keep_checkpoints:
        for checkpoint in output.glob("*.pth"):
            checkpoint.unlink()
    return {
        **{metric: round(metrics[metric], 3) for metric in METRICS},
        "train_seconds": round(
            options.iterations * float(_last(r"Overall training speed: .*\(([\d.]+) s / it\)", log)), 1
        ),
        "seconds_per_image": float(_last(r"pure compute time: .*\(([\d.]+) s / iter", log)),
        "seconds": round(seconds, 1),
    }


def _last(pattern: str, text: str) -> str:
    return re.findall(pattern, text)[-1]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def table(results: dict[str, dict[tuple[int, int], dict]]) -> str:
    """Summary in Markdown of the results by variant, and there by fold and seed; the first variant is the reference."""
    names = [name for name in results if results[name]]
    if not names:
        return "No results yet."
    reference, rows, p_values = results[names[0]], [], []
    for name in names:
        runs = results[name]
        row = [name, len(runs)]
        for metric in METRICS:
            values = [x[metric] for x in runs.values()]
            row.append(
                f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.1f}"
            )
        pairs = [key for key in runs if key in reference]
        for metric in ("segm/AP", "bbox/AP"):
            row.append("")
            if name != names[0] and len(pairs) > 1:
                differences = [runs[key][metric] - reference[key][metric] for key in pairs]
                test = stats.ttest_1samp(differences, 0)
                interval = test.confidence_interval(0.95)
                row[-1] = f"{statistics.mean(differences):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
                if metric == "segm/AP":
                    p_values.append((len(rows), float(test.pvalue)))
        row.append("")
        row += [
            f"{statistics.median(x[key] for x in runs.values()):.3g}" for key in ("train_seconds", "seconds_per_image")
        ]
        rows.append(row)
    for (i, _), p in zip(p_values, holm([p for _, p in p_values])):
        rows[i][-3] = f"{p:.2g}"
    headers = [
        "variant",
        "runs",
        *METRICS,
        "segm/AP - first",
        "bbox/AP - first",
        "p (Holm)",
        "s to train",
        "s an image",
    ]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", nargs=3, action="append", required=True, metavar=("NAME", "ANNOTATIONS.json", "IMAGE_ROOT")
    )
    parser.add_argument("--folds", type=int, default=0, help="pool the datasets and divide them into so many folds")
    parser.add_argument("--stratify", metavar="KEY", help="key of the image records of which every fold has its share")
    parser.add_argument("--train", nargs="+", default=[], metavar="NAME", help="without --folds: datasets to train on")
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME", help="without --folds: datasets to test on")
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        metavar=("NAME", "KEY VALUE"),
        help=f"mask_rcnn, {', '.join(MNC_VARIANTS)}, or a name of your own with overrides; repeatable",
    )
    parser.add_argument("--mnc-config", default="quickstart/mnc_efficientnet_lite0_FPN.yaml")
    parser.add_argument("--mask-rcnn-config", default="quickstart/mask_rcnn_efficientnet_lite0_FPN.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("output/compare"), help="logs of the runs")
    parser.add_argument("--results", type=Path, help="file of results; OUTPUT/results.jsonl if not given")
    parser.add_argument("--keep-checkpoints", action="store_true", help="else they are deleted after the evaluation")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs that override the config of every run")
    return parser


def main() -> None:
    options = argument_parser().parse_args()
    file = options.results or options.output / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = plan_runs(options)
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results = {run.variant.name: {} for run in runs}
    settings = {run.variant.name: settings_of(run, options) for run in runs}
    for record in records:
        name = record["variant"]
        if name in settings and record["settings"] != settings[name]:
            raise ValueError(f"{file} has runs of {name} with other settings; give another file with --results")
        if name in settings and (record["fold"], record["seed"]) in {(x.fold, x.seed) for x in runs}:
            results[name][record["fold"], record["seed"]] = record["metrics"]

    cores = queue.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(options.jobs):
        # Without a core of its own for each, none is tied to one.
        cores.put(available[job] if options.jobs <= len(available) and not torch.cuda.is_available() else None)
    with ThreadPoolExecutor(options.jobs) as pool:
        missing = [run for run in runs if (run.fold, run.seed) not in results[run.variant.name]]
        futures = {pool.submit(train, run, options, cores): run for run in missing}
        failed = []
        for future in as_completed(futures):
            run = futures[future]
            if future.exception() is not None:
                failed.append(f"{run.name}: {future.exception()}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            metrics = future.result()
            results[run.variant.name][run.fold, run.seed] = metrics
            record = {"variant": run.variant.name, "fold": run.fold, "seed": run.seed, "metrics": metrics}
            with open(file, "a") as lines:
                lines.write(json.dumps({**record, "settings": settings[run.variant.name]}) + "\n")
            print(json.dumps(record), flush=True)
    print(table(results))
    if failed:
        sys.exit(f"{len(failed)} of {len(missing)} runs failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
