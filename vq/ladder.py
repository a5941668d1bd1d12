"""Command `vq-ladder`: which harm does a metric of pictures see, and can it tell made pictures from real ones?

    vq-ladder images=photos out=runs/photos                       ladders of harm, on photographs
    vq-ladder images=openmoji beside=runs/photos/metrics.json     on drawings, and what differs between the two
    vq-ladder images=openmoji tokenizer=runs/tokenizer/tokenizer  and: are its reconstructions told from pictures?
    vq-ladder images=openmoji generated=DIR                       or: the pictures in a folder

FWD stands beside Fréchet and kernel distances over two networks: EfficientNet-Lite0 trained on ImageNet, and the same
one untrained, and beside PSNR and SSIM. All of them compare harmed pictures with others that are left alone; one
picture of each concept is taken, so that no twin of a picture is on the other side. Every picture is first brought to
`contrast`, so that what is added has room and nothing is clipped.

Leaves metrics.json, ladder.png, and roc.png where there were made pictures, in `out`. What the numbers mean, and what
they do not, stands in vq/sensitivity.py; the harm itself in vq/distortions.py. Neither is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import read_json, write_json

# torch and what stands on it: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    import vq.data
    import vqlm.hardware
    from vq.data import ImageData, PictureSet
    from vq.tokenizer import ImageTokenizer


def ladder(
    images: vq.data.ImageData,
    ladders: dict[str, list[float]],
    pictures: int,
    contrast: float,
    net_side: int,
    beside: str | None,
    tokenizer: str | None,
    generated: str | None,
    set_sizes: list[int],
    sets: int,
    seed: int,
    out: str,
    device: vqlm.hardware.Device,
) -> None:
    """Measure what metrics of pictures respond to."""
    from vq.evaluate import settle_size
    from vq.metrics import wavelet_level
    from vq.sensitivity import Views, band_sensitivity, bias, climb
    from vq.tokenizer import ImageTokenizer
    from vqlm.hardware import detect

    check(ladders, pictures, contrast, net_side, set_sizes, sets, tokenizer, generated)
    where = detect(device, "fp32").device
    model = ImageTokenizer.from_pretrained(tokenizer).to(where) if tokenizer else None
    if model:
        settle_size(images, model)
    wavelet_level(*images.shape)
    setting = {"ladders": ladders, "pictures": pictures, "contrast": contrast, "net_side": net_side}
    setting["shape"] = list(images.shape)
    other = read_beside(beside, setting) if beside else None
    views = Views(net_side, where, seed)
    images.setup()
    print(images.report())

    chosen = one_a_concept(images.train, 2 * pictures, seed)
    reference_NCHW, own_NCHW = (contrast * each for each in pixels(chosen).split(pictures))
    metrics: dict[str, Any] = {"source": images.source.name, "seed": seed, **setting}
    metrics |= climb(views, reference_NCHW, own_NCHW, ladders, seed)
    metrics["band_sensitivity"] = band_sensitivity(metrics["ladder"])
    if other:
        metrics["beside"] = other["source"]
        metrics["bias"] = bias(metrics["ladder"], other["ladder"])
    folder = Path(out)
    if model or generated:
        real = one_a_concept(images.heldout, 2 * pictures, seed, at_least=max(set_sizes))
        made_NCHW = rebuild(model, real) if model else read_made(str(generated), images, 2 * pictures, seed)
        metrics["roc"] = tell_apart(
            views,
            reference_NCHW,
            contrast * pixels(real),
            contrast * made_NCHW,
            set_sizes,
            sets,
            seed,
            folder,
        )
    report(metrics, own_NCHW[0], folder)


# --- settings -------------------------------------------------------------------------------------------------


def check(
    ladders: dict[str, list[float]],
    pictures: int,
    contrast: float,
    net_side: int,
    set_sizes: list[int],
    sets: int,
    tokenizer: str | None,
    generated: str | None,
) -> None:
    """ConfigError for a value out of range, before any data is read."""
    from vq.distortions import check_strength

    for name, strengths in ladders.items():
        for strength in strengths:
            check_strength(name, strength)
        if any(a >= b for a, b in pairwise([0, *strengths])):
            raise ConfigError(f"ladders.{name}={strengths}: must rise, from above 0")
    if pictures < 4:
        raise ConfigError(f"pictures={pictures}: at least 4 in each half")
    if not 0 < contrast <= 1:
        raise ConfigError(f"contrast={contrast}: above 0, at most 1")
    if net_side < 32:
        raise ConfigError(
            f"net_side={net_side}: at least 32 pixels, the networks' own reduction; 224 as trained"
        )
    if min(set_sizes, default=0) < 2 or sets < 1:
        raise ConfigError(f"set_sizes={set_sizes}: each at least 2; sets={sets}: at least 1")
    if tokenizer and generated:
        raise ConfigError("tokenizer= and generated= both give made pictures: give one of them")


def read_beside(path: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Another run's metrics.json. ConfigError unless it climbed the same ladders in the same manner."""
    if not Path(path).is_file():
        raise ConfigError(f"beside={path}: there is no such file; give the metrics.json of another vq-ladder")
    other = read_json(Path(path))
    for name, value in setting.items():
        if other.get(name) != value:
            raise ConfigError(f"beside={path}: made with {name}={other.get(name)}, this is {name}={value}")
    return other


# --- pictures -------------------------------------------------------------------------------------------------


def one_a_concept(pictures: PictureSet, count: int, seed: int, at_least: int | None = None) -> PictureSet:
    """`count` pictures of so many concepts, drawn; all there are if that is fewer, but not fewer than `at_least` (None:
    `count`): ConfigError."""
    import torch

    from vqlm.batches import generator

    order = torch.randperm(len(pictures), generator=generator(seed, 3000)).tolist()
    places = list({pictures.concepts[place]: place for place in order}.values())[:count]
    least = count if at_least is None else at_least
    if len(places) < least:
        raise ConfigError(
            f"{least} pictures of different concepts are needed and there are {len(places)}: take fewer pictures= or "
            "set_sizes=, or another images.holdout="
        )
    return pictures.select(places)


def pixels(pictures: PictureSet) -> Tensor:
    from vq.images import from_bytes

    return from_bytes(pictures.x_NCHW)


def rebuild(model: ImageTokenizer, pictures: PictureSet) -> Tensor:
    """Reconstructions, in 256 steps as real pictures are: a distance must not see that numbers were rounded."""
    import torch

    from vq.images import from_bytes, to_bytes
    from vq.measure import rebuilt

    with torch.no_grad():
        made = [batch.made_BCHW for batch in rebuilt(model, [pictures], batch_size=64)]
    return from_bytes(to_bytes(torch.cat(made)))


def read_made(folder: str, images: ImageData, count: int, seed: int) -> Tensor:
    """The pictures in a folder, brought to the size of the real ones."""
    import torch

    from vq.data import ImageData, ImageFolder
    from vqlm.batches import generator

    data = ImageData(ImageFolder(folder), images.size, images.aspects, holdout=0.0, fit=images.fit)
    data.multiple = images.multiple
    data.setup()
    print(data.report())
    order = torch.randperm(len(data.train), generator=generator(seed, 4000))
    return pixels(data.train.select(order[:count]))


# --- what comes out -------------------------------------------------------------------------------------------


def tell_apart(
    views: Any,
    reference_NCHW: Tensor,
    real_NCHW: Tensor,
    made_NCHW: Tensor,
    set_sizes: Sequence[int],
    sets: int,
    seed: int,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Size of the sets → area under the ROC curve of each distance; the curves go to roc.png."""
    from vq.plots import plot_roc
    from vq.sensitivity import flagged

    if len(made_NCHW) < max(set_sizes):
        raise ConfigError(f"set_sizes={list(set_sizes)}: there are {len(made_NCHW)} made pictures")
    reference, real, made = (views(each) for each in (reference_NCHW, real_NCHW, made_NCHW))
    areas, curves = {}, {}
    for size in set_sizes:
        areas[str(size)], curves[f"sets of {size} pictures"] = flagged(
            reference, real, made, size, sets, seed
        )
    plot_roc(curves, folder / "roc.png")
    return areas


def report(metrics: dict[str, Any], example_CHW: Tensor, folder: Path) -> None:
    """Write metrics.json and ladder.png; print the tables."""
    from vq.sensitivity import RIVALS, TRAINED, fwd_against

    trained = [name for name in RIVALS if name.startswith(TRAINED)]
    metrics["fwd_against"] = {"all": fwd_against(metrics, RIVALS), "trained": fwd_against(metrics, trained)}
    write_json(folder / "metrics.json", metrics)
    ladder_sheet(metrics, example_CHW).save(folder / "ladder.png")
    print(table(metrics))
    print(f"pictures: {folder / 'ladder.png'}")


def ladder_sheet(metrics: dict[str, Any], example_CHW: Tensor) -> Image.Image:
    """One picture on every rung; beneath, its set's PSNR and SSIM, and the sensitivities of FWD and of the networks."""
    from vq.distortions import distort
    from vq.images import contact_sheet, to_image
    from vqlm.batches import generator

    rows, labels, number = [], [], 0
    for name, rungs in metrics["ladder"].items():
        row, words = [to_image(example_CHW)], [name]
        for rung in rungs[1:]:
            harmed = distort(name, example_CHW[None], rung["strength"], generator(metrics["seed"], number))
            row.append(to_image(harmed[0]))
            words.append(_words(rung))
            number += 1
        rows.append(row)
        labels.append(words)
    return contact_sheet(rows or [[to_image(example_CHW)]], labels or [[""]], tile=176)


def _words(rung: dict[str, Any]) -> str:
    from vq.sensitivity import TRAINED, UNTRAINED

    above = rung["sensitivity"]
    pair = " ".join(f"{name.upper()} {rung[name]:.3g}" for name in ("psnr", "ssim") if rung[name] is not None)
    nets = " ".join(
        f"{title} {above[f'{view}_frechet']:.3g}" for title, view in (("net", TRAINED), ("random", UNTRAINED))
    )
    return f"{rung['strength']:g}: {pair} FWD {above['fwd']:.3g} {nets}"


TITLES = {"fwd": "FWD", "psnr": "PSNR", "ssim": "SSIM"}


def table(metrics: dict[str, Any]) -> str:
    """Sensitivities rung by rung (deviations above the floor), then what is read from them."""
    from vq.sensitivity import METRICS, PAIRS

    names = [*METRICS, *PAIRS]
    titles = [TITLES.get(name, name.replace("efficientnet_lite0", "lite0")) for name in names]
    lines = [f"{'sensitivity':24}" + "".join(f"{title:>16}" for title in titles)]
    for name, rungs in metrics["ladder"].items():
        lines += [
            _line(f"{name} {rung['strength']:g}", {**rung, **_shown(rung)}, names) for rung in rungs[1:]
        ]
    read = {
        "share of ladders rising": metrics["monotone"],
        "high noise / low noise": metrics["band_sensitivity"]["high_over_low"],
        "seconds for a set": metrics["seconds"],
        **{f"bias: {what}": values for what, values in metrics.get("bias", {}).items()},
        **{f"AUC, sets of {size}": values for size, values in metrics.get("roc", {}).items()},
    }
    return "\n".join([*lines, *(_line(title, values, names) for title, values in read.items())])


def _shown(rung: dict[str, Any]) -> dict[str, Any]:
    """Sensitivities of distances; PSNR and SSIM as they are known."""
    return {name: value for name, value in rung["sensitivity"].items() if name not in ("psnr", "ssim")}


def _line(title: str, values: dict[str, Any], names: Sequence[str]) -> str:
    told = [f"{'-':>16}" if values.get(name) is None else f"{values[name]:>16.3g}" for name in names]
    return f"{title:24}" + "".join(told)


main = command("vq_ladder", ladder)

if __name__ == "__main__":
    main()
