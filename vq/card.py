"""The card of an image tokenizer, README.md: what it is, what was measured, how it is used, what it cannot do.

Numbers come from the metrics.json of `vq-train` or `vq-evaluate`. It does not know how they are measured.
"""

from __future__ import annotations

from typing import Any, Protocol

from vqlm.card import front_matter, licence_line, number, plain, table

PARTS = {"train": "pictures of the training set", "heldout": "pictures that were held out"}
MEASURED = (  # column, its name in a part of metrics.json, format
    ("pictures", "pictures", ",d"),
    ("PSNR, dB", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("MS-SSIM", "ms_ssim", ".3f"),
    ("Fréchet wavelet distance", "fwd", ".3f"),
    ("bits a picture", "bits", ",.0f"),
)


class Described(Protocol):
    """What a card is written from: `vq.tokenizer.ImageTokenizer` is one."""

    encoder: Any
    quantizer: Any
    image_size: int

    @property
    def codebook_size(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def downsample(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def parameters(self) -> Any: ...


def card(
    tokenizer: Described,
    metrics: dict[str, Any],
    repo_id: str = "",
    license: str | None = None,
    trained_on: str | None = None,
) -> str:
    """Markdown with front matter. Given strings are shown as they are, never as markup."""
    name, f = repo_id or "path/of/this/folder", tokenizer.downsample
    parts = [
        front_matter(license, ("image-tokenizer", "vector-quantization", "image-reconstruction"), None),
        f"# {plain(repo_id) or 'An image tokenizer'}",
        "It turns pictures into small grids of integers and back. Made with vqlm.",
        "## What it is",
        _parts(tokenizer),
        "## What was measured",
        _measured(metrics, tokenizer.fingerprint),
        "## How to use it",
        f"""\
```python
from vq import ImageTokenizer  # of the package vqlm

tokenizer = ImageTokenizer.from_pretrained({name!r})
codes = tokenizer.encode(pixels)  # (B,3,H,W) in [-1,1] → (B,H/{f},W/{f},{tokenizer.depth}) int64
pixels = tokenizer.decode(codes)
```""",
        "## What it was trained on",
        _trained(metrics, trained_on),
        "## Limits",
        f"- It was trained on pictures of about {tokenizer.image_size}×{tokenizer.image_size} pixels; other sizes are "
        f"accepted (multiples of {tokenizer.downsample}) and may be reconstructed worse.\n"
        "- Codes mean nothing to another tokenizer, or to this one trained further: its fingerprint says which it is.",
        "## Licence",
        licence_line(license),
    ]
    return "\n\n".join(parts) + "\n"


def _parts(tokenizer: Described) -> str:
    cells = tokenizer.image_size // tokenizer.downsample
    parameters = sum(p.numel() for p in tokenizer.parameters())
    continuous = "none: its latent is continuous"
    codes = (
        f"{cells}×{cells} cells of {tokenizer.depth} codes, {tokenizer.codebook_size} values each, for "
        f"{tokenizer.image_size}×{tokenizer.image_size} pixels"
    )
    rows = [
        ["parameters", f"{parameters / 1e6:.1f} M"],
        ["encoder, quantizer", f"{type(tokenizer.encoder).__name__}, {type(tokenizer.quantizer).__name__}"],
        ["codes", codes if tokenizer.depth else continuous],
        ["fingerprint", f"`{tokenizer.fingerprint}`"],
    ]
    return table(("part", ""), rows)


def _measured(metrics: dict[str, Any], fingerprint: str) -> str:
    """ValueError where the numbers are those of another tokenizer."""
    theirs = metrics.get("fingerprint", fingerprint)
    if theirs != fingerprint:
        raise ValueError(f"metrics are of tokenizer {theirs}, this is {fingerprint}")
    parts = {part: metrics[part] for part in PARTS if isinstance(metrics.get(part), dict)}
    if not parts:
        return "Nothing, or the numbers are not at hand."
    rows = [
        [PARTS[part], *(number(found, at, form=form) for _, at, form in MEASURED)]
        for part, found in parts.items()
    ]
    return (
        table(("", *(title for title, _, _ in MEASURED)), rows)
        + "\n\nOf reconstructions against the pictures as the tokenizer was given them. One run."
    )


def _trained(metrics: dict[str, Any], trained_on: str | None) -> str:
    if trained_on:
        return plain(trained_on)
    data = metrics.get("data")
    if not isinstance(data, dict) or "source" not in data:
        return "Whoever uploaded this has not said which pictures."
    return (
        f"{number(data, 'pictures', 'train', form=',d')} pictures of the source {plain(data['source'])} at "
        f"{number(data, 'size', form='d')} pixels; {number(data, 'pictures', 'heldout', form=',d')} were held out."
    )
