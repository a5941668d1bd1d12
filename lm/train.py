"""Command `lm-train`: a store of codes and captions → a multimodal language model.

    lm-train store=runs/store out=runs/lm head=depth_transformer

Leaves in `out`: model/ (the bundle), checkpoints/, metrics.json, log.jsonl, samples.png and the resolved config.yaml.
Run again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lm.data import DocumentBatches, Mixture, open_store, read_pairs
from lm.decoding import Sampling
from lm.evaluate import report
from lm.heads import Head
from lm.learner import LMLearner
from lm.model import decoder_layers
from lm.pipeline import Pipeline
from lm.sequence import Flat, Stacked
from lm.source import Pretrained, Scratch
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.hardware import Device, Precision, detect
from vqlm.training import check_loading, fit


def train(
    store: str,
    lm: Scratch | Pretrained,
    layout: Flat | Stacked,
    head: Callable[..., Head],
    learner: Callable[..., LMLearner],
    mixture: Mixture,
    documents: int,
    row_length: int | None,
    sampling: Sampling,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    out: str,
    resume: Literal["auto", "never"],
    device: Device,
    precision: Precision,
    workers: int,
    checkpoint_minutes: float,
) -> None:
    """Train a language model to read and write text and pictures, then measure it."""
    if documents < 1 or train_captions < 0 or heldout_captions < 0:
        raise ConfigError(
            f"documents={documents} must be at least 1, "
            f"train_captions={train_captions} and heldout_captions={heldout_captions} not negative"
        )
    check_loading(workers, checkpoint_minutes)
    hardware = detect(device, precision)
    codes = open_store(store)
    extended = lm.build(codes.captions("train"), codes.codebook_size, codes.depth, seed)
    trunk = extended.lm.base_model
    made = head(
        width=layout.width(codes.depth),
        hidden_size=extended.lm.config.hidden_size,
        trunk_layers=len(decoder_layers(trunk)),
    )
    pipeline = Pipeline.assemble(extended, made, layout, codes, sampling)
    pairs = read_pairs(codes, "train", pipeline.encode_text)
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    print(
        f"language model of {parameters / 1e6:.1f} M parameters on {hardware}: {len(pairs):,} pairs, "
        f"{layout.name} layout, {pipeline.model.form.image_length} positions a picture, {type(made).__name__}"
    )
    training = learner(model=pipeline.model)
    fit(
        training,
        lambda total: DocumentBatches(
            pairs, pipeline.model.form, mixture, documents, row_length, seed, total
        ),
        out,
        hardware,
        "training the language model",
        workers,
        checkpoint_minutes,
        {"store": codes.digest, "vocabulary": extended.vocabulary.to_json()},
    )
    pipeline.to(hardware.device)
    folder = Path(out)
    pipeline.save_pretrained(folder / "model")
    run = {
        "batches": training.batches_seen,
        "documents": training.samples_seen,
        "minutes": training.seconds / 60,
    }
    extra = {"run": {**run, "bad_batches": training.bad_batches, "parameters": parameters}}
    report(pipeline, store, folder, train_captions, heldout_captions, seed, extra)
    print(f"model: {folder / 'model'}   metrics and pictures: {folder}")


main = command("lm_train", train, free=("device", "precision", "workers", "checkpoint_minutes"))

if __name__ == "__main__":
    main()
