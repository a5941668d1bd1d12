"""Command `vqlm-claim`: a belief of the field, put to the test.

    vqlm-claim experiment/claims=residual_codes
    vqlm-claim experiment/claims=residual_codes size=smoke seeds=[0]       # does it run?

Runs the commands of every cell and seed, reads figures from what they leave, and says whether the claim holds, fails,
or whether this was too small to tell. Leaves claim.json, claim.png (a panel a figure) and pictures.png in `out`.
Stopped and called again it goes on; a run that another claim has made already is not made again. Your own claim: a YAML
file like those of conf/experiment/claims, in DIR/experiment/claims, and --config-dir DIR.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from vqlm.command import command, compose
from vqlm.errors import ConfigError, nearest
from vqlm.experiment import Experiment
from vqlm.files import write_json
from vqlm.machine import machine
from vqlm.processes import COMMANDS
from vqlm.verdict import Comparison, overall

SIZES = ("smoke", "laptop", "gpu")


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
    if not (name and cells):
        raise ConfigError("choose a claim: vqlm-claim experiment/claims=NAME (--help lists them)")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds={seeds}: one or more different numbers, none below 0")
    chosen = choose_size(sizes) if size == "auto" else size
    if chosen != "laptop" and chosen not in sizes:
        raise ConfigError(f"size={chosen}: this claim has {', '.join(['laptop', *sizes])}")
    experiment = Experiment(steps, cells, figures, pictures, sizes.get(chosen, {}))
    comparisons = [comparison(told, f"holds.{n}", experiment) for n, told in enumerate(holds)]
    folder, kept = Path(out), Path(runs)
    check_seeds(experiment, seeds)
    check_words(experiment, seeds, kept)
    told = {"name": name, "claim": claim, "source": source, "predicted": predicted}
    told |= {"command": f"vqlm-claim experiment/claims={name}", "size": chosen}

    def conclude(whole: list[int]) -> None:
        """After each seed, so that a run that is stopped leaves what it knows."""
        found = experiment.read(kept, whole)
        judged = [{**asdict(each), **judge(each, found)} for each in comparisons]
        result = {**told, "seeds": whole, "figures": found, "comparisons": judged}
        result["verdict"] = overall([each["verdict"] for each in judged])
        write_json(folder / "claim.json", {**result, "machine": surroundings()})
        print(table(result), flush=True)

    minutes = experiment.make(kept, seeds, conclude)
    finish(experiment, kept, seeds, folder, minutes)


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


def check_seeds(experiment: Experiment, seeds: list[int]) -> None:
    """ConfigError where seeds would be counted that change nothing: equal numbers look like certainty."""
    for cell in experiment.cells:
        digests = [{each.digest for each in experiment.runs_of(cell, seed).values()} for seed in seeds[:2]]
        if len(digests) > 1 and digests[0] == digests[1]:
            raise ConfigError(
                f"cell {cell}: no step of it has {{seed}} among its words, so all seeds are one; or: seeds=[0]"
            )


def check_words(experiment: Experiment, seeds: list[int], runs: Path) -> None:
    """ConfigError before anything is run, where the words of a step do not fit its command."""
    for _, cell, each in experiment.all_runs(seeds[:1]):
        module = import_module(COMMANDS[each.command])
        try:
            compose(module.main, [*each.told(runs), f"out={each.folder(runs).as_posix()}"])
        except ConfigError as error:
            raise ConfigError(f"step {each.step} of cell {cell} ({each.command}): {error}") from error


def judge(each: Comparison, figures: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    values = each.values(figures)
    return {"values": values, **asdict(each.judge(values))}


def surroundings() -> dict[str, Any]:
    """The machine, as it is now: of runs that were made before, the last one's."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return machine(torch.get_num_threads(), "transformers", "vqlm", device=device)


def finish(experiment: Experiment, runs: Path, seeds: list[int], folder: Path, minutes: float) -> None:
    """The minutes of all runs, and what there is to look at."""
    from vqlm.files import read_json
    from vqlm.plots import plot_cells, stack

    result = read_json(folder / "claim.json")
    write_json(folder / "claim.json", {**result, "minutes": minutes})
    plot_cells(result["figures"], folder / "claim.png")
    if files := experiment.picture_files(runs, seeds[0]):
        stack(files, folder / "pictures.png")
    print(f"{minutes:.1f} minutes in all: {folder / 'claim.json'}   {folder / 'claim.png'}")


def table(result: dict[str, Any]) -> str:
    """What a person reads first: figures by cell, what was compared, the verdict."""
    from vqlm.verdict import error

    figures: dict[str, dict[str, list[float]]] = result["figures"]
    cells = list(dict.fromkeys(cell for by_cell in figures.values() for cell in by_cell))
    width = max(map(len, [*cells, ""])) + 2
    head = "".join(f"{name:>{max(len(name), 15) + 2}}" for name in figures)
    lines = ["", result["claim"], f"{'':{width}}{head}   ({len(result['seeds'])} seeds, ± 95 % one-sided)"]
    for cell in cells:
        row = ""
        for name, by_cell in figures.items():
            values = by_cell.get(cell)
            reach = error(values) if values else None
            mean = sum(values) / len(values) if values else 0.0
            text = "-" if not values else f"{mean:.4g}" + ("" if reach is None else f" ± {reach:.2g}")
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
