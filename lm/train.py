"""Command `lm-train`: a store of codes and captions → a multimodal language model.

    lm-train store=runs/store out=runs/lm head=depth_transformer

Leaves in `out`: model/ (the bundle, with its card and numbers), checkpoints/, metrics.json, log.jsonl, samples.png, the
resolved config.yaml, and retention.jsonl where there are texts.
Run again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vqlm.command import command
from vqlm.errors import ConfigError

# torch, transformers and all that: seconds, which `--help` and a mistyped key do not wait for. `train` imports them.
if TYPE_CHECKING:
    import lm.callbacks
    import lm.decoding
    import lm.heads
    import lm.learner
    import lm.mixture
    import lm.sequence
    import lm.source
    import lm.texts
    import lm.tune
    import vqlm.hardware

TOKENIZER_TEXTS = 20_000  # of a corpus that a new text tokenizer looks at, beside the captions
TOKENIZER_CAPTIONS = 200_000  # of a store that is read in parts; of one in memory it looks at all


def train(
    store: str,
    lm: lm.source.Source,
    tune: lm.tune.Tune,
    layout: lm.sequence.Flat | lm.sequence.Stacked | lm.sequence.Delayed,
    head: Callable[..., lm.heads.Head],
    row_ends: bool,
    picture_attention: lm.sequence.PictureAttention,
    learner: Callable[..., lm.learner.LMLearner],
    texts: lm.texts.Texts,
    mixture: lm.mixture.Mixture,
    retention: lm.callbacks.Retention,
    documents: int,
    row_length: int | None,
    sampling: lm.decoding.Sampling,
    train_captions: int,
    heldout_captions: int,
    seed: int,
    out: str,
    resume: Literal["auto", "never"],
    device: vqlm.hardware.Device,
    devices: int,
    strategy: vqlm.hardware.Strategy,
    precision: vqlm.hardware.Precision,
    workers: int,
    checkpoint_minutes: float,
) -> None:
    """Train a language model to read and write text and pictures, then measure it."""
    from lm.architecture import check_context, check_widths
    from lm.data import Encoded, PairsInParts, identity, open_store, read_documents, read_pairs
    from lm.evaluate import report
    from lm.mixture import DocumentBatches
    from lm.model import decoder_layers
    from lm.parts import PartedBatches, check_not_written
    from lm.pipeline import Pipeline, images_of, pictures_of
    from lm.sequence import Delayed
    from lm.texts import NoTexts, repair
    from vqlm.hardware import detect
    from vqlm.ranks import rank, rank_count, start
    from vqlm.training import check_loading, fit

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
    if not codes.in_memory:
        check_not_written(mixture, codes.folder)
    images = images_of(codes)
    pictures = pictures_of(codes, images, row_ends)
    corpus = texts.train() if mixture.text else []
    sample = codes.sample("train", TOKENIZER_CAPTIONS)
    captions = [repair(caption)[0] for caption in sample.captions("train")]
    extended = lm.build([*captions, *corpus[:TOKENIZER_TEXTS]], pictures, seed)
    check_context(extended.lm.config, layout.length(max(h * w for h, w in codes.grids), codes.depth))
    made = head(
        width=layout.width(codes.depth),
        hidden_size=extended.lm.config.hidden_size,
        trunk_layers=len(decoder_layers(extended.lm.base_model)),
    )
    check_widths(extended.lm, made)
    pipeline = Pipeline.assemble(extended, made, layout, images, codes.grids, sampling, picture_attention)
    form, encode = pipeline.model.form, pipeline.encode_text
    read = read_pairs if codes.in_memory else PairsInParts
    pairs = read(codes, "train", encode, mixture.longest_caption)
    wanted = mixture.documents if mixture.written else None
    written = read_documents(wanted, codes, "train", encode) if wanted else []

    def batches(total: int) -> DocumentBatches | PartedBatches:
        given = (form, mixture, documents, row_length, seed, total, Encoded(corpus, encode))
        if isinstance(pairs, PairsInParts):
            return PartedBatches(pairs, *given, rank=rank(), ranks=rank_count())
        return DocumentBatches(pairs, *given, written, rank=rank(), ranks=rank_count())

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
        "flops": training.flops,
        "bad_batches": training.bad_batches,
        "drift": training.drift.report(),
        "parameters": parameters,
        "trained_parameters": moved,
        "captions": pairs.counts if codes.in_memory else {},
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
