"""Command `vq-evaluate`: how well a tokenizer reconstructs pictures, and how it uses its codes.

    vq-evaluate tokenizer=runs/tokenizer/tokenizer images=folder images.source.path=DIR
    vq-evaluate tokenizer=… extra=[features]    feature distances too (pip install "vqlm[features]")
    vq-evaluate tokenizer=… extra=[lpips,rfid] weights.lpips_backbone=FILE weights.inception=FILE

Leaves metrics.json, reconstructions.png and code_use.png in `out` (the last one not for a continuous tokenizer, which
has no codes). `vq-train` ends with the same functions. Everything is computed in fp32, as stores are written, whatever
precision training used. How a number comes about is not known here: vq/measure.py, vq/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import write_json

# torch and what stands on it: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    import vq.data
    import vq.measure
    import vqlm.hardware
    from vq.data import ImageData, PictureSet
    from vq.measure import Examples, MakeMeter
    from vq.tokenizer import ImageTokenizer


def evaluate(
    tokenizer: str,
    images: vq.data.ImageData,
    out: str,
    batch_size: int,
    extra: list[vq.measure.Extra],
    weights: vq.measure.ExtraWeights,
    device: vqlm.hardware.Device,
) -> None:
    """Measure a saved tokenizer on pictures."""
    from vq.measure import extra_meters
    from vq.tokenizer import ImageTokenizer
    from vqlm.hardware import detect

    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    where = detect(device, "fp32").device
    extras = extra_meters(extra, weights, where)
    model = ImageTokenizer.from_pretrained(tokenizer).to(where)
    settle_size(images, model)
    images.setup()
    print(images.report())
    report(model, images, Path(out), batch_size, extras=extras)


def settle_size(images: ImageData, tokenizer: ImageTokenizer) -> None:
    """The pictures' side: the tokenizer's own where none was given, and what every shape must be a multiple of.
    ConfigError if the downsampling does not divide the side.

    Called before data is read.
    """
    if images.size is None:
        images.size = tokenizer.image_size
    f = images.multiple = tokenizer.downsample
    if images.size % f:
        nearest_size = max(f, round(images.size / f) * f)
        raise ConfigError(
            f"images.size={images.size} is not a multiple of the downsampling {f}; nearest: {nearest_size}"
        )


def report(
    tokenizer: ImageTokenizer,
    images: ImageData,
    out: Path,
    batch_size: int,
    about: dict[str, Any] | None = None,
    extras: Sequence[MakeMeter] = (),
) -> dict[str, Any]:
    """Measure both splits; write metrics.json (which begins with `about`) and the pictures; print a table. Returns the
    metrics."""
    import torch

    from vq.measure import measure
    from vq.plots import plot_code_use

    metrics: dict[str, Any] = {
        **(about or {}),
        "torch": torch.__version__,
        "fingerprint": tokenizer.fingerprint,
    }
    metrics |= {"codebook_size": tokenizer.codebook_size, "depth": tokenizer.depth}
    metrics |= {"downsample": tokenizer.downsample, "image_size": images.size, "data": _origin(images)}
    shown: list[tuple[str, Examples]] = []
    counts: dict[str, Tensor] = {}
    for split, sets in (("train", images.train_sets), ("heldout", images.heldout_sets)):
        if not sets:
            print(f"no {split} pictures: not measured")
            continue
        metrics[split], examples, counts_QK = measure(tokenizer, sets, batch_size, extras, split)
        shown.append((split, examples))
        if counts_QK is not None:
            counts[split] = counts_QK
    write_json(out / "metrics.json", metrics)
    reconstruction_sheet(shown).save(out / "reconstructions.png")
    if counts:
        plot_code_use(counts, out / "code_use.png")
    print(table(metrics))
    return metrics


def _origin(images: ImageData) -> dict[str, Any]:
    """What a number depends on beside the tokenizer: which pictures, how split, how made to fit."""
    settings = {name: getattr(images, name) for name in ("seed", "holdout", "size", "fit", "aspects")}
    splits = {"train": images.train_sets, "heldout": images.heldout_sets}
    shapes = {split: {_shape(each): len(each) for each in sets} for split, sets in splits.items()}
    return {
        "source": images.source.name,
        "rejects": len(images.rejects),
        **settings,
        "pictures": {split: sum(of_shape.values()) for split, of_shape in shapes.items()},
        "shapes": shapes,
    }


def _shape(pictures: PictureSet) -> str:
    return "{2}x{3}".format(*pictures.x_NCHW.shape)


def reconstruction_sheet(shown: list[tuple[str, Examples]], columns: int = 10) -> Image.Image:
    """Originals above reconstructions; the label says which split and names the picture."""
    from vq.images import contact_sheet, to_image

    rows, labels = [], []
    for split, examples in shown[::-1]:
        for start in range(0, len(examples.pairs), columns):
            part = examples.pairs[start : start + columns]
            rows += [[to_image(real) for real, _, _ in part], [to_image(made) for _, made, _ in part]]
            labels += [[f"{split}: {name}" for _, _, name in part], ["reconstructed"] * len(part)]
    return contact_sheet(rows, labels)


COLUMNS = (
    ("psnr", "PSNR dB", 2),
    ("ssim", "SSIM", 3),
    ("ms_ssim", "MS-SSIM", 3),
    ("fwd", "FWD", 3),
    ("bits", "bits", 0),
)


def table(metrics: dict[str, Any]) -> str:
    """The numbers of metrics.json that a person reads first."""
    head = "".join(f"{title:>9}" for _, title, _ in COLUMNS)
    lines = [f"{'':10}{'pictures':>9}{head}  codes used per depth  perplexity"]
    for split in ("train", "heldout"):
        if split in metrics:
            m = metrics[split]
            numbers = "".join(_number(m.get(name), digits) for name, _, digits in COLUMNS)
            lines.append(f"{split:10}{m['pictures']:>9}{numbers}  {_codes(m, metrics['codebook_size'])}")
    for split in ("train", "heldout"):
        for name in metrics.get(split, {}):
            if name == "rfid" or name.endswith(("_kernel", "_frechet")) or name.startswith("lpips"):
                lines.append(f"{split:10}{name}: {_number(metrics[split][name], 5).strip()}")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.{digits}f}"


def _codes(measured: dict[str, Any], codebook_size: int) -> str:
    if "codes_used" not in measured:
        return "continuous: no codes"
    used = " ".join(f"{round(share * codebook_size)}" for share in measured["codes_used"])
    return f"{used} of {codebook_size}  {' '.join(f'{p:.0f}' for p in measured['perplexity'])}"


main = command("vq_evaluate", evaluate)

if __name__ == "__main__":
    main()
