"""The logs of runs as curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from vqlm.files import new_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NOT_LOSSES = (
    "batch",
    "samples",
    "minutes",
    "rate",
    "loss",
    "replaced",
    "adversary_balance",
    "adversary_real",
    "adversary_fake",
    "adversary_skipped",
)


def plot_losses(logs: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """One panel for each run: every number of its log.jsonl that is a loss, over minutes. logs: title → entries.

    The scale is logarithmic where all losses are positive. A discriminator's own numbers are left out.
    """
    figure, panels = plt.subplots(1, len(logs), figsize=(5.5 * len(logs), 3.6), squeeze=False)
    for axes, (title, entries) in zip(panels[0], logs.items(), strict=True):
        names = sorted({k for e in entries for k in e if not k.startswith(NOT_LOSSES)})
        for name in names:
            points = [(e["minutes"], e[name]) for e in entries if name in e]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        positive = all(e[name] > 0 for e in entries for name in names if name in e)
        axes.set(title=title, xlabel="minutes of training", yscale="log" if positive else "symlog")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def plot_cells(figures: dict[str, dict[str, list[float]]], path: str | Path) -> None:
    """One panel for each figure: cells from left to right, a dot for each seed, a bar at their mean.

    figures: figure → cell → a number for each seed.
    """
    shown = {name: by_cell for name, by_cell in figures.items() if by_cell}
    columns = min(3, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        max(1, rows), columns, figsize=(4.2 * columns, 3.1 * max(1, rows)), squeeze=False
    )
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (name, by_cell) in zip(panels.flat, shown.items(), strict=False):
        for x, values in enumerate(by_cell.values()):
            axes.plot([x] * len(values), values, "o", color="C0", markersize=4, alpha=0.7)
            axes.hlines(sum(values) / len(values), x - 0.3, x + 0.3, color="C1", linewidth=2)
        turned = sum(map(len, by_cell)) > 30
        axes.set_xticks(range(len(by_cell)), list(by_cell), fontsize=8, rotation=30 if turned else 0)
        if turned:
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        axes.set_xlim(-0.6, len(by_cell) - 0.4)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=100)
    plt.close(figure)


def stack(pictures: dict[str, Path], path: str | Path, width: int = 1000) -> None:
    """Pictures below one another, each under its name, in one width (pixels). Of a tall one the upper part is shown."""
    from PIL import Image, ImageDraw

    line = 22
    opened = []
    for file in pictures.values():
        with Image.open(file) as image:
            opened.append(image.convert("RGB"))
    scaled = [each.resize((width, max(1, round(each.height * width / each.width)))) for each in opened]
    scaled = [each.crop((0, 0, width, min(each.height, width // 2))) for each in scaled]
    sheet = Image.new("RGB", (width, sum(each.height + line for each in scaled)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, each in zip(pictures, scaled, strict=True):
        draw.text((6, top + 5), name, fill="black", font_size=13)
        sheet.paste(each, (0, top + line))
        top += each.height + line
    with new_file(path) as part:
        sheet.save(part, format="PNG")
