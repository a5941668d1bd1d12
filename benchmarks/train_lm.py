"""How many tokens a second does a language model of text and pictures learn? Ours, transformers' way, a bare loop.

    python benchmarks/train_lm.py [--out [FILE]]        # about 5 minutes on 2 cores

Prediction, to be held against the table that it prints: with 49,152 text ids and 16,384 codes beside a trunk of 85 M
weights (12 layers of 768, LlamaGen's GPT-B), `lm-train`'s own step learns at least 1.25 times as many tokens a second
as the same trunk in transformers under Lightning, because a code does not pay for the text vocabulary; and it reaches
at least 0.4 of the bf16 matmul peak on a CPU.

Three contestants train the same architecture on the same 8 rows of 320 positions (60 text ids, 256 codes, marks), in
bf16 autocast with fused AdamW and clipping, in one process. They take turns; a turn is some steps, of which the first
is not timed. Tokens/s are medians of turns, ratios medians of the ratios within a round.

- ours: `LMLearner` with the legal loss, in the loop of `vqlm.training`.
- transformers + Lightning: a causal LM over the full vocabulary as its users train it: `lm(input_ids, labels).loss`.
- minimal: a loop by hand over the full vocabulary, logits made in parts.

MFU is the share of the peak that the operations *each contestant's own model* needs would take
(`lm.learner.model_flops` with its own loss); "useful": the same for the operations that ours needs, whatever the
contestant spends besides. The peak is that of a 2048x2048 matrix product in bf16, measured between the rounds (on a
GPU: the data sheet).

Legend: B rows, T positions, V ids.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import lightning as L
import record
import torch
from record import Table
from torch.utils.data import DataLoader

from lm.heads.linear import LinearHead
from lm.learner import LMLearner, model_flops
from lm.model import MultimodalLM, from_scratch
from lm.objectives.full_vocabulary import FullVocabulary
from lm.objectives.next_token import NextToken
from lm.objectives.scoring import score
from lm.packing import Batch, pack
from lm.sequence import Flat, Image, SequenceFormat, Text
from lm.vocab import Vocabulary
from vqlm import training
from vqlm.hardware import Hardware, _matmul_seconds, detect
from vqlm.training import Budget

OURS, USUAL, MINIMAL = "ours", "transformers + Lightning", "minimal"
PREDICTED_RATIO, PREDICTED_MFU = 1.25, 0.4
GRID = (16, 16)


def made_form(text_ids: int, codes: int) -> SequenceFormat:
    """Text ids, then five marks, then the codes of one depth."""
    marks = range(text_ids, text_ids + 5)
    return SequenceFormat(Vocabulary(*marks, text_ids + 5, codes, 1), Flat(), (GRID,))


def made_batch(form: SequenceFormat, rows: int, text: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    top = form.vocabulary.bos
    documents = []
    for _ in range(rows):
        words = torch.randint(0, top, (text,), generator=random).tolist()
        codes_hwQ = torch.randint(0, form.vocabulary.codebook_size, (*GRID, 1), generator=random)
        documents.append(form.lay([Text(tuple(words)), Image(codes_hwQ)]))
    return pack(documents, form, len(documents[0]))


def made_model(form: SequenceFormat, layers: int, width: int) -> MultimodalLM:
    heads = max(1, width // 64)
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 8 * width // 3 // 64 * 64 or 64,
        "tie_word_embeddings": True,
    }
    return MultimodalLM(from_scratch(config, form.vocabulary.size, 0), LinearHead(1), form).train()


def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


# --- contestants: steps → seconds of all but the first -----------------------------------------------------------


class Timer(L.Callback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.moments.append(now(self.device))

    @property
    def seconds(self) -> float:
        return self.moments[-1] - self.moments[0]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ours(model: MultimodalLM, batch: Batch, hardware: Hardware) -> Callable[[int], float]:
    learner = LMLearner(model, NextToken(), adam, Budget(batches=10**6))

    def turn(steps: int) -> float:
        timer = Timer(hardware.device)
        learner.to(hardware.device)
        training._train(learner, loader(batch, steps), hardware, [timer])
        return timer.seconds

    return turn


class Usual(L.LightningModule):
    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        ids_BT = batch.ids_BTW[..., 0]
        return self.lm(input_ids=ids_BT, labels=ids_BT).loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Trainer(gradient_clip_val=…) refuses the fused optimizer, which is the faster one
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.parameters())


def usual(model: MultimodalLM, batch: Batch, hardware: Hardware) -> Callable[[int], float]:
    module = Usual(model.lm)

    def turn(steps: int) -> float:
        timer = Timer(hardware.device)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            **hardware.lightning,  # type: ignore[arg-type]
            **quiet,
            max_epochs=1,
            enable_model_summary=False,
            callbacks=[timer],
        )
        trainer.fit(module, loader(batch, steps))
        return timer.seconds

    return turn


def minimal(model: MultimodalLM, batch: Batch, hardware: Hardware) -> Callable[[int], float]:
    lm: Any = model.lm
    size = model.form.vocabulary.size

    def turn(steps: int) -> float:
        lm.to(hardware.device)
        optimizer = turn.optimizer = getattr(turn, "optimizer", None) or adam(lm.parameters())  # type: ignore
        ids_BT = batch.ids_BTW[..., 0].to(hardware.device)
        moments = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            bf16 = hardware.precision == "bf16"
            with torch.autocast(hardware.device.type, torch.bfloat16, enabled=bf16):
                hidden_BTC = lm.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
                hidden_NC, next_N = hidden_BTC[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
                logits = lambda part_nC: lm.get_output_embeddings()(part_nC).float()  # noqa: E731
                loss = score(hidden_NC, next_N, logits, size, limit=2**25).mean
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            moments.append(now(hardware.device))
        return moments[-1] - moments[0]

    return turn


def loader(batch: Batch, steps: int) -> DataLoader:
    return DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]


CONTESTANTS = {OURS: ours, USUAL: usual, MINIMAL: minimal}


# --- the measurement ----------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    hardware = detect(arguments.device, "bf16")
    form = made_form(arguments.text_ids, arguments.codes)
    batch = made_batch(form, arguments.rows, arguments.text)
    models = {name: made_model(form, arguments.layers, arguments.width) for name in CONTESTANTS}
    turns = {name: make(models[name], batch, hardware) for name, make in CONTESTANTS.items()}
    tokens = int((batch.document_BT >= 0).sum())
    useful = model_flops(models[OURS], NextToken(), batch)
    full = model_flops(models[USUAL], FullVocabulary(), batch)
    rates: dict[str, list[float]] = {name: [] for name in turns}
    peaks = []
    for number in range(arguments.rounds):
        peaks.append(peak(hardware))
        for name in list(turns)[:: 1 if number % 2 else -1]:
            rates[name].append(tokens * (arguments.steps - 1) / turns[name](arguments.steps))
            told = f"round {number + 1} of {arguments.rounds}, {name}: {rates[name][-1]:.0f} tokens/s"
            print(told, file=sys.stderr, flush=True)
    limit = median(peaks)
    rows = {}
    for name, found in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(found, rates[USUAL], strict=True)]
        rows[name] = {
            "tokens_per_second": median(found),
            "all": found,
            "times_usual": median(ratios),
            "times_usual_range": [min(ratios), max(ratios)],
            "mfu": median(found) / tokens * (useful if name == OURS else full) / limit,
            "useful": median(found) / tokens * useful / limit,
        }
    weights = sum(p.numel() for p in models[OURS].parameters())
    title = f"{weights / 1e6:.0f} M weights, {tokens} tokens a step, {hardware}, bf16 matmul {limit / 1e9:.0f} GFLOP/s"
    return {"title": title, "contestants": rows}


def peak(hardware: Hardware) -> float:
    if hardware.device.type == "cuda":
        return training.peak_flops(hardware)
    return 2 * 2048**3 / _matmul_seconds(torch.bfloat16, 2048)


def table(result: dict[str, Any]) -> Table:
    rows = []
    for name, row in result["contestants"].items():
        low, high = row["times_usual_range"]
        ratio = [f"{row['times_usual']:.2f}", f"{low:.2f}-{high:.2f}"]
        rows.append(
            [name, f"{row['tokens_per_second']:.0f}", *ratio, f"{row['mfu']:.2f}", f"{row['useful']:.2f}"]
        )
    return Table(result["title"], ["", "tokens/s", "x transformers", "range", "MFU", "useful"], rows)


def verdict(result: dict[str, Any]) -> str:
    mine = result["contestants"][OURS]
    bars = {"times_usual": ("x transformers", PREDICTED_RATIO), "mfu": ("MFU", PREDICTED_MFU)}
    return "; ".join(
        f"{what} {mine[key]:.2f} (predicted {bar}: {'holds' if mine[key] >= bar else 'MISSED'})"
        for key, (what, bar) in bars.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (
        ("rounds", 3),
        ("steps", 4),
        ("rows", 8),
        ("text", 60),
        ("layers", 12),
        ("width", 768),
        ("text-ids", 49152),
        ("codes", 16384),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    record.add_out(parser, __file__)
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.rounds < 1:
        parser.error("--steps must be at least 2 (the first is not timed) and --rounds at least 1")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    about = record.machine(torch.get_num_threads(), "lightning", "transformers", device=device)
    print(record.told(about), flush=True)
    result = measure(arguments)
    made, found = table(result), verdict(result)
    print(f"\n{made}\n\n{found}")
    record.keep(arguments.out, __doc__, about, found, [made])


if __name__ == "__main__":
    main()
