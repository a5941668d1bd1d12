"""Drawing with vLLM: the requests that make it draw a whole picture, and the command that runs them.

    python -m lm.with_vllm runs/lm/model "a red apple" --n 4 --out drawings

vLLM reads a bundle's folder as the plain language model that it is (flat layout, linear head). A request there has one
set of `allowed_token_ids`, so a picture is drawn in runs of ids that come from one set: the whole picture where cells
have one code and no marks of row ends, a row where there are marks, an id where cells have several codes (their depths
alternate). What the format forces is appended and not drawn. Between runs vLLM's prefix cache keeps what was computed.

vLLM has no classifier-free guidance: what is drawn is what guidance 1 draws. vLLM itself is imported by the command
alone; `draw` takes any engine with its `generate`.

Legend: B rows, T positions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from lm.decoding import Sampling
from lm.processor import Size, VqlmProcessor
from lm.sequence import Grid, SequenceFormat
from vqlm.errors import ConfigError
from vqlm.hub import local_folder


@dataclass(frozen=True)
class Run:
    """So many ids, each from `allowed`; where that is one id alone, nothing has to be drawn."""

    allowed: range
    count: int

    @property
    def forced(self) -> list[int]:
        """The ids, where there is no choice."""
        return list(self.allowed) * self.count if len(self.allowed) == 1 else []


def picture_runs(form: SequenceFormat, grid: Grid) -> list[Run]:
    """What follows a prompt for a picture of a grid, <image_end> included. ValueError unless the layout is flat."""
    if form.width != 1:
        raise ValueError(f"layout {form.layout.name!r} has {form.width} ids a position; vLLM draws one: flat")
    v, runs = form.vocabulary, []
    for depth, positions in groupby(form.plan(grid)[:, 0].tolist()):
        if depth == v.depth and v.row_end is not None:
            allowed = range(v.row_end, v.row_end + 1)
        else:
            ids = v.image_range(depth)
            allowed = range(ids.start, ids.stop)
        runs.append(Run(allowed, len(list(positions))))
    return [*runs, Run(range(v.image_end, v.image_end + 1), 1)]


def sampling_params(run: Run, sampling: Sampling, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for a run: only its ids, and exactly so many. ValueError on guidance, and on
    other values that vLLM does not know.
    """
    known = Sampling(1.0, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if sampling != known:
        raise ValueError(
            f"{sampling}: vLLM knows temperature, top_k, top_p and min_p; guidance must be 1, and the others left out"
        )
    return {
        "allowed_token_ids": list(run.allowed),
        "max_tokens": run.count,
        "ignore_eos": True,  # it is not allowed, and nothing else may end a run early
        "detokenize": False,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": seed,
    }


def draw(
    engine: Any,
    params: Callable[..., Any],
    processor: VqlmProcessor,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int = 0,
    size: Size | None = None,
) -> list[list[int]]:
    """A picture for each prompt → rows (B,T) of ids, prompt included, for the processor's `read`.

    engine, params: vLLM's `LLM` and `SamplingParams`. ValueError where an engine gives what was not allowed.
    """
    runs = picture_runs(processor.translator.form, processor.translator.grid_of(size))
    inputs = processor(text=prompts, return_for_image_generation=True, size=size, padding=False)
    rows: list[list[int]] = inputs["input_ids"]
    for number, run in enumerate(runs):
        if run.forced:
            rows = [row + run.forced for row in rows]
            continue
        asked = [
            params(**sampling_params(run, sampling, run_seed(seed, place, number)))
            for place in range(len(rows))
        ]
        answers = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
        drawn = [list(answer.outputs[0].token_ids) for answer in answers]
        if wrong := [ids for ids in drawn if len(ids) != run.count or not set(ids) <= set(run.allowed)]:
            raise ValueError(
                f"the engine drew {wrong[0][:8]}: {run.count} ids of {run.allowed} were asked for"
            )
        rows = [row + ids for row, ids in zip(rows, drawn, strict=True)]
    return rows


def run_seed(seed: int, place: int, run: int) -> int:
    """Of a run of a row: with one seed for all runs each would draw with the same random numbers."""
    return int(np.random.SeedSequence([abs(seed), place, run]).generate_state(1, np.uint64)[0]) >> 1


def pictures(processor: VqlmProcessor, rows: Sequence[Sequence[int]]) -> list[PILImage.Image]:
    """What `draw` gave → pictures."""
    return [part for row in processor.read(rows) for part in row if isinstance(part, PILImage.Image)]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command was told; exit 2 on what it does not know."""
    parser = argparse.ArgumentParser("python -m lm.with_vllm", description="Draw pictures with vLLM.")
    parser.add_argument("model", help="a bundle of the flat layout with the linear head")
    parser.add_argument("prompt")
    parser.add_argument("--n", type=int, default=1, help="how many pictures")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("drawings"))
    return parser.parse_args(words)


def run(told: argparse.Namespace) -> list[Path]:
    """Write the pictures; returns their paths. ConfigError before a model is loaded, if something does not fit."""
    sampling = Sampling(1.0, told.temperature, told.top_k, told.top_p)
    if told.n < 1:
        raise ConfigError(f"n={told.n}: at least 1")
    processor = VqlmProcessor.from_pretrained(told.model)
    try:
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  not a dependency
    except ImportError as error:
        raise ConfigError(f"vLLM is not installed ({error}); see docs.vllm.ai for your machine") from error
    engine = LLM(model=str(local_folder(told.model)), enable_prefix_caching=True)
    rows = draw(engine, SamplingParams, processor, [told.prompt] * told.n, sampling, told.seed)
    told.out.mkdir(parents=True, exist_ok=True)
    made = [told.out / f"{number:04}.png" for number in range(told.n)]
    for path, picture in zip(made, pictures(processor, rows), strict=True):
        picture.save(path)
    return made


def main() -> None:
    told = arguments()
    try:
        print("\n".join(map(str, run(told))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
