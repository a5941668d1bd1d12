"""How fast are pictures drawn? Ours, transformers' `generate`, a bare loop, and the memory's bandwidth.

    python benchmarks/generate.py [--pictures 1 8] [--rounds 3] [--out [FILE]]

Prediction, to be held against the table that it prints (CPU, bf16, medians of ratios within a round): ours draws at
least 2.8 times as fast as transformers with its own guidance and 1.6 times as fast as with batched guidance at one
picture, 2.5 and 1.6 times at eight; of Q = 4 codes a cell, heads draw at least 3.4 times as many a second as the
flattened sequence.

One model draws the same pictures of 256 codes after the same prompts of 16 ids, greedily, with guidance 3: a trunk of
85 M weights (12 layers of 768) and 16,384 text ids and 16,384 codes. Contestants take turns.

- ours: `lm.decoding.draw_images`.
- transformers, own guidance: `generate(guidance_scale=3)`, which runs the model twice a step.
- transformers, batched guidance: rows doubled, the halves joined in a logits processor.
- bare loop: the trunk with a DynamicCache, both halves in a batch, the legal rows of the output matrix, argmax.
- roofline: the bytes of the weights that a step must read, at the bandwidth that copying reaches.

Legend: B rows, T positions, V ids, L positions of a picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import record
import torch
from record import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessor

from lm.decoding import Sampling, draw_images
from lm.heads import Head
from lm.heads.depth_transformer import DepthTransformerHead
from lm.heads.layered import LayeredHead
from lm.heads.linear import LinearHead
from lm.model import MultimodalLM, from_scratch
from lm.sequence import LAYOUTS, Laid, SequenceFormat, Text
from lm.vocab import Vocabulary

WIDTH, LAYERS, TEXT_IDS, CODES, SCALE, PROMPT = 768, 12, 16_384, 16_384, 3.0, 16
OURS, OWN, BATCHED, BARE = "ours", "transformers, own guidance", "transformers, batched guidance", "bare loop"
BARS = {(1, OWN): 2.8, (1, BATCHED): 1.6, (8, OWN): 2.5, (8, BATCHED): 1.6}
HEAD_BAR = 3.4


def make_model(layout: str, grid: tuple[int, int], depth: int, head: str, dtype: torch.dtype) -> MultimodalLM:
    """Random weights. With depth the codes of all depths share CODES rows, so that the matrix has one size."""
    vocabulary = Vocabulary(*range(TEXT_IDS, TEXT_IDS + 5), TEXT_IDS + 5, CODES // depth, depth)
    form = SequenceFormat(vocabulary, LAYOUTS[layout](), (grid,))
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }
    lm = from_scratch(config, vocabulary.size, 0)
    torch.manual_seed(0)
    made: dict[str, Callable[[], Head]] = {
        "linear": lambda: LinearHead(form.width),
        "layered": lambda: LayeredHead(form.width, WIDTH, LAYERS),
        "depth_transformer": lambda: DepthTransformerHead(form.width, WIDTH, LAYERS),
    }
    return MultimodalLM(lm, made[head](), form).to(dtype).eval()


def prompts(form: SequenceFormat, count: int) -> list[Laid]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TEXT_IDS, (count, PROMPT), generator=random).tolist()
    return [form.image_prompt([Text(tuple(row))]) for row in ids]


# --- contestants --------------------------------------------------------------------------------------------------


def ours(model: MultimodalLM, count: int) -> Tensor:
    """Codes (B,L)."""
    drawn = draw_images(model, prompts(model.form, count), Sampling(SCALE, 0.0), [0] * count)
    return torch.stack([picture.codes_hwQ.flatten() for picture in drawn])


class Codes(LogitsProcessor):
    """Only codes; where `guided`, the rows are conditioned ones and then their twins, and get one answer."""

    def __init__(self, form: SequenceFormat, guided: bool):
        self.start, self.stop, self.guided = form.vocabulary.image_offset, form.vocabulary.size, guided

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        legal = scores[:, self.start : self.stop]
        if self.guided:
            c, u = legal.float().chunk(2)
            legal = (u + SCALE * (c - u)).repeat(2, 1).to(scores.dtype)
        masked[:, self.start : self.stop] = legal
        return masked


def batched(model: MultimodalLM, count: int) -> Tensor:
    form, v = model.form, model.form.vocabulary
    rows_BT = torch.stack([laid.ids_TW[:, 0] for laid in prompts(form, count)])
    twin_BT = torch.full_like(rows_BT, v.pad)
    twin_BT[:, -2:] = torch.tensor([v.bos, v.image_start])
    ids_BT = torch.cat([rows_BT, twin_BT])
    out = model.lm.generate(
        ids_BT,
        attention_mask=(ids_BT != v.pad).long(),
        max_new_tokens=form.longest_picture,
        do_sample=False,
        logits_processor=[Codes(form, True)],
        eos_token_id=None,
        pad_token_id=v.pad,
    )
    return out[:count, ids_BT.shape[1] :] - v.image_offset


def own(model: MultimodalLM, count: int) -> Tensor:
    form, v = model.form, model.form.vocabulary
    rows_BT = torch.stack([laid.ids_TW[:, 0] for laid in prompts(form, count)])
    twin_BT = torch.tensor([[v.bos, v.image_start]]).expand(count, 2)
    out = model.lm.generate(
        rows_BT,
        negative_prompt_ids=twin_BT,
        negative_prompt_attention_mask=torch.ones_like(twin_BT),
        guidance_scale=SCALE,
        max_new_tokens=form.longest_picture,
        do_sample=False,
        logits_processor=[Codes(form, False)],
        eos_token_id=None,
        pad_token_id=v.pad,
    )
    return out[:, rows_BT.shape[1] :] - v.image_offset


@torch.inference_mode()
def bare(model: MultimodalLM, count: int) -> Tensor:
    """What one writes by hand for this model and these prompts."""
    form, v, trunk = model.form, model.form.vocabulary, model.lm.base_model
    rows_BT = torch.stack([laid.ids_TW[:, 0] for laid in prompts(form, count)])
    twin_BT = torch.full_like(rows_BT, v.pad)
    twin_BT[:, -2:] = torch.tensor([v.bos, v.image_start])
    new_BT = torch.cat([rows_BT, twin_BT])
    seen_BT = (new_BT != v.pad).long()
    output = model.lm.get_output_embeddings().weight[v.image_offset : v.size]
    cache, drawn = DynamicCache(config=model.lm.config), []
    for _ in range(form.longest_picture):
        positions_BT = (seen_BT.cumsum(1) - 1).clamp(min=0)[:, -new_BT.shape[1] :]
        made = trunk(
            input_ids=new_BT,
            attention_mask=seen_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        )
        c, u = F.linear(made.last_hidden_state[:, -1], output).float().chunk(2)
        code_B = (u + SCALE * (c - u)).argmax(-1)
        drawn.append(code_B)
        new_BT = (code_B + v.image_offset).repeat(2)[:, None]
        seen_BT = torch.cat([seen_BT, torch.ones_like(new_BT)], 1)
    return torch.stack(drawn, 1)


CONTESTANTS = {OURS: ours, OWN: own, BATCHED: batched, BARE: bare}


# --- the limit ----------------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """Bytes a second that summing a large tensor reads; the best of some rounds."""
    large = torch.ones(2**27)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - start)
    return large.numel() * 4 / min(seconds)


def step_bytes(model: MultimodalLM) -> int:
    """Weights that one step reads: the layers, and the output rows of one depth."""
    layers = sum(p.numel() for name, p in model.lm.base_model.named_parameters() if "embed" not in name)
    return (layers + CODES // model.form.vocabulary.depth * WIDTH) * next(model.parameters()).element_size()


# --- rounds -------------------------------------------------------------------------------------------------------


def race(
    model: MultimodalLM, count: int, rounds: int, names: list[str]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds a step of each contestant in each round; how many of its first greedy codes are ours."""
    found: dict[str, list[float]] = {name: [] for name in names}
    same = {}
    for turn in range(rounds + 1):  # the first is not counted
        codes = {}
        for name in names:
            start = time.perf_counter()
            codes[name] = CONTESTANTS[name](model, count)
            if turn:
                found[name].append((time.perf_counter() - start) * 1000 / model.form.longest_picture)
        if turn == 0:
            equal = {name: (codes[name] == codes[OURS]).float().cumprod(1).sum(1).mean() for name in names}
            same = {name: round(float(first)) for name, first in equal.items()}
    return found, same


def contestants(asked: argparse.Namespace, dtype: torch.dtype) -> tuple[list[Table], list[str]]:
    """A table for each number of pictures, and what was predicted of it."""
    model = make_model("flat", (asked.side, asked.side), 1, "linear", dtype)
    speed = bandwidth()
    floor = f"{step_bytes(model) / speed * 1000:.1f}"
    tables, found = [], []
    for count in asked.pictures:
        times, same = race(model, count, asked.rounds, list(CONTESTANTS))
        rows = []
        for name, taken in times.items():
            ratio = median(a / b for a, b in zip(taken, times[OURS], strict=True))
            rows.append(
                [
                    name,
                    f"{median(taken):.1f}",
                    f"{ratio:.2f}",
                    str(BARS.get((count, name), "")),
                    str(same[name]),
                ]
            )
            if (count, name) in BARS:
                found.append(held(f"{count} at a time, {name}", ratio, BARS[count, name]))
        rows.append([f"roofline, {speed / 1e9:.1f} GB/s", floor, "", "", ""])
        columns = ["", "ms a step", "times ours", "predicted", f"of {asked.side**2} codes the first equal"]
        tables.append(Table(f"pictures at a time: {count}", columns, rows))
        print(f"\n{tables[-1]}", flush=True)
    return tables, found


def held(what: str, ratio: float, bar: float) -> str:
    return f"{what} {ratio:.2f} (predicted {bar}: {'yes' if ratio >= bar else 'NO'})"


def heads(rounds: int, side: int, dtype: torch.dtype) -> tuple[Table, str]:
    """Q = 4 codes in each of side² cells: codes a second, flattened and by heads."""
    kinds = {"flattened": ("flat", "linear"), "layered": ("stacked", "layered")}
    kinds["depth_transformer"] = ("stacked", "depth_transformer")
    models = {
        name: make_model(layout, (side, side), 4, head, dtype) for name, (layout, head) in kinds.items()
    }
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            ours(model, 1)
            if turn:
                found[name].append(4 * side * side / (time.perf_counter() - start))
    ratios = {
        name: median(a / b for a, b in zip(speeds, found["flattened"], strict=True))
        for name, speeds in found.items()
    }
    rows = [[name, f"{median(speeds):.0f}", f"{ratios[name]:.2f}"] for name, speeds in found.items()]
    made = Table(f"Q = 4 codes in each of {side * side} cells", ["", "codes/s", "times flattened"], rows)
    return made, held("layered head against flattened", ratios["layered"], HEAD_BAR)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Drawing speed: ours, transformers' generate, a bare loop, the limit."
    )
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp32", action="store_true", help="instead of bf16: greedy codes are then equal")
    parser.add_argument("--side", type=int, default=16, help="cells of a row and of a column (default 16)")
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    dtype = torch.float32 if asked.fp32 else torch.bfloat16
    about = record.machine(torch.get_num_threads(), "transformers")
    print(f"{record.told(about)}, {dtype}", flush=True)
    tables, found = contestants(asked, dtype)
    by_heads, told = heads(asked.rounds, asked.side // 2, dtype)
    verdict = f"ours, times as fast: {'; '.join([*found, told])}"
    print(f"\n{by_heads}\n\n{verdict}", flush=True)
    precision = {"dtype": str(dtype).removeprefix("torch.")}
    record.keep(asked.out, __doc__, about | precision, verdict, [*tables, by_heads])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
