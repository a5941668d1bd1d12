"""What watches the training of a tokenizer: held-out PSNR, the best tokenizer so far, an alarm when it falls.

An adversarial run can ruin a tokenizer in minutes, and a loss does not show it. It changes nothing in what it
watches: no weights, buffers, random numbers or training flags. Knows nothing of losses.

Legend: B batch, N pictures, C H W picture, h w grid, Q depth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vq.data import ImageData, PictureSet
from vq.images import from_bytes
from vq.learner import TokenizerLearner
from vq.metrics import CodeUse
from vq.tokenizer import ImageTokenizer
from vqlm.evaluation import undisturbed
from vqlm.files import new_folder, write_json, write_text
from vqlm.training import read_log

AT_ONCE = 64  # pictures measured together
RECORD = "watch.json"  # in best/: which batch it is of, and what was measured


class NoWatch(L.Callback):
    """The null member: nobody watches. Also what `vq-train` calls, in this order."""

    def look_at(self, images: ImageData, out: Path) -> None:
        """Before training, after the pictures were read: what to measure on, and where to write."""

    def conclude(self, tokenizer: ImageTokenizer) -> dict[str, Any]:
        """After training: the final tokenizer beside the best one. What metrics.json says under "watch"."""
        return {}

    def verdict(self) -> str:
        """After `conclude`: a warning for the last lines of a run, or ""."""
        return ""


class Watch(NoWatch):
    """Measures some held-out pictures every so many batches; writes `out`/watch.jsonl and `out`/best/.

    every: batches between two measurements; the last batch is measured too. pictures: how many, spread evenly over
    the held-out ones (the training pictures where none are held out), always the same. tolerance: by how many dB
    PSNR may fall below the best before it is said, once for each fall.

    PSNR is measured in fp32 through the codes, on the weights that would be saved (the averaged ones, where an average
    is taken); not during a continuous warm-up, which has no codes to compare by. The best tokenizer lies in best/,
    loadable at any time; the final one takes its place if it is as good. A resumed run goes on with the best and the
    alarms of the batches that it keeps.
    """

    def __init__(self, every: int = 200, pictures: int = 64, tolerance: float = 1.0):
        if every < 1 or pictures < 1 or tolerance <= 0:
            raise ValueError(
                f"every={every} and pictures={pictures} must be at least 1, tolerance={tolerance} positive; "
                "to watch nothing, choose watch=none"
            )
        self.every, self.count, self.tolerance = every, pictures, tolerance
        self.sets: list[PictureSet] = []
        self.split = "heldout"
        self.out = Path()
        self.entries: list[dict[str, Any]] = []
        self.final: float | None = None

    def look_at(self, images: ImageData, out: Path) -> None:
        self.split = "heldout" if any(map(len, images.heldout_sets)) else "train"
        if self.split == "train":
            print("watch: no pictures are held out, PSNR is watched on training pictures")
        self.sets = spread(images.heldout_sets if self.split == "heldout" else images.train_sets, self.count)
        self.out = Path(out)

    @property
    def best(self) -> dict[str, Any]:
        """The entry with the highest PSNR; the first of equals."""
        return max(self.entries, key=lambda entry: entry["psnr"])

    @property
    def fallen(self) -> bool:
        """Whether the last measurement lies more than the tolerance below the best."""
        return bool(self.entries) and self.entries[-1]["psnr"] < self.best["psnr"] - self.tolerance

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TokenizerLearner)
        self._read()
        self.entries = [entry for entry in self.entries if entry["batch"] <= pl_module.batches_seen]
        if self._log.is_file():  # later entries, or a last line cut short, may be in it
            write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TokenizerLearner)
        if pl_module.progress < pl_module.continuous:
            return
        if pl_module.batches_seen % self.every == 0 or pl_module.progress >= 1:
            self._look(pl_module)

    def _look(self, learner: TokenizerLearner) -> None:
        model: Any = learner.result
        level, used = measure(model, self.sets)
        entry = {"batch": learner.batches_seen, "samples": learner.samples_seen, "psnr": level}
        entry["codes_in_use"] = used
        had_fallen, better = self.fallen, not self.entries or level > self.best["psnr"]
        self.entries.append(entry)
        entry["alarm"] = self.fallen and not had_fallen
        if better:
            self._keep(model, entry)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["alarm"]:
            print(f"\nwatch: {self._fall(entry['batch'], level, self.best)}", file=sys.stderr)

    def _keep(self, model: ImageTokenizer, entry: dict[str, Any]) -> None:
        with new_folder(self.out / "best") as part:
            model.save_pretrained(part)
            write_json(part / RECORD, {**entry, "split": self.split})

    def _fall(self, batch: int, level: float, best: dict[str, Any]) -> str:
        return (
            f"{self._what} fell to {level:.2f} dB at batch {batch}, {best['psnr'] - level:.2f} dB below the best "
            f"({best['psnr']:.2f} dB at batch {best['batch']}, kept in {self.out / 'best'})"
        )

    @property
    def _what(self) -> str:
        return "held-out PSNR" if self.split == "heldout" else "PSNR on training pictures"

    @property
    def _log(self) -> Path:
        return self.out / "watch.jsonl"

    def _read(self) -> None:
        self.entries = read_log(self._log) if self._log.is_file() else []

    def conclude(self, tokenizer: ImageTokenizer) -> dict[str, Any]:
        self._read()
        self.final, used = measure(tokenizer, self.sets)
        best = self._kept()
        if best is None or self.final >= best["psnr"]:
            last = self.entries[-1] if self.entries else {"batch": 0, "samples": 0}
            self._keep(tokenizer, {**last, "psnr": self.final, "codes_in_use": used, "alarm": False})
        found = {
            "split": self.split,
            "pictures": sum(map(len, self.sets)),
            "tolerance": self.tolerance,
            "final": self.final,
            "alarms": [entry["batch"] for entry in self.entries if entry["alarm"]],
        }
        if best := self._kept():
            found |= {"best": best["psnr"], "best_batch": best["batch"], "worse": self._worse(best)}
        return {"watch": found}

    def _kept(self) -> dict[str, Any] | None:
        """What best/ says of itself: after a kill it may be of a batch that was done again, and came out otherwise."""
        path = self.out / "best" / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _worse(self, best: dict[str, Any]) -> bool:
        return self.final is not None and self.final < best["psnr"] - self.tolerance

    def verdict(self) -> str:
        best = self._kept()
        if not best or self.final is None or not self._worse(best):
            return ""
        return (
            f"the final tokenizer is worse than an earlier one: {self._what} {self.final:.2f} dB, the best was "
            f"{best['psnr']:.2f} dB at batch {best['batch']}, kept in {self.out / 'best'}. A discriminator trades PSNR "
            "for sharpness: look at pictures of both (vq-evaluate) before you choose"
        )


def spread(sets: Sequence[PictureSet], count: int) -> list[PictureSet]:
    """At most `count` pictures, evenly over all sets together; sets that none is taken from are left out."""
    total = sum(map(len, sets))
    chosen = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()
    found, start = [], 0
    for pictures in sets:
        here = chosen[(chosen >= start) & (chosen < start + len(pictures))] - start
        start += len(pictures)
        if len(here):
            found.append(pictures.select(here))
    return found


def measure(tokenizer: ImageTokenizer, sets: Sequence[PictureSet]) -> tuple[float, list[int] | None]:
    """Mean PSNR in dB over all pictures, and the number of distinct codes per depth (None without codes).

    PSNR as in `vq.metrics.psnr`, but from 0 dB (the largest error there is, which reconstructions that are not finite
    count as) to 100 dB. Leaves the tokenizer, and the random numbers, as they were.
    """
    levels: list[Tensor] = []
    use = CodeUse(tokenizer.depth, tokenizer.codebook_size) if tokenizer.depth else None
    device = next(tokenizer.parameters()).device
    with undisturbed(tokenizer, device):
        for pictures in sets:
            for bytes_BCHW in pictures.x_NCHW.split(AT_ONCE):
                x_BCHW = from_bytes(bytes_BCHW).to(device)
                made = tokenizer(x_BCHW)
                errors_B = (made.x_BCHW.clamp(-1, 1) - x_BCHW).square().flatten(1).mean(1).cpu().double()
                levels.append(10 * torch.log10(4 / errors_B.nan_to_num(4.0).clamp(4e-10, 4.0)))
                if use is not None and made.quantized.codes_BhwQ is not None:
                    use.update(made.quantized.codes_BhwQ.cpu())
    used = None if use is None else [int(n) for n in (use.counts_QK > 0).sum(1)]
    return float(torch.cat(levels).mean()), used
