"""Numbers of a tokenizer run as pictures. Knows no tokenizer: counts come in."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from vqlm.files import new_file

COLUMNS = 4  # panels beside each other; deeper codes go on below


def plot_code_use(counts: dict[str, Tensor], path: Path) -> None:
    """How often each code occurs, most used first, one panel for each depth. counts: split → (Q,K)."""
    import matplotlib  # a second, which encoding and reading a store do not wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    depth = max(len(c) for c in counts.values())
    rows, columns = math.ceil(depth / COLUMNS), min(depth, COLUMNS)
    size = (3.2 * columns, 3 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for d, axes in enumerate(grid.flat):
        if d >= depth:
            axes.set_visible(False)
            continue
        for split, counts_QK in counts.items():
            share = counts_QK[d].double().sort(descending=True).values
            used = int((share > 0).sum())
            axes.plot(share / share.sum().clamp(min=1), label=f"{split}: {used} of {len(share)}")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_title(f"depth {d}")
        axes.set_xlabel("code, most used first")
        axes.legend(fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of positions")
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def plot_roc(scores: dict[str, dict[str, tuple[list[float], list[float]]]], path: Path) -> None:
    """Shares of sets called made, of the made ones over the real ones, as the bar is lowered: a panel for each title.

    scores: title → metric → scores of real and of made sets, the larger the likelier made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, len(scores), figsize=(4 * len(scores), 4), squeeze=False)
    for axes, (title, of_metrics) in zip(grid[0], scores.items(), strict=True):
        for name, (real, made) in of_metrics.items():
            bars = [math.inf, *sorted({*real, *made}, reverse=True)]
            points = [
                [sum(each >= bar for each in kind) / len(kind) for kind in (real, made)] for bar in bars
            ]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axes.set(title=title, xlabel="real sets called made", ylabel="made sets called made", aspect="equal")
    grid[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
