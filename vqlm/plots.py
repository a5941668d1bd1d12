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
