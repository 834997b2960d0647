"""The drawings of a report, as pictures that a page holds in itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .analysis import CocoAnalysis

_STAGE = re.compile(r"_s(\d+)$")


def embed_figure(figure: Figure) -> str:
    """Return a figure as a ``data:`` address."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _address("image/svg+xml", file.getvalue())


def embed_picture(picture: np.ndarray) -> str:
    """Return a picture, uint8 (H, W, 3), RGB, as a ``data:`` address."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=88)
    return _address("image/jpeg", file.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def plot_learning_curves(metrics: Sequence[dict]) -> Figure:
    """Draw the losses of every stage, and the AP of the evaluations, over the iterations.

    Args:
        metrics: lines of ``metrics.json``.
    """
    stages: dict[str, list[str]] = {}
    for name in sorted({name for line in metrics for name in line if name.startswith("loss_")}):
        found = _STAGE.search(name)
        title = f"stage {found[1]}" if found else "stage 1" if name.startswith("loss_rpn") else "losses"
        stages.setdefault(title, []).append(name)
    aps = sorted(
        {name for line in metrics for name in line if re.fullmatch(r"(.*/)?(segm|bbox|sds)/(AP|mAPr@50)", name)}
    )
    panels = {**dict(sorted(stages.items())), **({"AP" if aps else "": aps} if aps else {})}
    figure = Figure(figsize=(3.4 * min(len(panels), 3), 2.6 * -(-len(panels) // 3)), layout="constrained")
    for i, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(len(panels), 3), i)
        for name in names:
            points = [(line["iteration"], line[name]) for line in metrics if name in line]
            axes.plot(*zip(*points), marker="." if len(points) < 10 else None, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, 1.03 * metrics[-1]["iteration"])
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    return figure


def plot_precision_recall(analysis: CocoAnalysis, class_names: Sequence[str]) -> Figure:
    """Draw precision over recall at IoU 0.5, of each class and, in black, of their mean."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    known = [i for i in range(len(class_names)) if (analysis.precision[i] > -1).all()]
    for i in known:
        axes.plot(analysis.recall, analysis.precision[i], linewidth=0.9, label=class_names[i])
    if known:
        axes.plot(analysis.recall, analysis.precision[known].mean(axis=0), "k", linewidth=2, label="mean")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    if len(known) <= 20:
        axes.legend(fontsize=7)
    return figure


def plot_confusion(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix, each row as shares of its sum, with the counts in it where there is room."""
    names, size = [*class_names, "none"], len(counts)
    side = min(max(3.2, 0.45 * size), 16)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), names, rotation=90, fontsize=7)
    axes.set_yticks(range(size), names, fontsize=7)
    axes.set(xlabel="predicted", ylabel="annotated")
    if size <= 25:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    return figure


def plot_reliability(rows: Sequence[tuple[float, float, int]]) -> Figure:
    """Draw the share of true positives over the score, and the number of predictions under it."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="0.7", linewidth=1)
    if rows:
        scores, shares, numbers = zip(*rows)
        above.plot(scores, shares, marker="o")
        below.bar(scores, numbers, width=0.07)
        below.set_yscale("log")
    above.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    below.set(xlabel="score", ylabel="number")
    return figure
