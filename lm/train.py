"""Command `lm-train`: a store of codes and captions → a multimodal language model.

    lm-train store=runs/store out=runs/lm head=depth_transformer

Leaves in `out`: model/ (the bundle, with its card and numbers), checkpoints/, metrics.json, log.jsonl, samples.png, the
resolved config.yaml, and retention.jsonl where there are texts.
Run again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lm.architecture import check_context
from lm.callbacks import Retention
from lm.data import Encoded, identity, open_store, read_documents, read_pairs
from lm.decoding import Sampling
from lm.evaluate import report
from lm.heads import Head
from lm.learner import LMLearner
from lm.mixture import DocumentBatches, Mixture
from lm.model import decoder_layers
from lm.pipeline import Pipeline, images_of, pictures_of
from lm.sequence import Delayed, Flat, PictureAttention, Stacked
from lm.source import Source
from lm.texts import NoTexts, Texts, repair
from lm.tune import Tune
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.hardware import Device, Precision, Strategy, detect
from vqlm.ranks import rank, rank_count, start
from vqlm.training import check_loading, fit

TOKENIZER_TEXTS = 20_000  # of a corpus that a new text tokenizer looks at, beside the captions


def train(
    store: str,
    lm: Source,
    tune: Tune,
    layout: Flat | Stacked | Delayed,
    head: Callable[..., Head],
    row_ends: bool,
    picture_attention: PictureAttention,
    learner: Callable[..., LMLearner],
    texts: Texts,
    mixture: Mixture,
    retention: Retention,
    documents: int,
    row_length: int | None,
    sampling: Sampling,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    out: str,
    resume: Literal["auto", "never"],
    device: Device,
    devices: int,
    strategy: Strategy,
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
    if devices > documents:
        raise ConfigError(
            f"devices={devices} with documents={documents}: each process needs a document of a batch"
        )
    if row_ends and isinstance(layout, Delayed):
        raise ConfigError(
            "row_ends=true with layout=delayed: a row's last codes stand in the next row's positions"
        )
    if mixture.text and isinstance(texts, NoTexts):
        raise ConfigError(f"mixture.text={mixture.text} with texts=none: choose some, as texts=wordnet")
    check_loading(workers, checkpoint_minutes)
    hardware = detect(device, precision, devices, strategy)
    start(devices, hardware.device)

    codes = open_store(store)
    images = images_of(codes)
    pictures = pictures_of(codes, images, row_ends)
    corpus = texts.train() if mixture.text else []
    captions = [repair(caption)[0] for caption in codes.captions("train")]
    extended = lm.build([*captions, *corpus[:TOKENIZER_TEXTS]], pictures, seed)
    check_context(extended.lm.config, layout.length(max(h * w for h, w in codes.grids), codes.depth))
    made = head(
        width=layout.width(codes.depth),
        hidden_size=extended.lm.config.hidden_size,
        trunk_layers=len(decoder_layers(extended.lm.base_model)),
    )
    pipeline = Pipeline.assemble(extended, made, layout, images, codes.grids, sampling, picture_attention)
    form, encode = pipeline.model.form, pipeline.encode_text
    pairs = read_pairs(codes, "train", encode, mixture.longest_caption)
    wanted = mixture.documents if mixture.written else None
    written = read_documents(wanted, codes, "train", encode) if wanted else []

    def batches(total: int) -> DocumentBatches:
        given = (pairs, form, mixture, documents, row_length, seed, total, Encoded(corpus, encode), written)
        return DocumentBatches(*given, rank=rank(), ranks=rank_count())

    first = batches(1)  # an impossible mixture, or rows that are too short, end here
    check_context(extended.lm.config, form.longest_picture, first.longest)
    tune.prepare(pipeline.model, extended.first_new_row)
    training = learner(model=pipeline.model)
    soft = getattr(training.objective, "soft", None)
    if soft is not None and pictures.vectors_QKD is not None:
        soft.look_at(pictures.vectors_QKD)
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    moved = sum(p.numel() for p in pipeline.model.parameters() if p.requires_grad)
    print(
        f"{type(extended.lm).__name__} of {parameters / 1e6:.1f} M parameters, {moved / 1e6:.1f} M trained, on "
        f"{hardware}: {pairs.report()}, {texts.report()}, "
        f"{len(written)} written documents\npictures of {pipeline.sizes} (height, width), {layout.name} layout, "
        f"{form.longest_picture} positions a picture, {type(made).__name__}, {documents} documents a batch in rows of "
        f"{first.row_length}",
        flush=True,
    )
    retention.look_at(pipeline, texts.heldout(), out)
    fit(
        training,
        batches,
        out,
        hardware,
        "training the language model",
        workers,
        checkpoint_minutes,
        identity(codes, form, corpus, written) | {"tune": type(tune).__name__},
        [retention],
    )
    folder = Path(out)
    trained: Any = training.result
    pipeline.model = trained
    tune.finish(pipeline.model)
    pipeline.save_pretrained(folder / "model")  # first: a device may not have room for all of it
    pipeline.to(hardware.device)
    run = {
        "batches": training.batches_seen,
        "documents": training.samples_seen,
        "minutes": training.seconds / 60,
        "bad_batches": training.bad_batches,
        "parameters": parameters,
        "trained_parameters": moved,
        "captions": pairs.counts,
    }
    kept = retention.conclude(pipeline, training.batches_seen)
    pipeline.metrics = report(
        pipeline,
        store,
        folder,
        train_captions,
        heldout_captions,
        seed,
        {"run": run, **({"text": kept} if kept else {})},
    )
    pipeline.save_card(folder / "model")
    print(f"model: {folder / 'model'}   metrics and pictures: {folder}")


main = command(
    "lm_train", train, free=("device", "devices", "strategy", "precision", "workers", "checkpoint_minutes")
)

if __name__ == "__main__":
    main()
