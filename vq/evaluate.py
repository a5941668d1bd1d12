"""Command `vq-evaluate`: how well a tokenizer reconstructs pictures, and how it uses its codes.

    vq-evaluate tokenizer=runs/tokenizer/tokenizer images=folder images.source.path=DIR

Leaves metrics.json, reconstructions.png and code_use.png in `out`. `vq-train` ends with the same functions.
Everything is computed in fp32, as stores are written, whatever precision training used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vq.data import ImageData, PictureSet
from vq.images import contact_sheet, from_bytes, to_image
from vq.metrics import CodeUse, frechet_wavelet_distance, psnr, ssim, wavelet_level
from vq.plots import plot_code_use
from vq.tokenizer import ImageTokenizer
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import write_json
from vqlm.hardware import Device, detect
from vqlm.progress import bar

SMALLEST_FOR_SSIM = 11


def evaluate(tokenizer: str, images: ImageData, out: str, batch_size: int, device: Device) -> None:
    """Measure a saved tokenizer on pictures."""
    model = ImageTokenizer.from_pretrained(tokenizer).to(detect(device, "fp32").device)
    settle_size(images, model)
    images.setup()
    print(images.report())
    report(model, images, Path(out), batch_size)


def settle_size(images: ImageData, tokenizer: ImageTokenizer) -> None:
    """The pictures' side: the tokenizer's own where none was given. ConfigError if the downsampling does not divide it.

    Called before data is read.
    """
    if images.size is None:
        images.size = tokenizer.image_size
    f = tokenizer.downsample
    if images.size % f:
        nearest_size = max(f, round(images.size / f) * f)
        raise ConfigError(
            f"images.size={images.size} is not a multiple of the downsampling {f}; nearest: {nearest_size}"
        )


def report(
    tokenizer: ImageTokenizer, images: ImageData, out: Path, batch_size: int, extra: Any = None
) -> dict[str, Any]:
    """Measure both splits; write metrics.json and the pictures; print a table. Returns the metrics."""
    metrics: dict[str, Any] = dict(extra or {})
    metrics |= {"fingerprint": tokenizer.fingerprint, "codebook_size": tokenizer.codebook_size}
    metrics |= {"depth": tokenizer.depth, "downsample": tokenizer.downsample, "image_size": images.size}
    metrics["data"] = {"source": images.source.name, "rejects": len(images.rejects)}
    shown, counts = [], {}
    for split, pictures in (("train", images.train), ("heldout", images.heldout)):
        if not len(pictures):
            print(f"no {split} pictures: not measured")
            continue
        metrics[split], rebuilt, counts[split] = measure(tokenizer, pictures, batch_size, split)
        shown.append((split, pictures, rebuilt))
    write_json(out / "metrics.json", metrics)
    reconstruction_sheet(shown).save(out / "reconstructions.png")
    plot_code_use(counts, out / "code_use.png")
    print(table(metrics))
    return metrics


def measure(
    tokenizer: ImageTokenizer, pictures: PictureSet, batch_size: int, label: str = "pictures"
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Metrics of one set, its reconstructions uint8 (N,3,H,W), and counts of codes (Q,K)."""
    use = CodeUse(tokenizer.depth, tokenizer.codebook_size)
    device = next(tokenizer.parameters()).device
    rebuilt = []
    with bar(len(pictures), f"measuring {label} pictures", "pictures") as shown:
        for x in pictures.x_NCHW.split(batch_size):
            codes = tokenizer.encode(from_bytes(x).to(device))
            use.update(codes.cpu())
            rebuilt.append(tokenizer.decode(codes).cpu())
            shown.update(len(x))
    made, real = torch.cat(rebuilt), from_bytes(pictures.x_NCHW)
    metrics: dict[str, Any] = {"pictures": len(pictures), "psnr": finite(psnr(real, made))}
    metrics["ssim"] = ssim(real, made) if min(real.shape[2:]) >= SMALLEST_FOR_SSIM else None
    if len(pictures) > 1 and not real.shape[2] % 2 and not real.shape[3] % 2:
        metrics["fwd"] = finite(frechet_wavelet_distance(real, made))
        metrics["fwd_level"] = wavelet_level(*real.shape[2:])
    result = use.result()
    metrics |= {
        "codes_used": result["used"],
        "codes_dead": result["dead"],
        "perplexity": result["perplexity"],
    }
    return metrics, made, use.counts_QK


def finite(value: float) -> float | None:
    """A number that JSON can hold: None for infinity (identical pictures)."""
    return value if math.isfinite(value) else None


def reconstruction_sheet(shown: list[tuple[str, PictureSet, Tensor]], count: int = 10):
    """Originals above reconstructions, spread evenly over each split; the label says which and names the picture."""
    rows, labels = [], []
    for split, pictures, made in shown[::-1]:
        chosen = [int(i) for i in torch.linspace(0, len(pictures) - 1, min(2 * count, len(pictures)))]
        for part in (chosen[:count], chosen[count:]):
            if part:
                rows += [
                    [to_image(from_bytes(pictures.x_NCHW[i])) for i in part],
                    [to_image(made[i]) for i in part],
                ]
                captions = [pictures.captions[i] or pictures.ids[i] for i in part]
                labels += [[f"{split}: {caption}" for caption in captions], ["reconstructed"] * len(part)]
    return contact_sheet(rows, labels)


def table(metrics: dict[str, Any]) -> str:
    """The numbers of metrics.json that a person reads first."""
    lines = [f"{'':10}{'pictures':>9}{'PSNR dB':>9}{'SSIM':>8}{'FWD':>9}  codes used per depth  perplexity"]
    for split in ("train", "heldout"):
        if split in metrics:
            m = metrics[split]
            used = " ".join(f"{round(share * metrics['codebook_size'])}" for share in m["codes_used"])
            perplexity = " ".join(f"{p:.0f}" for p in m["perplexity"])
            numbers = [f"{m['pictures']:>9}"]
            for name, width, digits in (("psnr", 9, 2), ("ssim", 8, 3), ("fwd", 9, 3)):
                value = m.get(name)
                numbers.append(f"{value:>{width}.{digits}f}" if value is not None else f"{'-':>{width}}")
            lines.append(f"{split:10}{''.join(numbers)}  {used} of {metrics['codebook_size']}  {perplexity}")
    return "\n".join(lines)


main = command("vq_evaluate", evaluate)

if __name__ == "__main__":
    main()
