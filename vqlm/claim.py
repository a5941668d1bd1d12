"""Command `vqlm-claim`: a belief of the field, put to the test.

    vqlm-claim experiment/claims=residual_codes
    vqlm-claim experiment/claims=residual_codes size=smoke seeds=[0]       # does it run?

Runs the commands of every cell and seed, reads figures from what they leave, and says whether the claim holds, fails,
or whether this was too small to tell. Leaves claim.json, claim.png (a panel a figure) and pictures.png in `out`.
Stopped and called again it goes on; a run that another claim has made already is not made again. Your own claim: a YAML
file like those of conf/experiment/claims, in DIR/experiment/claims, and --config-dir DIR.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from vqlm.command import command, compose
from vqlm.errors import ConfigError, nearest
from vqlm.experiment import Experiment
from vqlm.files import write_json
from vqlm.machine import machine
from vqlm.processes import COMMANDS
from vqlm.verdict import Comparison, overall


def claim(
    name: str,
    claim: str,
    source: str,
    predicted: str,
    steps: dict[str, list[str]],
    cells: dict[str, dict[str, list[str] | None]],
    figures: dict[str, str],
    holds: list[dict[str, Any]],
    pictures: str | None,
    sizes: dict[str, dict[str, list[str]]],
    size: Literal["auto", "smoke", "laptop", "gpu"],
    seeds: list[int],
    runs: str,
    out: str,
) -> None:
    """Run an experiment and say whether a claim holds."""
    if not cells:
        raise ConfigError("choose a claim: vqlm-claim experiment/claims=NAME (--help lists them)")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds={seeds}: one or more different numbers, none below 0")
    chosen = choose_size(sizes) if size == "auto" else size
    if chosen != "laptop" and chosen not in sizes:
        raise ConfigError(f"size={chosen}: this claim has {', '.join(['laptop', *sizes])} only")
    if chosen == "gpu" and choose_size(sizes) != "gpu":
        print("size=gpu: there is no GPU here; this may take days", file=sys.stderr)
    experiment = Experiment(steps, cells, figures, pictures, sizes.get(chosen, {}))
    comparisons = [comparison(told, f"holds.{n}", experiment) for n, told in enumerate(holds)]
    folder, kept = Path(out), Path(runs)
    check_differences(experiment, comparisons, seeds)
    configs = check_words(experiment, seeds, kept)
    result: dict[str, Any] = {
        "name": name,
        "claim": claim,
        "source": source,
        "predicted": predicted,
        "size": chosen,
        "experiment": {
            "steps": steps,
            "cells": cells,
            "figures": figures,
            "holds": holds,
            "more": sizes.get(chosen, {}),  # words of this size
        },
    }

    def conclude(whole: list[int]) -> None:
        """After each seed, so that a run that is stopped leaves what it knows."""
        found = experiment.read(kept, whole)
        judged = [{**asdict(each), **judge(each, found)} for each in comparisons]
        command = f"vqlm-claim experiment/claims={name} size={chosen} seeds=[{','.join(map(str, whole))}]"
        result.update(command=command, seeds=whole, figures=found, comparisons=judged)
        result.update(verdict=overall([each["verdict"] for each in judged]), machine=surroundings())
        write_json(folder / "claim.json", result)
        print(table(result), flush=True)

    minutes = experiment.make(kept, seeds, conclude, configs)
    finish({**result, "minutes": minutes}, experiment.picture_files(kept, seeds[0]), folder)


def choose_size(sizes: dict[str, Any]) -> str:
    import torch

    return "gpu" if torch.cuda.is_available() and "gpu" in sizes else "laptop"


def comparison(told: dict[str, Any], key: str, experiment: Experiment) -> Comparison:
    """One line of `holds`. ConfigError if it names what is not there."""
    try:
        made = Comparison(**told)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
    names = [("figure", made.figure, experiment.figures), ("cell", made.cell, experiment.cells)]
    names += [("than", made.than, experiment.cells)] if made.than is not None else []
    for part, name, there in names:
        if name not in there:
            raise ConfigError(
                f"{key}.{part}={name}: there is none{nearest(name, there)} (there are: {', '.join(there)})"
            )
    step = experiment.figures[made.figure].partition(":")[0]
    for cell in filter(None, (made.cell, made.than)):
        if step not in experiment.runs_of(cell, 0):
            raise ConfigError(f"{key}: cell {cell} does without the step {step}, where {made.figure} is read")
    return made


def check_differences(experiment: Experiment, comparisons: list[Comparison], seeds: list[int]) -> None:
    """ConfigError where a comparison would compare a run with itself: no difference looks like certainty."""
    for each in comparisons:
        step = experiment.figures[each.figure].partition(":")[0]

        def run_of(cell: str | None, seed: int, step: str = step) -> str | None:
            return experiment.runs_of(cell, seed)[step].digest if cell is not None else None

        what = f"{each.figure} of {each.cell}"
        if each.than is not None and run_of(each.cell, seeds[0]) == run_of(each.than, seeds[0]):
            raise ConfigError(
                f"{what}: {each.than} runs the same words at this size, so there is nothing to compare"
            )
        pairs = [(run_of(each.cell, seed), run_of(each.than, seed)) for seed in seeds[:2]]
        if len(pairs) > 1 and pairs[0] == pairs[1]:
            raise ConfigError(
                f"{what}: neither the step {step} nor one that it reads has {{seed}} among its words, so all seeds are "
                "one; add it, or seeds=[0]"
            )


def check_words(experiment: Experiment, seeds: list[int], runs: Path) -> dict[str, str]:
    """Digests of whole configurations, by run. ConfigError before anything is run, where the words of a step do not
    fit its command. Of the first seed: what the others differ in is a number."""
    configs = {}
    for _, cell, each in experiment.all_runs(seeds[:1]):
        module = import_module(COMMANDS[each.command])
        try:
            config = compose(module.main, [*each.told(runs), f"out={each.folder(runs).as_posix()}"])
        except ConfigError as error:
            raise ConfigError(f"step {each.step} of cell {cell} ({each.command}): {error}") from error
        told = json.dumps(config, sort_keys=True).replace(runs.as_posix(), "")  # runs may be moved
        configs[each.digest] = hashlib.sha256(told.encode()).hexdigest()[:12]
    return configs


def judge(each: Comparison, figures: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    try:
        values = each.values(figures)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"values": values, **asdict(each.judge(values))}


def surroundings() -> dict[str, Any]:
    """The machine, as it is now: of runs that were made before, the last one's."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return machine(torch.get_num_threads(), "transformers", "vqlm", device=device)


def finish(result: dict[str, Any], pictures: dict[str, Path], folder: Path) -> None:
    """Once all seeds are whole: the minutes of all runs, and what there is to look at."""
    from vqlm.plots import plot_cells, stack

    write_json(folder / "claim.json", result)
    plot_cells(result["figures"], folder / "claim.png")
    if pictures:
        stack(pictures, folder / "pictures.png")
    print(f"{result['minutes']:.1f} minutes in all: {folder / 'claim.json'}   {folder / 'claim.png'}")


def table(result: dict[str, Any]) -> str:
    """What a person reads first: figures by cell, what was compared, the verdict."""
    figures: dict[str, dict[str, list[float]]] = result["figures"]
    cells = list(dict.fromkeys(cell for by_cell in figures.values() for cell in by_cell))
    width = max(map(len, [*cells, ""])) + 2
    head = "".join(f"{name:>{max(len(name), 15) + 2}}" for name in figures)
    lines = [
        "",
        result["claim"],
        f"{'':{width}}{head}   ({len(result['seeds'])} seed(s), ± standard deviation)",
    ]
    for cell in cells:
        row = ""
        for name, by_cell in figures.items():
            values = by_cell.get(cell)
            spread = f" ± {stdev(values):.2g}" if values and len(values) > 1 else ""
            text = f"{fmean(values):.4g}{spread}" if values else "-"
            row += f"{text:>{max(len(name), 15) + 2}}"
        lines.append(f"{cell:{width}}{row}")
    lines += [sentence(each) for each in result["comparisons"]]
    return "\n".join([*lines, f"predicted: {result['predicted']}", f"verdict: {result['verdict']}"])


def sentence(judged: dict[str, Any]) -> str:
    """One comparison in words."""
    what = judged["cell"]
    if judged["than"] is not None:
        what += f" {'/' if judged['ratio'] else '-'} {judged['than']}"
    bar = f"at least {judged['least']:g}" if judged["least"] is not None else f"at most {judged['most']:g}"
    spread = "" if judged["low"] is None else f" ({judged['low']:.4g} to {judged['high']:.4g})"
    return f"{judged['figure']}: {what} = {judged['mean']:.4g}{spread}, said to be {bar}: {judged['verdict']}"


main = command("vqlm_claim", claim)

if __name__ == "__main__":
    main()
