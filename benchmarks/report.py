"""Files of results → every table in README.md, benchmarks/README.md and docs/ that is made of numbers. `make report`.

    python benchmarks/report.py

No number between these marks is typed by hand; tests/test_report.py compares each page with what this file makes of
the JSON files that are kept beside it:

    <!-- report: benchmark NAME -->     benchmarks/results/NAME.json
    <!-- report: claims -->             conf/experiment/claims/*.yaml and docs/results/claims/*.json
    <!-- report: measured -->           docs/results/demo.json, each benchmark's finding, the count of claims
    <!-- report: run NAME FOLDER -->    docs/results/NAME.json: what lm-train found, fetched from FOLDER
    <!-- end -->

Runs that are newer than what is kept are fetched from runs/ first: runs/demo/metrics.json, and runs/claims/*/claim.json
with its pictures, which are reduced. Smoke runs stay where they are. It knows the shape of these files, and no
benchmark and no claim.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from record import ROOT, Result, Table, told

from vqlm.files import new_file, read_json, write_json, write_text

BLOCK = re.compile(
    r"(?P<begin><!-- report: (?P<name>[^>]+?) -->\n)(?P<made>.*?)(?P<end><!-- end -->)", re.DOTALL
)
NOT_RUN = "not run"
EXPERIMENT = ("steps", "cells", "figures", "holds")
VERDICTS = ("holds", "fails", "too small to tell here", NOT_RUN)
WIDEST = 1000  # pixels of a picture that is kept


@dataclass(frozen=True)
class Claim:
    """What a YAML file claims, and what a run found: its claim.json, or none."""

    name: str
    claim: str
    source: str
    predicted: str
    data: dict[str, Any]  # the file as it is now
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return self.found.get("verdict", NOT_RUN)

    @property
    def changed(self) -> bool:
        """Whether the file is no longer what ran."""
        now = {key: self.data[key] for key in EXPERIMENT}
        now["more"] = self.data.get("sizes", {}).get(self.found.get("size"), {})
        return bool(self.found) and self.found.get("experiment") != now


@dataclass(frozen=True)
class Project:
    """The folders that a report reads; root is the repository, or a copy of it."""

    root: Path = ROOT

    @property
    def claims_folder(self) -> Path:
        return self.root / "docs/results/claims"

    def pages(self) -> list[Path]:
        found = [
            self.root / "README.md",
            self.root / "benchmarks/README.md",
            *sorted((self.root / "docs").rglob("*.md")),
        ]
        return [path for path in found if BLOCK.search(path.read_text(encoding="utf-8"))]

    def results(self) -> dict[str, Result]:
        """Name → latest result of each benchmark that has one."""
        return {
            path.stem: Result.read(path) for path in sorted((self.root / "benchmarks/results").glob("*.json"))
        }

    def claims(self) -> list[Claim]:
        """Each YAML file, with its result; ValueError names a file that is not as it should be."""
        return [self._claim(path) for path in sorted((self.root / "conf/experiment/claims").glob("*.yaml"))]

    def _claim(self, path: Path) -> Claim:
        data: Any = OmegaConf.to_container(OmegaConf.load(path))  # as vqlm-claim reads it: 1e-3 is a number
        kept = self.claims_folder / f"{path.stem}.json"
        try:
            words = {key: " ".join(str(data[key]).split()) for key in ("claim", "source", "predicted")}
            missing = [key for key in EXPERIMENT if key not in data]
            if missing:
                raise KeyError(", ".join(missing))
            found = read_claim(kept) if kept.exists() else {}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: a claim has claim, source, predicted, steps, cells, figures and holds: {error!r}"
            ) from error
        return Claim(path.stem, **words, data=data, found=found)

    def demo(self) -> dict[str, Any] | None:
        path = self.root / "docs/results/demo.json"
        if not path.exists():
            return None
        try:
            found = read_json(path)
            demo_lines(found)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a demo's metrics.json: {type(error).__name__}: {error}") from error
        return found


def read_claim(path: Path) -> dict[str, Any]:
    """A claim.json. ValueError names the file where it is none."""
    try:
        found = read_json(path)
        missing = {"name", "figures", "comparisons", "verdict", "seeds", "machine"} - set(found)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if found["verdict"] not in VERDICTS:
            raise ValueError(f"verdict {found['verdict']!r} is none of {', '.join(VERDICTS)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a claim.json: {error}") from error
    return found


# --- from runs/ -----------------------------------------------------------------------------------------------


def fetch(project: Project, runs: Path) -> None:
    """Keep what is newer in runs than in docs/results."""
    if _newer(runs / "demo/metrics.json", kept := project.root / "docs/results/demo.json"):
        shutil.copyfile(runs / "demo/metrics.json", kept)
    for page in project.pages():
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            kind, _, told = block["name"].partition(" ")
            if kind == "run":
                name, _, folder = told.partition(" ")
                fetch_training(project, name, project.root / folder)
    for path in sorted(runs.glob("claims/*/claim.json")):
        found = read_claim(path)
        kept = project.claims_folder / f"{found['name']}.json"
        stopped = kept.exists() and "minutes" not in found  # what was finished is worth more
        if found.get("size") != "smoke" and not stopped and _newer(path, kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
            _keep_picture(path.with_name("claim.png"), kept.with_suffix(".png"))
            _keep_picture(path.with_name("pictures.png"), kept.with_name(f"{kept.stem}-pictures.png"))


def fetch_training(project: Project, name: str, run: Path) -> None:
    """metrics.json and retention.jsonl as one file; samples.png, reduced."""
    kept = project.root / f"docs/results/{name}.json"
    if not (run / "metrics.json").exists():
        return
    found: dict[str, Any] = {"metrics": read_json(run / "metrics.json"), "retention": []}
    if (run / "retention.jsonl").exists():
        lines = (run / "retention.jsonl").read_text(encoding="utf-8").splitlines()
        found["retention"] = [json.loads(line) for line in lines]
    if kept.exists() and (
        read_json(kept) == found or (run / "metrics.json").stat().st_mtime < kept.stat().st_mtime
    ):
        return
    write_json(kept, found)
    if (run / "samples.png").exists():
        _keep_picture(run / "samples.png", kept.with_suffix(".png"))


def _newer(path: Path, kept: Path) -> bool:
    """Whether there is something to copy: other bytes, written later."""
    if not path.exists():
        return False
    if not kept.exists():
        return True
    return path.stat().st_mtime > kept.stat().st_mtime and path.read_bytes() != kept.read_bytes()


def _keep_picture(path: Path, kept: Path) -> None:
    if not path.exists():
        kept.unlink(missing_ok=True)
        return
    with Image.open(path) as image:
        image.thumbnail((WIDEST, 8 * WIDEST))
        few = image.convert("RGB").quantize(256)  # a third of the bytes, and hardly to be told apart
        with new_file(kept) as part:
            few.save(part, format="png", optimize=True)


# --- blocks ---------------------------------------------------------------------------------------------------


def rendered(project: Project, page: Path) -> str:
    """The page with each block as the files say.

    Raises:
        ValueError: a block that is not known, or a file that is not as it should be; both are named.
    """
    makers: dict[str, Callable[[Project, Path], str]] = {"claims": claims, "measured": measured}

    def make(block: re.Match[str]) -> str:
        kind, _, name = block["name"].partition(" ")
        if kind == "benchmark" and name:
            made = benchmark(project, page, name)
        elif kind == "run" and name:
            made = training(project, name.partition(" ")[0])
        elif block["name"] in makers:
            made = makers[kind](project, page)
        else:
            known = ", ".join(["benchmark NAME", "run NAME FOLDER", *makers])
            raise ValueError(f"{page}: <!-- report: {block['name']} --> is not known; there are {known}")
        return f"{block['begin']}{made}\n{block['end']}"

    return BLOCK.sub(make, page.read_text(encoding="utf-8"))


def benchmark(project: Project, page: Path, name: str) -> str:
    """The latest result of a benchmark: what ran, where, its tables, what was found."""
    path = project.root / f"benchmarks/results/{name}.json"
    if not path.exists():
        log = _link(page, project.root / "LOG.md")
        return f"Not rendered yet (there is no `benchmarks/results/{name}.json`); [LOG.md]({log}) has earlier ones."
    result = Result.read(path)
    head = f"`{result.command}`, {result.date}. {told(result.machine)}."
    tables = [
        f"**{each.title}**\n\n{markdown(each)}" if each.title else markdown(each) for each in result.tables
    ]
    return "\n\n".join([head, *tables, f"Found: {result.found}."])


def measured(project: Project, page: Path) -> str:
    """The numbers in short: the demo, each benchmark in a sentence, the claims that hold."""
    rows = [["`make demo`", line] for line in demo_lines(project.demo())]
    there = _link(page, project.root / "benchmarks/README.md")
    rows += [[f"[`benchmarks/{name}.py`]({there})", each.found] for name, each in project.results().items()]
    counts = Counter(each.verdict for each in project.claims())
    if counts:
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        rows.append([f"[claims of the field]({_link(page, project.root / 'docs/claims.md')})", told])
    return markdown(Table("", ["", "measured"], rows))


def demo_lines(metrics: dict[str, Any] | None) -> list[str]:
    """What `make demo` prints, from its metrics.json."""
    if metrics is None:
        return []
    picture, words = metrics["tokenizer"], metrics["language_model"]
    used = [mean(picture[split]["codes_used"]) for split in ("train", "heldout")]
    lines = [
        f"{metrics['minutes']:.1f} minutes, installation apart: {picture['run']['batches']:,} batches of the "
        f"tokenizer, {words['run']['batches']:,} of the language model",
        f"PSNR {picture['heldout']['psnr']:.2f} dB, SSIM {picture['heldout']['ssim']:.3f} on held-out pictures "
        f"({picture['train']['psnr']:.2f} dB on training ones); {used[0]:.0%} of the codes used "
        f"({used[1]:.0%} by held-out pictures)",
    ]
    for split, name in (("train", "training"), ("heldout", "held-out")):
        found = words[split]["drawing"]
        lines.append(
            f"{found['among_ten_nearest']:.1%} of {found['captions']} {name} captions: the captioned picture is among "
            f"the ten nearest to what was drawn (chance {found['chance']:.2%})"
        )
    return lines


SPLITS = {"train": "training", "heldout": "held-out things", "heldout_style": "held-out styles"}


def training(project: Project, name: str) -> str:
    """What a run of lm-train found: its drawings and captions, the course of plain text, what it took."""
    path = project.root / f"docs/results/{name}.json"
    if not path.exists():
        return f"**{NOT_RUN}**"
    try:
        kept = read_json(path)
        return "\n\n".join(_training(kept["metrics"], kept["retention"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not what lm-train leaves: {type(error).__name__}: {error}") from error


def _training(metrics: dict[str, Any], retention: list[dict[str, Any]]) -> list[str]:
    rows = []
    for split in filter(metrics.__contains__, SPLITS):
        found, drawn = metrics[split], metrics[split]["drawing"]
        styles = "–"
        if "variants" in drawn:
            styles = f"{drawn['variant_followed']:.0%} ({drawn['variant_chance']:.0%})"
        near = f"{drawn['among_ten_nearest']:.1%} ({drawn['chance']:.1%})"
        words = found["captioning"]
        told = [f"{found['image_bits']:.3g}", f"{words['exact']:.0%}", f"{words['word_f1']:.2f}"]
        rows.append([f"{SPLITS[split]}, {drawn['captions']}", near, f"{drawn['nearest']:.0%}", styles, *told])
    columns = ["captions", "drawn picture among the ten nearest (by chance)", "the nearest"]
    columns += ["captioned variant followed (by chance)", "bits a code", "captions to the word", "word F1"]
    run, parts = metrics["run"], [markdown(Table("", columns, rows))]
    if "text" in metrics:
        before, after = metrics["text"].get("before"), metrics["text"]["after"]
        course = [["before", _short(before["perplexity"])]] if before else []
        between = [each for each in retention if 0 < each["batch"] < run["batches"]]
        course += [[f"after {each['batch']:,} batches", _short(each["perplexity"])] for each in between]
        ratio = f": times {metrics['text']['ratio']:.2f}" if before else ""
        course.append(["at the end", f"{_short(after['perplexity'])}{ratio}"])
        title = f"perplexity of {after['texts']} held-out texts"
        parts.append(markdown(Table("", ["", title], course)))
    cost = f"{run['batches']:,} batches, {run['documents']:,} documents, {run['minutes']:.0f} minutes"
    return [
        *parts,
        f"{cost}; {run['trained_parameters'] / 1e6:.0f} of {run['parameters'] / 1e6:.0f} M weights trained.",
    ]


# --- claims ---------------------------------------------------------------------------------------------------


def claims(project: Project, page: Path) -> str:
    """A table of all claims, then a section for each."""
    found = project.claims()
    if not found:
        return "No claims yet."
    rows = [[f"[{each.name}](#{each.name})", each.claim, each.source, weighed(each)] for each in found]
    table = markdown(Table("", ["", "claim", "who said it", "verdict"], rows))
    return "\n\n".join([table, *(section(each, project, page) for each in found)])


def weighed(claim: Claim) -> str:
    """The verdict, and of how many comparisons it was made: a claim of many parts fails with one of them; and whether
    its file has changed since it ran."""
    counts = Counter(each["verdict"] for each in claim.found.get("comparisons", []))
    told = claim.verdict
    if len(counts) > 1:
        told += f" ({', '.join(f'{counts[each]} {each}' for each in VERDICTS if counts[each])})"
    return f"{told}; its file has changed since, run it again" if claim.changed else told


def section(claim: Claim, project: Project, page: Path) -> str:
    """A claim: what it says, what ran, what was predicted, and what came out."""
    command = claim.found.get("command") or f"vqlm-claim experiment/claims={claim.name}"
    parts = [
        f"## {claim.name}",
        claim.claim,
        f"Source: {claim.source}",
        f"```sh\n{command}\n```",
        f"Predicted: {claim.predicted}",
    ]
    if not claim.found:
        return "\n\n".join([*parts, f"**{NOT_RUN}**"])
    parts += [f"**{weighed(claim)}**", markdown(comparisons(claim)), markdown(figures(claim))]
    for suffix, what in ((".png", "figures"), ("-pictures.png", "pictures")):
        path = project.claims_folder / f"{claim.name}{suffix}"
        if path.exists():
            parts.append(f"![{claim.name}: {what} of each cell]({_link(page, path)})")
    return "\n\n".join([*parts, _cost(claim)])


def figures(claim: Claim) -> Table:
    """Cells × figures: mean ± standard deviation over seeds."""
    found = claim.found["figures"]
    cells = list(dict.fromkeys(cell for values in found.values() for cell in values))
    rows = [[cell, *(_spread(values.get(cell)) for values in found.values())] for cell in cells]
    return Table("", ["cell", *found], rows)


def comparisons(claim: Claim) -> Table:
    """What the claim says, difference by difference."""
    rows = []
    for each in claim.found["comparisons"]:
        than = each.get("than")
        what = f"{each['figure']}: {each['cell']}"
        what += f" {'/' if each.get('ratio') else '−'} {than}" if than else ""
        bars = [
            f"{sign} {each[key]:g}"
            for key, sign in (("least", "≥"), ("most", "≤"))
            if each.get(key) is not None
        ]
        span = f"{_short(each.get('low'))} to {_short(each.get('high'))}"
        rows.append([what, " and ".join(bars), _short(each.get("mean")), span, each["verdict"]])
    return Table("", ["compared", "claimed", "measured", "95 % bounds", "verdict"], rows)


def _cost(claim: Claim) -> str:
    seeds, minutes = len(claim.found["seeds"]), claim.found.get("minutes")
    facts = told(claim.found["machine"])
    time = "stopped before its last seed" if minutes is None else f"{minutes:.1f} minutes"
    return f"{seeds} seed{'s' if seeds != 1 else ''}, size {claim.found.get('size')}, {time}. {facts}."


def _spread(values: list[float | None] | None) -> str:
    known = [value for value in values or [] if value is not None]
    if not known:
        return "–"
    if len(known) == 1:
        return _short(known[0])
    return f"{_short(mean(known))} ± {stdev(known):.2g} ({len(known)})"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# --- text -----------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _link(page: Path, target: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def main() -> int:
    project = Project()
    try:
        fetch(project, project.root / "runs")
        made = {page: rendered(project, page) for page in project.pages()}
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    for page, text in made.items():
        changed = text != page.read_text(encoding="utf-8")
        if changed:
            write_text(page, text)
        print(f"{page.relative_to(project.root)}: {'written' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
