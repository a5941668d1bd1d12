"""Numbers of a tokenizer run as pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from torch import Tensor

from vqlm.files import new_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_code_use(counts: dict[str, Tensor], path: Path) -> None:
    """How often each code occurs, most used first, one panel for each depth. counts: split → (Q,K)."""
    depth = max(len(c) for c in counts.values())
    figure, panels = plt.subplots(1, depth, figsize=(3.2 * depth, 3), squeeze=False, sharey=True)
    for d, axes in enumerate(panels[0]):
        for split, counts_QK in counts.items():
            share = counts_QK[d].double().sort(descending=True).values
            used = int((share > 0).sum())
            axes.plot(share / share.sum().clamp(min=1), label=f"{split}: {used} of {len(share)}")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_title(f"depth {d}")
        axes.set_xlabel("code, most used first")
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("share of positions")
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
