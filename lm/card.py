"""The card of a bundle, README.md: what it is, what was measured, how it is used, what it cannot do.

Numbers come from metrics.json and the parts themselves; nothing is claimed that was not measured, and a licence is
what was given. It does not know how numbers are measured (`lm.metrics`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from lm.bundle import is_plain
from lm.decoding import Sampling
from lm.sequence import SequenceFormat
from vqlm.card import front_matter, licence_line, number, plain, table

PARTS = {
    "train": "pictures of the training set",
    "heldout": "concepts that were held out",
    "heldout_style": "known concepts in a style that was held out",
}
MEASURED = (  # column, where it stands in a part of metrics.json, format
    ("captions drawn", ("drawing", "captions"), ",d"),
    ("own picture among the ten nearest", ("drawing", "among_ten_nearest"), ".1%"),
    ("by chance", ("drawing", "chance"), ".2%"),
    ("bits an image token", ("image_bits",), ".3f"),
    ("bits a text token", ("text_bits",), ".3f"),
    ("word F1 of captions", ("captioning", "word_f1"), ".2f"),
)


class Described(Protocol):
    """What a card is written from: `lm.pipeline.Pipeline` is one."""

    model: Any
    images: Any
    metrics: dict[str, Any]

    @property
    def form(self) -> SequenceFormat: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def sizes(self) -> list[tuple[int, int]]: ...


def card(
    pipeline: Described, repo_id: str = "", license: str | None = None, trained_on: str | None = None
) -> str:
    """Markdown with front matter. Given strings are shown as they are, never as markup."""
    name = repo_id or "path/of/this/folder"
    parts = [
        front_matter(license, ("text-to-image", "image-to-text", "image-tokens"), "any-to-any"),
        f"# {plain(repo_id) or 'A language model that draws'}",
        "A causal language model that draws and describes pictures: its vocabulary holds the codes of an image "
        "tokenizer, which lies in `vq/`. Made with vqlm.",
        "## What it is",
        _parts(pipeline),
        "## What was measured",
        _measured(pipeline.metrics),
        "## How to use it",
        _use(name, is_plain(pipeline.about, pipeline.form)),
        "## What it was trained on",
        _trained(pipeline.metrics, trained_on),
        "## Limits",
        _limits(pipeline),
        "## Licence",
        licence_line(license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parts(pipeline: Described) -> str:
    v, form = pipeline.form.vocabulary, pipeline.form
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    sizes = ", ".join(f"{width}×{height}" for height, width in pipeline.sizes)
    grids = ", ".join(f"{height}×{width}" for height, width in form.grids)
    rows = [
        ["language model", f"{plain(type(pipeline.model.lm).__name__)}, {parameters / 1e6:.1f} M parameters"],
        ["pictures", f"{sizes} pixels (width × height)"],
        ["codes", f"{grids} cells of {v.depth} codes, {v.codebook_size} values each"],
        ["layout, head", f"{form.layout.name}, {type(pipeline.model.head).__name__}"],
        ["vocabulary", f"{v.size:,} ids, of which {v.depth * v.codebook_size:,} stand for codes"],
        ["image tokenizer", f"`{pipeline.about['fingerprint']}`"],
        ["vqlm", plain(pipeline.about["vqlm"])],
    ]
    return table(("part", ""), rows)


def _measured(metrics: dict[str, Any]) -> str:
    parts = {part: metrics[part] for part in PARTS if isinstance(metrics.get(part), dict)}
    if not parts:
        return "Nothing yet, or the numbers are not at hand: there is no `metrics.json`."
    rows = [
        [PARTS[part], *(number(found, *at, form=form) for _, at, form in MEASURED)]
        for part, found in parts.items()
    ]
    told = [
        table(("", *(title for title, _, _ in MEASURED)), rows),
        "A drawn picture is compared with the whole set as the image tokenizer reconstructs it (squared distance of "
        "pixels). Bits are per token, the other modality given; lower is better. One run, one seed.",
        _text(metrics.get("text")),
        _drawn_with(metrics.get("sampling")),
    ]
    return "\n\n".join(part for part in told if part)


def _text(text: Any) -> str:
    after = number(text, "after", "perplexity", form=".2f")
    if after == "–":
        return ""
    before = number(text, "before", "perplexity", form=".2f")
    compared = "" if before == "–" else f"; the model that it began from had {before}"
    return f"Perplexity on plain text that was held out: {after}{compared}."


def _drawn_with(sampling: Any) -> str:
    if not isinstance(sampling, dict):
        return ""
    plain_values = asdict(Sampling())
    chosen = [
        n for n in plain_values if n in ("guidance", "temperature") or sampling.get(n) != plain_values[n]
    ]
    given = {name: number(sampling, name, form="g") for name in chosen}
    return f"Drawn with {', '.join(f'{name} {value}' for name, value in given.items() if value != '–')}."


def _use(name: str, is_whole: bool) -> str:
    ours = f"""\
```python
from lm import Pipeline  # of the package vqlm

pipe = Pipeline.from_pretrained({name!r})
picture = pipe.generate("a red apple", n=1, seed=0)[0]
print(pipe.caption(picture))
```"""
    if not is_whole:
        return (
            ours + "\n\nThe folder loads in `AutoModelForCausalLM` too, for text: pictures need the head in "
            "`head.safetensors` or several ids a position, which plain transformers does not know."
        )
    theirs = f"""\
```python
from transformers import AutoModelForCausalLM
from lm.processor import VqlmProcessor

model = AutoModelForCausalLM.from_pretrained({name!r})
processor = VqlmProcessor.from_pretrained({name!r})
inputs = processor(text="a red apple", return_for_image_generation=True, return_tensors="pt")
ids = model.generate(
    **inputs, logits_processor=[processor.grammar()], max_new_tokens=processor.picture_tokens(), do_sample=True
)
picture = processor.post_process_multimodal_output(ids, generation_mode="image")[0]
```"""
    return f"{ours}\n\nWith transformers' own `generate`:\n\n{theirs}"


def _trained(metrics: dict[str, Any], trained_on: str | None) -> str:
    told = plain(trained_on) if trained_on else "Which pictures and captions is not said here."
    documents = number(metrics, "run", "documents", form=",d")
    batches = number(metrics, "run", "batches", form=",d")
    counts = "" if documents == "–" else f" {documents} documents were read in {batches} batches."
    return told + counts


def _limits(pipeline: Described) -> str:
    sizes = "size" if len(pipeline.sizes) == 1 else "sizes"
    lines = [
        f"It draws the {sizes} above and no other; a picture that it is given is cut and scaled to the nearest.",
        "It draws what its training set shows. How far it goes beyond is what the rows of held-out pictures say, where "
        "there are any.",
        "No picture is finer than the image tokenizer's own reconstructions.",
        "Nothing filters prompts, pictures or captions.",
    ]
    return "\n".join(f"- {line}" for line in lines)
