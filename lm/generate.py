"""Command `lm-generate`: a prompt → pictures.

    lm-generate model=runs/lm/model prompt="a red apple" n=8 guidance=2 seed=1

Leaves a-red-apple-1-000.png … and a-red-apple-1-sheet.png in `out`: prompt, seed, number.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lm.pipeline import Pipeline, sheet
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.hardware import Device


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
    device: Device,
) -> None:
    """Draw n pictures of a prompt."""
    if not 1 <= n <= 4096:
        raise ConfigError(f"n={n}: from 1 to 4096 pictures")
    if not 1 <= best_of <= 4096 // n:
        raise ConfigError(f"best_of={best_of}: from 1 to {4096 // n} for each of {n} pictures")
    if size is not None and len(size) != 2:
        raise ConfigError(f"size={size}: height and width in pixels, such as [64,64], or null")
    pipeline = Pipeline.from_pretrained(model, device)
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
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    for number, picture in enumerate(pictures):
        picture.save(target / f"{name}-{seed}-{number:03d}.png")
    path = target / f"{name}-{seed}-sheet.png"
    sheet(pictures, [prompt] * n).save(path)
    print(f"{n} pictures: {target}   all on one sheet: {path}")


main = command("lm_generate", generate)

if __name__ == "__main__":
    main()
