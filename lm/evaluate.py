"""Command `lm-evaluate`: how well a bundle reads and draws the pictures of a store, and what it kept of plain text.

    lm-evaluate model=runs/lm/model store=runs/store
    lm-evaluate model=runs/lm/model store=runs/store guidance=3 parallel=0
    lm-evaluate model=runs/lm/model store=runs/store images=openmoji          drawings against the pictures themselves
    lm-evaluate model=runs/lm/model store=runs/store texts=wordnet base=DIR

Leaves metrics.json and samples.png in `out`, with drawings=true every drawing too. `lm-train` ends with the same
functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import new_folder, write_json

# torch, transformers and all that: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    from torch import Tensor, nn

    import lm.metrics
    import lm.texts
    import vqlm.hardware
    from lm.data import Pairs
    from lm.pipeline import Pipeline
    from lm.sequence import Grid

STYLES = "heldout_style"
SAMPLED = 4096  # pictures of a split, at least, of a store that is read in parts; else all are taken
NAMES = {"train": "train", "heldout": "heldout", STYLES: "held-out style"}


def evaluate(
    model: str,
    store: str,
    images: lm.metrics.ImageData | None,
    texts: lm.texts.Texts,
    base: str | None,
    guidance: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    deeper: float | None,
    parallel: float | None,
    norm: float | None,
    ramp: float | None,
    train_captions: int,
    heldout_captions: int,
    heldout_texts: int,
    context: int,
    drawings: bool,
    seed: int,
    out: str,
    device: vqlm.hardware.Device,
) -> None:
    """Measure a saved bundle on the store of its tokenizer, and on texts that it was not trained on."""
    from lm import metrics
    from lm.decoding import Sampling
    from lm.pipeline import Pipeline

    if train_captions < 0 or heldout_captions < 0:
        raise ConfigError(
            f"train_captions={train_captions}, heldout_captions={heldout_captions}: not negative"
        )
    if drawings and (there := Path(out, "drawings")).exists() and not there.is_dir():
        raise ConfigError(f"drawings=true: {there} is in the way; name another out=")
    if heldout_texts < 1 or context < 2:
        raise ConfigError(f"heldout_texts={heldout_texts}: at least 1; context={context}: at least 2")
    sampling: dict[str, Any] = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    sampling |= {"min_p": min_p, "deeper": deeper, "parallel": parallel, "norm": norm, "ramp": ramp}
    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        Sampling(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pipeline = Pipeline.from_pretrained(model, device)
    pipeline.sampling = replace(pipeline.sampling, **given)
    heldout = texts.heldout()
    if base is not None and not heldout:
        raise ConfigError(f"base={base}: nothing to compare it on; choose texts too, such as texts=wordnet")
    extra = {}
    if heldout:
        chosen = [heldout[i] for i in metrics.spread(len(heldout), heldout_texts)]
        extra["text"] = kept(pipeline, chosen, base, Path(model).parent / "metrics.json", context)
    report(pipeline, store, Path(out), train_captions, heldout_captions, seed, extra, images, drawings)


# --- plain text ---------------------------------------------------------------------------------------------------


def kept(
    pipeline: Pipeline, texts: Sequence[str], base: str | None, trained: Path, context: int
) -> dict[str, Any]:
    """{before, after, ratio} of plain text: `after` of the bundle, `before` of its base model.

    base: folder or hub id; None: what `lm-train` wrote into `trained`, the metrics.json beside the bundle, if that was
    measured on the same texts. Without either there is `after` alone.
    """
    from lm import metrics
    from lm.metrics import PlainText

    try:
        text = PlainText.of(pipeline, texts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    after = metrics.measured(pipeline.model.lm, text, context)
    if base is not None:
        language_model = open_base(base, pipeline, texts, text.size)
        language_model.to(pipeline.device)
        return metrics.retention(metrics.measured(language_model, text, context), after)
    before = stored(trained)
    same = before is not None and all(before.get(key) == after[key] for key in ("digest", "size", "context"))
    return metrics.retention(before, after) if before is not None and same else {"after": after}


def open_base(name: str, pipeline: Pipeline, texts: Sequence[str], size: int) -> nn.Module:
    """The base model of a bundle. ConfigError if it cannot be loaded, or has another vocabulary than the bundle's."""
    from lm.source import load
    from lm.vocab import text_to_ids

    try:
        language_model, tokenizer = load(name)
    except ValueError as error:
        raise ConfigError(f"base={name}: {error}") from error
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids != size:
        raise ConfigError(f"base={name} has {ids} ids, the model was made from one of {size}")
    if other := [text for text in texts if text_to_ids(tokenizer, text) != pipeline.encode_text(text)]:
        raise ConfigError(
            f"base={name} is not the base of this model: it reads {other[0][:40]!r} as other ids"
        )
    return language_model


def stored(path: Path) -> dict[str, Any] | None:
    """What `lm-train` measured of the base model; None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["text"]["before"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- pictures -----------------------------------------------------------------------------------------------------


def report(
    pipeline: Pipeline,
    store_folder: str,
    out: Path,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    extra: dict[str, Any] | None = None,
    images: lm.metrics.ImageData | None = None,
    drawings: bool = False,
) -> dict[str, Any]:
    """Measure; write metrics.json and samples.png; print a table. Returns the metrics.

    Drawn pictures are compared with the whole set as the image tokenizer reconstructs it: a store holds no pixels. Of a
    store that is read in parts a sample of each split stands for it. images: the pictures that the store was made of;
    drawings, and reconstructions, are then compared with those too. ConfigError where they are others. drawings:
    leave them in out/drawings too, a folder for each split, as `images=folder` reads it.
    """
    from lm import metrics
    from lm.data import open_store, read_pairs
    from lm.metrics import Gallery, Originals
    from lm.pipeline import sheet

    store = open_store(store_folder, pipeline.model.form)
    store.check(pipeline.images)
    originals = None if images is None else Originals(images, store)
    result: dict[str, Any] = dict(extra or {})
    result["sampling"] = asdict(pipeline.sampling) | {"seed": seed}
    result["compared"] = "squared pixel distance to the set's reconstructions"
    train, heldout = (
        read_pairs(store.sample(split, SAMPLED), split, pipeline.encode_text)
        for split in ("train", "heldout")
    )
    if not store.in_memory:
        result["compared"] += f", a sample of {len(train) + len(heldout):,} of {len(store):,} pictures"
    parts = in_parts(train, heldout, store.known_concepts("train", set(heldout.concepts)))
    counts = {name: train_captions if name == "train" else heldout_captions for name in parts}
    gallery = Gallery.of(pipeline, list(parts.values()) if any(counts.values()) else [], originals)
    pictures, labels = [], []
    kept: dict[str, tuple[list[Tensor], list[str]]] = {}
    first: dict[Grid, int] = {}
    for name, pairs in parts.items():
        count = counts[name]
        if len(pairs) and count:
            print(f"drawing {min(count, len(pairs))} captions: {NAMES[name]}", flush=True)
            drawing, drawn, chosen = metrics.drawing(pipeline, gallery, pairs, first, seed, count)
            result[name] = {**metrics.losses(pipeline.model, pairs), "drawing": drawing}
            result[name]["captioning"] = metrics.captioning(pipeline, pairs, count)
            if len(grids := metrics.by_grid(pairs)) > 1:
                result[name]["pictures"] = {f"{h}x{w}": len(own) for (h, w), own in grids.items()}
            kept[name] = (drawn, [pairs.texts[i] for i in chosen])
            shown = metrics.spread(len(chosen), 32 if name == "train" else 16)
            pictures += [each for i in shown for each in pipeline.show(drawn[i][None])]
            told = "" if name == "train" else " (held out)" if name == "heldout" else " (style held out)"
            labels += [pairs.texts[chosen[i]] + told for i in shown]
        for grid, own in metrics.by_grid(pairs).items():
            first[grid] = first.get(grid, 0) + len(own)
    write_json(out / "metrics.json", result)
    if pictures:
        sheet(pictures, labels).save(out / "samples.png")
    if drawings:
        save_drawings(pipeline, kept, out / "drawings")
    print(table(result))
    return result


def save_drawings(
    pipeline: Pipeline, drawn: Mapping[str, tuple[list[Tensor], list[str]]], folder: Path
) -> None:
    """Of each split pixels (3,H,W) and captions → SPLIT/0000.png … and metadata.jsonl, in place of what an earlier run
    left there."""
    with new_folder(folder) as part:
        for split, (pixels, captions) in drawn.items():
            (part / split).mkdir()
            rows = []
            for number, (x_CHW, caption) in enumerate(zip(pixels, captions, strict=True)):
                row = {"file_name": f"{number:04}.png", "text": caption}
                pipeline.show(x_CHW[None])[0].save(part / split / row["file_name"])
                rows.append(json.dumps(row, ensure_ascii=False))
            (part / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def in_parts(train: Pairs, heldout: Pairs, known: set[str]) -> dict[str, Pairs]:
    """What was trained on; held-out concepts; and held-out pictures whose concept was trained on in another style.

    known: concepts that were trained on.
    """
    styles = [i for i, concept in enumerate(heldout.concepts) if concept in known]
    concepts = [i for i, concept in enumerate(heldout.concepts) if concept not in known]
    parts = {"train": train, "heldout": select(heldout, concepts)}
    return parts | {STYLES: select(heldout, styles)} if styles else parts


def select(pairs: Pairs, chosen: list[int]) -> Pairs:
    """Some of the pairs, in this order."""
    import torch

    codes = pairs.codes
    return replace(
        pairs,
        captions=[pairs.captions[i] for i in chosen],
        codes=codes[chosen] if isinstance(codes, torch.Tensor) else [codes[i] for i in chosen],
        texts=[pairs.texts[i] for i in chosen],
        ids=[pairs.ids[i] for i in chosen],
        concepts=[pairs.concepts[i] for i in chosen],
    )


# --- the table ----------------------------------------------------------------------------------------------------


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
    lines = [f"{'':14}" + "".join(f"{h:>18}" for h in head)]
    for part, name in NAMES.items():
        if part not in result:
            continue
        m = result[part]
        d = m["drawing"]
        variant = (
            [f"{d['variant_followed']:.1%}", f"{d['variant_chance']:.1%}"] if "variants" in d else ["-", "-"]
        )
        cells = [str(d["captions"]), f"{d['among_ten_nearest']:.1%}", f"{d['chance']:.2%}", *variant]
        cells += [f"{m['image_bits']:.3f}", f"{m['text_bits']:.3f}", f"{m['captioning']['word_f1']:.2f}"]
        lines.append(f"{name:14}" + "".join(f"{c:>18}" for c in cells))
    lines.append("bits are per token, the other modality given")
    lines += [real_line(NAMES[part], result[part]["drawing"]) for part in NAMES if part in result]
    return "\n".join([*filter(None, lines), *([text_line(result["text"])] if "text" in result else [])])


def real_line(name: str, drawing: dict[str, Any]) -> str:
    """Distances to the pictures themselves, in one line; nothing where they were not at hand."""
    real = drawing.get("real", {})
    if real.get("fwd") is None:
        return ""
    return (
        f"{name}: FWD of {real['fwd_pictures']} drawings to {real['fwd_set']:,} real pictures {real['fwd']:.3f}, of "
        f"their reconstructions {real['floor']['fwd']:.3f} (the image tokenizer's floor)"
    )


def text_line(text: dict[str, Any]) -> str:
    """Plain text before and after, in one line."""
    after = text["after"]
    told = f"plain text: perplexity {after['perplexity']:.2f}, {after['bits_per_byte']:.3f} bits a byte"
    if "before" not in text:
        return f"{told}; its base model is not known: base=DIR compares"
    before = text["before"]
    return (
        f"{told}; base model {before['perplexity']:.2f} and {before['bits_per_byte']:.3f}: "
        f"perplexity times {text['ratio']:.3f}"
    )


main = command("lm_evaluate", evaluate)

if __name__ == "__main__":
    main()
