"""Command `vq-train`: pictures → an image tokenizer.

    vq-train images=folder images.source.path=DIR out=runs/mine

Leaves in `out`: tokenizer/ (loadable with ImageTokenizer.from_pretrained), checkpoints/, metrics.json, log.jsonl,
reconstructions.png, code_use.png and the resolved config.yaml. Run again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vq.batches import Augment, NoAugment, PictureBatches
from vq.data import ImageData
from vq.evaluate import report, settle_size
from vq.learner import TokenizerLearner
from vq.tokenizer import ImageTokenizer
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import write_json
from vqlm.hardware import Device, Precision, detect
from vqlm.training import check_loading, fit


def train(
    images: ImageData,
    tokenizer: ImageTokenizer,
    learner: Callable[..., TokenizerLearner],
    augment: Augment | NoAugment,
    batch_size: int,
    seed: int,
    out: str,
    resume: Literal["auto", "never"],
    device: Device,
    precision: Precision,
    workers: int,
    checkpoint_minutes: float,
) -> None:
    """Train an image tokenizer on pictures, then measure it."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    check_loading(workers, checkpoint_minutes)
    hardware = detect(device, precision)
    settle_size(images, tokenizer)
    training = learner(tokenizer=tokenizer)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    grid = tokenizer.image_size // tokenizer.downsample
    print(
        f"tokenizer of {parameters / 1e6:.1f} M parameters on {hardware}: "
        f"{tokenizer.image_size}x{tokenizer.image_size} px → {grid}x{grid}x{tokenizer.depth} codes of "
        f"{tokenizer.codebook_size}"
    )
    images.setup()
    print(images.report())
    folder = Path(out)
    write_json(folder / "rejects.json", images.rejects)
    trained = fit(
        training,
        lambda total: PictureBatches(images.train, batch_size, seed, augment, total),
        folder,
        hardware,
        "training the tokenizer",
        workers,
        checkpoint_minutes,
        {"pictures": images.digest},
    )
    if trained or not (folder / "tokenizer").is_dir():
        finish(training, images, batch_size, folder / "tokenizer")
    tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer")
    run = {
        "batches": training.batches_seen,
        "images": training.samples_seen,
        "minutes": training.seconds / 60,
    }
    report(
        tokenizer.to(hardware.device),
        images,
        folder,
        batch_size,
        {"run": {**run, "bad_batches": training.bad_batches}},
    )
    print(f"tokenizer: {folder / 'tokenizer'}   pictures: {folder / 'reconstructions.png'}")


def finish(training: TokenizerLearner, images: ImageData, batch_size: int, target: Path) -> None:
    """See to it that every code is used, then save. Done once: a store depends on each bit of what is saved."""
    unused = training.finish([images.train], batch_size)
    if any(unused):
        print(
            f"codes that no training picture uses, per depth: {unused}: the set has too few distinct patches"
        )
    result: Any = training.result
    result.save_pretrained(target)


main = command("vq_train", train, free=("device", "precision", "workers", "checkpoint_minutes"))

if __name__ == "__main__":
    main()
