"""Heads on one trunk, what a picture may see of itself, what the loss counts: same data, trunk and number of batches.

    python benchmarks/heads.py                            # makes a store, then five runs: about 25 minutes on 2 cores
    python benchmarks/heads.py --store DIR --size gpu --batches 20000
    python benchmarks/heads.py --compare attention        # causal against bidirectional pictures, on captioning
    python benchmarks/heads.py --compare loss             # over the ids that may follow, or over the whole vocabulary

Predictions, to be held against the tables that are printed:
    heads      Image bits a picture: flat below depth_transformer below layered below delayed below parallel. Flat
               spends a pass of the trunk on every code; parallel draws the codes of a cell as if they did not depend on
               one another. Seconds a picture: parallel and layered least, then delayed, depth_transformer, flat; flat
               trains slowest.
    attention  A picture that is read as a whole is captioned better than one that is read from its upper left corner
               on: fewer bits a text token, higher word F1, on training pictures more than on held-out ones.
    loss       Over the legal ids a picture costs no more bits than over the whole vocabulary, and a step less time.
               (Both are measured over the legal ids.)

Every cell is `lm-train` in a process of its own with a few overrides. Drawing is then timed on the bundles that they
left, one picture and sixteen at a time, cells taking turns. Batches are equal, minutes are not: the table says how many
codes a second each learns.
A finished cell is not run again; remove its folder, or name another --folder, to repeat it.
One seed says little about differences of a few bits: --seeds 3 shows the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from lm.pipeline import Pipeline
from vq.store import CodeStore
from vqlm.files import write_json

HEADS = {
    "flat": ["layout=flat", "head=linear"],
    "parallel": ["layout=stacked", "head=parallel"],
    "delayed": ["layout=delayed", "head=parallel"],
    "layered": ["layout=stacked", "head=layered"],
    "depth_transformer": ["layout=stacked", "head=depth_transformer"],
}
# A picture that is read as a whole cannot be learnt as well: neither cell learns any.
CAPTIONING = ["layout=stacked", "head=parallel", "learner.objective.image=0"]
CAPTIONING += ["mixture.text_to_image=0", "mixture.image_to_text=1"]
ATTENTION = {name: [*CAPTIONING, f"picture_attention={name}"] for name in ("causal", "bidirectional")}
LOSSES = {name: ["layout=stacked", f"objective={name}"] for name in ("legal", "full_vocabulary")}
COMPARE = {"heads": HEADS, "attention": ATTENTION, "loss": LOSSES}
TOGETHER = (1, 16)  # pictures drawn at a time
ROUNDS = 3
PREDICTED = ("flat", "depth_transformer", "layered", "delayed", "parallel")  # from few bits to many


# --- runs -------------------------------------------------------------------------------------------------------


def make_store(asked: argparse.Namespace) -> Path:
    """A tokenizer and a store of the default pictures (a toy set for a smoke test), made once in the folder."""
    folder = asked.folder / "data"
    size = "smoke" if asked.size == "smoke" else "laptop"
    images = f"images={'shapes' if asked.size == 'smoke' else 'openmoji'}"
    run("vq.train", [images, f"vq_size={size}", f"out={folder / 'tokenizer'}"])
    tokenizer = folder / "tokenizer" / "tokenizer"
    run("vq.encode", [images, f"tokenizer={tokenizer}", f"out={folder / 'store'}"])
    return folder / "store"


def run(module: str, told: list[str]) -> None:
    """A command in a process of its own; one that was cut short goes on."""
    print(f"\n=== {module} {' '.join(told)}", flush=True)
    # huge pages for large buffers: faster training on a CPU, and nothing elsewhere
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    subprocess.run([sys.executable, "-m", module, *told], check=True, env=environment)


def cell(name: str, asked: argparse.Namespace, store: CodeStore, seed: int) -> dict[str, Any]:
    """One run, trained and measured; read from its folder if that was done before."""
    out = asked.folder / asked.compare / f"{name}-{seed}"
    told = [*COMPARE[asked.compare][name], f"lm_size={asked.size}", f"seed={seed}"]
    told += [f"learner.budget.batches={asked.batches}", "learner.budget.minutes=0"]
    told += [f"train_captions={asked.captions}", f"heldout_captions={asked.captions}"]
    done, settings = out / "heads.json", {"lm-train": told, "store": store.digest}
    if done.is_file():
        kept = json.loads(done.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["found"]
        raise SystemExit(f"{done} was made with other settings: remove {out}, or name another --folder")
    run("lm.train", [*told, f"store={store.folder}", f"out={out}"])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    seconds = 60 * metrics["run"]["minutes"]
    found = {split: metrics[split] for split in ("train", "heldout") if split in metrics}
    found |= {"run": metrics["run"], "documents_per_second": metrics["run"]["documents"] / seconds}
    found["codes_per_second"] = found["documents_per_second"] * codes_of(store)
    write_json(done, {"settings": settings, "found": found})
    return found


def codes_of(store: CodeStore) -> float:
    """Codes of a picture, on average."""
    counts = [codes.numel() for codes in store.codes_list("train")]
    return mean(counts)


def drawing_seconds(names: list[str], asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds a picture of each cell's model: the median of rounds, in which the cells take turns."""
    pipelines = {
        name: Pipeline.from_pretrained(asked.folder / asked.compare / f"{name}-0" / "model") for name in names
    }
    taken: dict[str, dict[int, list[float]]] = {name: {n: [] for n in TOGETHER} for name in names}
    for turn in range(ROUNDS + 1):
        for name, pipeline in pipelines.items():
            for n in TOGETHER:
                start = time.perf_counter()
                pipeline.decode(pipeline.draw_codes("a red circle", n, pipeline.sampling, turn))
                if turn:  # the first one warms up
                    taken[name][n].append((time.perf_counter() - start) / n)
    return {name: {str(n): median(each) for n, each in found.items()} for name, found in taken.items()}


# --- the tables -------------------------------------------------------------------------------------------------


def over(runs: list[dict[str, Any]], *path: str) -> float:
    """The mean over seeds of one number."""
    values = []
    for value in runs:
        for key in path:
            value = value[key]
        values.append(float(value))  # type: ignore[arg-type]
    return mean(values)


def heads_table(cells: dict[str, list[dict[str, Any]]], seconds: dict[str, dict[str, float]]) -> str:
    lines = [
        f"{'':18}{'bits a picture':^20}{'in ten nearest':^20}{'caption F1':^16}{'codes/s':>9}{'seconds a picture':>20}",
        f"{'':18}"
        + f"{'train':>10}{'held out':>10}" * 2
        + f"{'train':>8}{'held':>8}{'trained':>9}{'1':>10}{'16':>10}",
    ]
    for name, runs in cells.items():
        bits = [over(runs, split, "image_bits_per_picture") for split in ("train", "heldout")]
        near = [over(runs, split, "drawing", "among_ten_nearest") for split in ("train", "heldout")]
        words = [over(runs, split, "captioning", "word_f1") for split in ("train", "heldout")]
        lines.append(
            f"{name:18}"
            + "".join(f"{each:>10.1f}" for each in bits)
            + "".join(f"{100 * each:>9.1f}%" for each in near)
            + "".join(f"{each:>8.2f}" for each in words)
            + f"{over(runs, 'codes_per_second'):>9.0f}"
            + "".join(f"{seconds[name][str(n)]:>10.3f}" for n in TOGETHER)
        )
    return "\n".join(lines)


def attention_table(cells: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':18}{'text bits':^20}{'word F1':^20}{'to the letter':^20}"]
    lines.append(f"{'':18}" + f"{'train':>10}{'held out':>10}" * 3)
    for name, runs in cells.items():
        paths = (("text_bits",), ("captioning", "word_f1"), ("captioning", "exact"))
        numbers = [over(runs, split, *path) for path in paths for split in ("train", "heldout")]
        lines.append(f"{name:18}" + "".join(f"{each:>10.3f}" for each in numbers))
    return "\n".join(lines)


def verdict(compare: str, cells: dict[str, list[dict[str, Any]]]) -> str:
    if set(cells) != set(COMPARE[compare]):
        return "the prediction is about all cells: some were left out"
    if compare == "heads":
        values = [over(cells[name], "heldout", "image_bits_per_picture") for name in PREDICTED]
        holds = all(a < b for a, b in pairwise(values))
        told = ", ".join(f"{name} {value:.1f}" for name, value in zip(PREDICTED, values, strict=True))
        return f"prediction: bits of a held-out picture rise in this order: {told}: {said(holds)}"
    if compare == "loss":
        values = [over(cells[name], "heldout", "image_bits_per_picture") for name in LOSSES]
        speed = [over(cells[name], "codes_per_second") for name in LOSSES]
        holds = values[0] <= values[1] and speed[0] > speed[1]
        return (
            "prediction: the loss over legal ids costs no bits of a held-out picture, and saves time: "
            f"{values[0]:.1f} beside {values[1]:.1f} bits, {speed[0]:.0f} beside {speed[1]:.0f} codes/s: {said(holds)}"
        )
    bits = {name: over(runs, "heldout", "text_bits") for name, runs in cells.items()}
    words = {name: over(runs, "heldout", "captioning", "word_f1") for name, runs in cells.items()}
    holds = bits["bidirectional"] < bits["causal"] and words["bidirectional"] > words["causal"]
    return (
        "prediction: held-out captions cost fewer bits, and share more words, when pictures are read as a whole: "
        f"{bits['causal']:.3f} → {bits['bidirectional']:.3f} bits, {words['causal']:.3f} → "
        f"{words['bidirectional']:.3f} F1: {said(holds)}"
    )


def said(holds: bool) -> str:
    return "it holds" if holds else "it does NOT hold"


def machine() -> dict[str, Any]:
    facts = {"system": platform.system(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {**facts, "torch": version("torch"), "transformers": version("transformers")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Heads, or picture attention, on one trunk: quality and speed."
    )
    parser.add_argument("--compare", choices=COMPARE, default="heads")
    parser.add_argument("--cells", nargs="+", help="default: all of them")
    parser.add_argument("--store", type=Path, help="a store; one is made where none is named")
    parser.add_argument(
        "--size", choices=("smoke", "laptop", "gpu"), default="laptop", help="lm_size of lm-train"
    )
    parser.add_argument("--batches", type=int, default=400, help="of each run (default 400)")
    parser.add_argument(
        "--captions", type=int, default=64, help="drawn and written of each split (default 64)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell (default 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/heads"), help="where the runs are kept")
    default = Path(__file__).parent / "results"
    parser.add_argument(
        "--out", type=Path, nargs="?", const=default, help="also write COMPARE.json into this folder"
    )
    asked = parser.parse_args()
    if min(asked.batches, asked.captions, asked.seeds) < 1:
        parser.error("--batches, --captions and --seeds: at least 1")
    names = asked.cells or list(COMPARE[asked.compare])
    if unknown := [name for name in names if name not in COMPARE[asked.compare]]:
        parser.error(f"--cells {unknown[0]}: choose from {', '.join(COMPARE[asked.compare])}")
    store = CodeStore.open(asked.store or make_store(asked))
    cells = {name: [cell(name, asked, store, seed) for seed in range(asked.seeds)] for name in names}
    seconds = {} if asked.compare == "attention" else drawing_seconds(names, asked)
    print(f"\n{attention_table(cells) if asked.compare == 'attention' else heads_table(cells, seconds)}")
    print(verdict(asked.compare, cells), flush=True)
    if asked.out:
        told = {
            "machine": machine(),
            "size": asked.size,
            "batches": asked.batches,
            "captions": asked.captions,
        }
        told |= {"store": store.digest, "grids": store.grids, "depth": store.depth}
        told |= {"cells": cells, "seconds_a_picture": seconds, "verdict": verdict(asked.compare, cells)}
        write_json(asked.out / f"{asked.compare}.json", told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
