"""The ablation of the paper's Table 1 in small: how the cascade is trained, with 5-stage inference throughout.

    python tests/benchmarks/ablation.py --train train.json images/ --val val.json images/ [KEY VALUE ...]

trains configs/quickstart/mnc_R_18_FPN.yaml step-wise (no gradient from a stage to those before it), end to end with 3
stages and end to end with 5, with each seed, one after another by train_net.py, and prints mean and standard deviation
over the seeds. A run whose results are in the output folder already is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_GRADIENT = [
    *("MODEL.MNC.PROPOSAL_GRADIENT", "False"),
    *("MODEL.MNC.BOX_GRADIENT", "False"),
    *("MODEL.MNC.MASK_GRADIENT", "none"),
]
ROWS = {
    "3-stage, step-wise": ["MODEL.MNC.NUM_PASSES_TRAIN", "1", *NO_GRADIENT],
    "3-stage, end to end": ["MODEL.MNC.NUM_PASSES_TRAIN", "1"],
    "5-stage, end to end": ["MODEL.MNC.NUM_PASSES_TRAIN", "2"],
}
METRICS = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP")


def run(overrides: Sequence[str], options: argparse.Namespace, seed: int, output: Path) -> dict[str, float]:
    """Train and evaluate once; return the metrics that Detectron2 wrote last, and seconds."""
    results = output / "ablation.json"
    settings = [list(overrides), options.train, options.val, options.iterations, options.opts]
    if results.exists() and json.loads(results.read_text())["settings"] != settings:
        raise ValueError(f"{output} holds a run with other settings; delete it or give another --output")
    if not results.exists():
        command = [sys.executable, str(ROOT / "train_net.py")]
        command += ["--config-file", str(ROOT / "configs" / "quickstart" / "mnc_R_18_FPN.yaml")]
        command += ["--dataset", "ablation_train", *options.train, "--dataset", "ablation_val", *options.val]
        command += ["DATASETS.TRAIN", "('ablation_train',)", "DATASETS.TEST", "('ablation_val',)"]
        command += ["SOLVER.MAX_ITER", str(options.iterations), "SEED", str(seed), "OUTPUT_DIR", str(output)]
        command += ["VIS_PERIOD", "0", "TEST.NUM_PICTURES", "0", "MODEL.MNC.NUM_PASSES_TEST", "2"]
        output.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(output / "stdout.txt", "w") as log:
            subprocess.run([*command, *overrides, *options.opts], check=True, stdout=log, stderr=subprocess.STDOUT)
        last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
        values = {metric: last[metric] for metric in METRICS}
        # Written last: only a run that was finished counts.
        results.write_text(json.dumps({"settings": settings, **values, "seconds": time.perf_counter() - start}))
    return {name: value for name, value in json.loads(results.read_text()).items() if name != "settings"}


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Mean and standard deviation of each metric, by row, in Markdown."""
    lines = ["| training | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for row, runs in results.items():
        cells = []
        for metric in METRICS:
            values = [x[metric] for x in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--train", "--val"):
        parser.add_argument(name, nargs=2, required=True, metavar=("ANNOTATIONS.json", "IMAGE_ROOT"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config of every run")
    options = parser.parse_args()

    results = {row: [] for row in ROWS}
    # Seed by seed, so that what is there after an interruption compares all rows.
    for seed in options.seeds:
        for row, overrides in ROWS.items():
            folder = options.output / f"{row.replace(',', '').replace(' ', '_')}_seed_{seed}"
            results[row].append(run(overrides, options, seed, folder))
            print(json.dumps({"training": row, "seed": seed, **results[row][-1]}), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
