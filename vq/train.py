"""Command `vq-train`: pictures → an image tokenizer.

    vq-train images=folder images.source.path=DIR out=runs/mine

Leaves in `out`: tokenizer/ (with its card; loadable with ImageTokenizer.from_pretrained), checkpoints/, metrics.json,
log.jsonl, reconstructions.png, code_use.png and the resolved config.yaml; where a watch is kept, watch.jsonl and best/,
the tokenizer with the highest held-out PSNR so far; scorer/NAME of each semantic loss. Run again, it goes on where it
stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.files import write_json

# torch, lightning and all that: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    import vq.batches
    import vq.callbacks
    import vq.data
    import vq.learner
    import vq.tokenizer
    import vqlm.hardware


def train(
    images: vq.data.ImageData,
    tokenizer: vq.tokenizer.ImageTokenizer,
    learner: Callable[..., vq.learner.TokenizerLearner],
    augment: vq.batches.Augment | vq.batches.NoAugment,
    watch: vq.callbacks.NoWatch,
    batch_size: int,
    seed: int,
    out: str,
    resume: Literal["auto", "never"],
    device: vqlm.hardware.Device,
    precision: vqlm.hardware.Precision,
    workers: int,
    checkpoint_minutes: float,
) -> None:
    """Train an image tokenizer on pictures, then measure it."""
    from vq.batches import PictureBatches
    from vq.evaluate import report, settle_size
    from vq.quantizers import CodebookQuantizer
    from vq.tokenizer import ImageTokenizer
    from vqlm.hardware import detect
    from vqlm.training import check_loading, fit

    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    check_loading(workers, checkpoint_minutes)
    hardware = detect(device, precision)
    settle_size(images, tokenizer)
    training = learner(tokenizer=tokenizer)
    training.check(images.shapes)
    print(f"{describe(tokenizer)} on {hardware}")
    if not isinstance(tokenizer.quantizer, CodebookQuantizer) and tokenizer.depth:
        print(f"reset: {type(tokenizer.quantizer).__name__} has no codebook to re-initialise, so none is")
    images.setup()
    print(images.report())
    if batch_size > (count := sum(map(len, images.train_sets))):
        print(f"batch_size={batch_size}: a batch repeats pictures, there are {count}")
    folder = Path(out)
    write_json(folder / "rejects.json", images.rejects)
    watch.look_at(images, folder)
    trained = fit(
        training,
        lambda total: PictureBatches(images.train_sets, batch_size, seed, augment, total),
        folder,
        hardware,
        "training the tokenizer",
        workers,
        checkpoint_minutes,
        {"pictures": images.digest},
        [watch],
    )
    if trained or not (folder / "tokenizer").is_dir():
        finish(training, images, batch_size, folder / "tokenizer")
    tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer").to(hardware.device)
    watched = watch.conclude(tokenizer)
    run = {
        "batches": training.batches_seen,
        "images": training.samples_seen,
        "minutes": training.seconds / 60,
    }
    metrics = report(
        tokenizer,
        images,
        folder,
        batch_size,
        {"run": {**run, "bad_batches": training.bad_batches}, **watched},
    )
    tokenizer.save_card(folder / "tokenizer", metrics)
    print(f"tokenizer: {folder / 'tokenizer'}   pictures: {folder / 'reconstructions.png'}")
    if warning := watch.verdict():
        print(f"watch: {warning}", file=sys.stderr)


def describe(tokenizer: vq.tokenizer.ImageTokenizer) -> str:
    """One line: how large, and what a picture becomes."""
    parameters = sum(p.numel() for p in tokenizer.parameters())
    side, grid = tokenizer.image_size, tokenizer.image_size // tokenizer.downsample
    codes = f"{grid}x{grid}x{tokenizer.depth} codes of {tokenizer.codebook_size}"
    latent = f"{grid}x{grid} vectors of {tokenizer.encoder.latent_dim} numbers (continuous)"
    made = codes if tokenizer.depth else latent
    return f"tokenizer of {parameters / 1e6:.1f} M parameters, {side}x{side} px → {made},"


def finish(
    training: vq.learner.TokenizerLearner, images: vq.data.ImageData, batch_size: int, target: Path
) -> None:
    """See to it that every code is used, then save. Done once: a store depends on each bit of what is saved."""
    from vq.losses.semantic import save_scorer
    from vq.quantizers import CodebookQuantizer

    if isinstance(training.model.quantizer, CodebookQuantizer):
        print("settling the codebooks on all training pictures (long for large codebooks)")
    unused = training.finish(images.train_sets, batch_size)
    if any(unused):
        print(
            f"codes that no training picture uses, per codebook: {unused}: the set has too few distinct patches"
        )
    result: Any = training.result
    save_scorer(training.terms, result, target.parent / "scorer")
    result.save_pretrained(target)


main = command("vq_train", train, free=("device", "precision", "workers", "checkpoint_minutes", "watch"))

if __name__ == "__main__":
    main()
