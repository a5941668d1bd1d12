"""The main job, whole: pictures → tokenizer → store → language model → drawings. `make demo` and `make smoke` run it.

    vqlm-demo                               # the default set; laptop or GPU sizes, whichever fits this machine
    vqlm-demo pictures=DIR out=runs/mine

It only calls the commands that a user would, prints each, and gathers what they leave. Run again, it goes on where
it stopped. It knows the commands by name; it imports neither room.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import new_folder, write_json
from vqlm.processes import run

PROMPTS = ("red apple", "woman astronaut dark skin tone")
TOY_PROMPTS = ("a large red circle, left",)


def demo(size: Literal["auto", "smoke", "laptop", "gpu"], pictures: str | None, out: str) -> None:
    """Train an image tokenizer and a language model, and draw with them."""
    if pictures is not None and not Path(pictures).is_dir():
        raise ConfigError(f"pictures={pictures} is not a folder")
    started = time.monotonic()
    folder = Path(out)
    size = choose_size() if size == "auto" else size
    images = image_arguments(size, pictures)
    vq, lm, store = folder / "vq", folder / "lm", folder / "store"
    steps = [
        ("train the image tokenizer", "vq-train", [*images, f"vq_size={size}", f"out={vq}"]),
        ("encode the pictures", "vq-encode", [*images, f"tokenizer={vq}/tokenizer", f"out={store}"]),
        (
            "train the language model, measure it",
            "lm-train",
            [f"lm_size={size}", f"store={store}", f"out={lm}"],
        ),
    ]
    for prompt in TOY_PROMPTS if size == "smoke" else PROMPTS:
        drawing = [f"model={lm}/model", f"prompt={prompt}", "n=4", f"out={folder}/pictures"]
        steps.append((f"draw {prompt!r}", "lm-generate", drawing))
    for number, (what, name, arguments) in enumerate(steps, 1):
        run(f"[{number}/{len(steps)}] {what}", name, arguments)
    metrics = gather(folder, vq, lm)
    metrics["minutes"] = (time.monotonic() - started) / 60
    write_json(folder / "metrics.json", metrics)
    print(farewell(folder, metrics))


def choose_size() -> Literal["laptop", "gpu"]:
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def image_arguments(size: str, pictures: str | None) -> list[str]:
    if pictures is not None:
        return ["images=folder", f"images.source.path={pictures}"]
    return ["images=shapes" if size == "smoke" else "images=openmoji"]


def gather(folder: Path, vq: Path, lm: Path) -> dict[str, Any]:
    """Copy what the runs leave into one place; returns all metrics."""
    from vqlm.plots import plot_losses
    from vqlm.training import read_log

    for source in (vq / "tokenizer", lm / "model"):
        with new_folder(folder / source.name) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    for picture in (vq / "reconstructions.png", vq / "code_use.png", lm / "samples.png"):
        shutil.copyfile(picture, folder / picture.name)
    logs = {"image tokenizer": read_log(vq / "log.jsonl"), "language model": read_log(lm / "log.jsonl")}
    plot_losses(logs, folder / "losses.png")
    named = {"tokenizer": vq, "language_model": lm}
    return {
        name: json.loads((run / "metrics.json").read_text(encoding="utf-8")) for name, run in named.items()
    }


def farewell(folder: Path, metrics: dict[str, Any]) -> str:
    """What a newcomer does next."""
    commands = Path(os.path.relpath(Path(sys.executable).parent))
    pictures = [
        folder / name for name in ("samples.png", "reconstructions.png", "code_use.png", "losses.png")
    ]
    return f"""
=== done in {metrics["minutes"]:.1f} minutes. Look at the pictures:
    {"    ".join(str(p) for p in pictures)}
    all numbers: {folder / "metrics.json"}

Try next:
    {commands}/lm-generate model={folder}/model prompt="a red apple" n=8
    {commands}/vq-train images=folder images.source.path=YOUR_PICTURES out=runs/mine
    {commands}/lm-train store={folder}/store head=depth_transformer out=runs/depth"""


main = command("vqlm_demo", demo)

if __name__ == "__main__":
    main()
