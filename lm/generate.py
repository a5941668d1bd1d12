"""Command `lm-generate`: a prompt → pictures.

    lm-generate model=runs/lm/model prompt="a red apple" n=8 guidance=2 seed=1

Leaves a-red-apple-1-000.png … and a-red-apple-1-sheet.png in `out`: prompt, seed, number. A PNG text named `vqlm` in
each file says how it was drawn. Files that were drawn otherwise stay: the next names begin with a-red-apple-1-2-.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vqlm.command import command
from vqlm.errors import ConfigError

if TYPE_CHECKING:
    import vqlm.hardware


def generate(
    model: str,
    prompt: str,
    n: int,
    guidance: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    deeper: float | None,
    parallel: float | None,
    norm: float | None,
    ramp: float | None,
    best_of: int,
    seed: int,
    size: list[int] | None,
    out: str,
    device: vqlm.hardware.Device,
) -> None:
    """Draw n pictures of a prompt."""
    if not 1 <= n <= 4096:
        raise ConfigError(f"n={n}: from 1 to 4096 pictures")
    if not 1 <= best_of <= 4096 // n:
        raise ConfigError(f"best_of={best_of}: from 1 to {4096 // n} for each of {n} pictures")
    if size is not None and len(size) != 2:
        raise ConfigError(f"size={size}: height and width in pixels, such as [64,64], or null")
    # not above: torch and transformers take seconds, which `--help` and a mistyped key do not wait for
    from lm.bundle import read_about
    from lm.pipeline import Pipeline, sheet
    from vqlm.hub import local_folder

    folder = local_folder(model)
    pipeline = Pipeline.from_pretrained(folder, device)
    try:
        shape = None if size is None else (size[0], size[1])
        more: dict[str, Any] = {
            "min_p": min_p,
            "deeper": deeper,
            "parallel": parallel,
            "norm": norm,
            "ramp": ramp,
        }
        pictures = pipeline.generate(
            prompt, n, guidance, temperature, top_k, top_p, seed, shape, best_of, **more
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sampling = pipeline.sampling_with(guidance, temperature, top_k, top_p, **more)
    drawn = {
        "model": model,
        "weights": read_about(folder).get("seal"),  # of a model that is trained again under the same name
        "prompt": prompt,
        "seed": seed,
        "size": size,
        "best_of": best_of,
        **asdict(sampling),
    }
    about = json.dumps(drawn, ensure_ascii=False)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    name = _name(target, f"{_slug(prompt)}-{seed}", about)
    for number, picture in enumerate(pictures):
        _save(picture, target / f"{name}-{number:03d}.png", about)
    path = target / f"{name}-sheet.png"
    _save(sheet(pictures, [prompt] * n), path, about)
    print(f"{n} pictures: {target}   all on one sheet: {path}")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"


def _name(folder: Path, name: str, about: str) -> str:
    """`name`, or the first of name-2, name-3 … under which nothing lies that was drawn in another way."""
    return next(
        each
        for each in (name if n == 1 else f"{name}-{n}" for n in count(1))
        if all(_drawn(folder / f"{each}-{end}.png") in (None, about) for end in ("000", "sheet"))
    )


def _drawn(path: Path) -> str | None:
    """How a picture was drawn; "" where it does not say so, None where there is none."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            return picture.info.get("vqlm", "")
    # somebody else's, whatever it is
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def _save(picture: Image.Image, path: Path, about: str) -> None:
    text = PngInfo()
    text.add_itxt("vqlm", about)
    picture.save(path, pnginfo=text)


main = command("lm_generate", generate)

if __name__ == "__main__":
    main()
