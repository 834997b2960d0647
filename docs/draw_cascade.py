"""Draw the five stages of the cascade: docs/cascade.svg.

python docs/draw_cascade.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

STAGE, DATA, GRADIENT = "#dbe9f6", "#f4f1e8", "#c0392b"


def draw_box(axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A box with its lower left corner at (x, y) and text in the middle."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec="#555555")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def draw_arrow(axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **style) -> None:
    style = {"color": "#333333", "linewidth": 1.2, **style}
    shape = FancyArrowPatch(
        start,
        end,
        connectionstyle=f"arc3,rad={bend}",
        arrowstyle="-|>",
        mutation_scale=11,
        shrinkA=0,
        shrinkB=0,
        **style,
    )
    axes.add_patch(shape)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "cascade", "font.family": "DejaVu Sans", "svg.fonttype": "path"})
    figure, axes = plt.subplots(figsize=(14.4, 4.6))
    axes.set(xlim=(0, 14.4), ylim=(0, 4.6))
    axes.axis("off")

    draw_box(axes, 0.1, 2.0, 1.0, 0.9, "image", DATA)
    draw_box(axes, 1.6, 2.0, 1.5, 0.9, "backbone:\nshared features", DATA)
    stages = [
        (3.6, "stage 1\nboxes\n(CausalRPN)"),
        (5.85, "stage 2\nmasks\n(mask head)"),
        (8.1, "stage 3\ncategories, boxes\n(classifier)"),
        (10.35, "stage 4\nmasks\n(mask head)"),
        (12.6, "stage 5\ncategories, boxes\n(classifier)"),
    ]
    for x, text in stages:
        draw_box(axes, x, 1.9, 1.6, 1.1, text, STAGE)
    draw_arrow(axes, (1.12, 2.45), (1.58, 2.45))
    draw_arrow(axes, (3.12, 2.45), (3.58, 2.45))
    for (x, _), label in zip(stages, ("boxes", "masks", "boxes", "masks")):
        draw_arrow(axes, (x + 1.62, 2.45), (x + 2.23, 2.45))
        axes.text(x + 1.92, 2.55, label, ha="center", fontsize=8)

    # Features of every box, by RoI warp.
    axes.plot([2.35, 2.35, 13.4], [2.92, 3.6, 3.6], color="#333333", linewidth=1.2)
    axes.text(2.5, 3.68, "features of each box, by RoI warp", fontsize=8)
    for x, _ in stages[1:]:
        draw_arrow(axes, (x + 0.8, 3.6), (x + 0.8, 3.02))
    for x, _ in (stages[2], stages[4]):
        axes.text(x + 0.86, 3.22, "under the mask", fontsize=7.5, color="#555555")
    for (start, _), (end, _), text in (
        (stages[1], stages[2], "pass 1"),
        (stages[3], stages[4], "pass 2: same weights"),
    ):
        axes.plot([start, end + 1.6], [4.1, 4.1], color="#888888", linewidth=1)
        axes.text((start + end + 1.6) / 2, 4.18, text, ha="center", fontsize=8.5, color="#555555")

    # What later losses tell earlier stages.
    for (x, _), (following, _) in zip(stages, stages[1:]):
        draw_arrow(axes, (following + 0.6, 1.88), (x + 1.0, 1.88), bend=-0.35, color=GRADIENT, linestyle=(0, (4, 2)))
    text = "causal gradients: the loss of a stage\nreaches the boxes and masks it was given"
    axes.text(4.9, 0.85, text, ha="center", fontsize=8.5, color=GRADIENT)

    draw_box(axes, 8.1, 0.15, 6.1, 0.6, "mask voting of the candidates of both passes: instances", DATA)
    for x in (8.9, 13.4):
        draw_arrow(axes, (x, 1.88), (x, 0.78), color="#888888")

    path = Path(__file__).with_name("cascade.svg")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
