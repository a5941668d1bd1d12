"""Command `lm-evaluate`: how well a bundle reads and draws the pictures of a store.

    lm-evaluate model=runs/lm/model store=runs/store

Leaves metrics.json and samples.png in `out`. `lm-train` ends with the same functions.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm import metrics
from lm.data import Pairs, open_store, read_pairs
from lm.pipeline import Pipeline, sheet
from lm.sequence import Image
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import write_json
from vqlm.hardware import Device


def evaluate(
    model: str,
    store: str,
    guidance: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    out: str,
    device: Device,
) -> None:
    """Measure a saved bundle on the store of its tokenizer."""
    if train_captions < 0 or heldout_captions < 0:
        raise ConfigError(
            f"train_captions={train_captions}, heldout_captions={heldout_captions}: not negative"
        )
    pipeline = Pipeline.from_pretrained(model, device)
    try:
        pipeline.sampling = pipeline.sampling_with(guidance, temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    report(pipeline, store, Path(out), train_captions, heldout_captions, seed)


def report(
    pipeline: Pipeline,
    store_folder: str,
    out: Path,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure; write metrics.json and samples.png; print a table. Returns the metrics.

    Drawn pictures are compared with the whole set as the image tokenizer reconstructs it: a store holds no pixels.
    """
    store = open_store(store_folder)
    store.check(pipeline.images)
    if store.grid != pipeline.model.form.grid:
        raise ConfigError(
            f"the store's pictures have {store.grid} cells, the model draws {pipeline.model.form.grid}"
        )
    result: dict[str, Any] = dict(extra or {})
    result["sampling"] = asdict(pipeline.sampling) | {"seed": seed}
    result["compared"] = "squared pixel distance to the set's reconstructions"
    splits = {split: read_pairs(store, split, pipeline.encode_text) for split in ("train", "heldout")}
    gallery, concepts = whole_set(pipeline, splits)
    pictures, labels, first = [], [], 0
    for split, count in (("train", train_captions), ("heldout", heldout_captions)):
        pairs = splits[split]
        place = list(range(first, first + len(pairs)))
        first += len(pairs)
        if not len(pairs) or not count:
            continue
        print(f"drawing {min(count, len(pairs))} {split} captions", flush=True)
        drawing, drawn, chosen = metrics.drawing(pipeline, gallery, pairs, place, concepts, seed, count)
        result[split] = {**metrics.losses(pipeline.model, pairs), "drawing": drawing}
        result[split]["captioning"] = metrics.captioning(pipeline, pairs, count)
        shown = metrics.spread(len(chosen), 32 if split == "train" else 16)
        pictures += pipeline.show(drawn[shown])
        labels += [pairs.texts[chosen[i]] + (" (held out)" if split == "heldout" else "") for i in shown]
    write_json(out / "metrics.json", result)
    if pictures:
        sheet(pictures, labels).save(out / "samples.png")
    print(table(result))
    return result


def whole_set(pipeline: Pipeline, splits: dict[str, Pairs]) -> tuple[Tensor, list[str]]:
    """Reconstructions (N,3,H,W) of every stored picture, training ones first, and their concepts."""
    pixels, concepts = [], []
    for pairs in splits.values():
        for codes in pairs.codes_NhwQ.split(256) if len(pairs) else ():
            pixels.append(pipeline.decode([Image(c) for c in codes]))
        concepts += pairs.concepts
    return torch.cat(pixels), concepts


def table(result: dict[str, Any]) -> str:
    """The numbers of metrics.json that a person reads first."""
    head = (
        "captions",
        "in ten nearest",
        "chance",
        "variant followed",
        "chance",
        "image bits",
        "text bits",
        "caption F1",
    )
    lines = [f"{'':10}" + "".join(f"{h:>18}" for h in head)]
    for split in ("train", "heldout"):
        if split not in result:
            continue
        m = result[split]
        d = m["drawing"]
        variant = (
            [f"{d['variant_followed']:.1%}", f"{d['variant_chance']:.1%}"] if "variants" in d else ["-", "-"]
        )
        cells = [str(d["captions"]), f"{d['among_ten_nearest']:.1%}", f"{d['chance']:.2%}", *variant]
        cells += [f"{m['image_bits']:.3f}", f"{m['text_bits']:.3f}", f"{m['captioning']['word_f1']:.2f}"]
        lines.append(f"{split:10}" + "".join(f"{c:>18}" for c in cells))
    return "\n".join([*lines, "bits are per token, the other modality given"])


main = command("lm_evaluate", evaluate)

if __name__ == "__main__":
    main()
