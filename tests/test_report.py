"""Pages say what the files of the runs say, no number is typed by hand, and every benchmark and claim has its place."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import record  # noqa: E402
import report  # noqa: E402
import startup  # noqa: E402
from report import Project  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

HELPERS = {"record", "report"}
SCRIPTS = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - HELPERS)
WORDS = {"claim": "A | B", "source": "somebody 2024", "predicted": "1 dB"}
EXPERIMENT = {
    "steps": {"tokenizer": ["vq-train", "seed={seed}"]},
    "cells": {"Q = 1": {}, "Q = 2": {"tokenizer": ["quantizer.depth=2"]}},
    "figures": {"PSNR dB": "tokenizer:psnr", "seconds": "tokenizer:seconds"},
    "holds": [{"figure": "PSNR dB", "cell": "Q = 2", "than": "Q = 1", "least": 0.5}],
}
CLAIM = {**WORDS, **EXPERIMENT}
RUN = {
    "name": "depth",
    **WORDS,
    "experiment": {**EXPERIMENT, "more": {}},
    "command": "vqlm-claim experiment/claims=depth",
    "size": "laptop",
    "seeds": [0, 1, 2],
    "figures": {
        "PSNR dB": {"Q = 1": [20.0, 21.0, 22.0], "Q = 2": [23.0, 23.0, 23.0]},
        "seconds": {"Q = 2": [0.5]},
    },
    "comparisons": [
        {
            "figure": "PSNR dB",
            "cell": "Q = 2",
            "than": "Q = 1",
            "ratio": False,
            "least": 0.5,
            "most": None,
            "values": [3.0, 2.0, 1.0],
            "low": 0.314,
            "mean": 2.0,
            "high": 3.686,
            "verdict": "too small to tell here",
        },
        {
            "figure": "seconds",
            "cell": "Q = 2",
            "than": "Q = 1",
            "ratio": True,
            "least": None,
            "most": 1.3,
            "values": [1.25],
            "low": None,
            "mean": 1.25,
            "high": None,
            "verdict": "too small to tell here",
        },
    ],
    "verdict": "too small to tell here",
    "minutes": 12.34,
    "machine": {"cores": 2, "device": "cpu", "versions": {"torch": "2.13.0"}},
}
RESULT = {
    "question": "How fast?",
    "found": "7.5 times as fast",
    "command": "python benchmarks/speed.py",
    "date": "2026-01-02",
    "machine": {"cores": 2, "load": None, "versions": {"torch": "2.13.0"}},
    "tables": [{"title": "speeds", "columns": ["", "ms"], "rows": [["ours", "1.5"], ["theirs", "11.25"]]}],
}
DEMO = {
    "minutes": 13.4,
    "tokenizer": {
        "run": {"batches": 1212},
        "train": {"psnr": 24.87, "codes_used": [1.0, 1.0]},
        "heldout": {"psnr": 23.19, "ssim": 0.901, "codes_used": [0.75, 0.25]},
    },
    "language_model": {
        "run": {"batches": 2067},
        "train": {"drawing": {"captions": 128, "among_ten_nearest": 0.992, "chance": 0.0025}},
        "heldout": {"drawing": {"captions": 64, "among_ten_nearest": 0.234, "chance": 0.0025}},
    },
}


DRAWING = {"captions": 64, "among_ten_nearest": 0.75, "nearest": 0.5, "chance": 0.017}
WORDS_READ = {"image_bits": 1.25, "captioning": {"exact": 0.05, "word_f1": 0.731}}
TRAINED = {
    "run": {
        "batches": 601,
        "documents": 9616,
        "minutes": 52.1,
        "parameters": 135_698_115,
        "trained_parameters": 2e6,
    },
    "text": {
        "before": {"perplexity": 217.32},
        "after": {"perplexity": 184.24, "texts": 500},
        "ratio": 0.8478,
    },
    "heldout": {
        **WORDS_READ,
        "drawing": {**DRAWING, "variants": 9, "variant_followed": 0.8, "variant_chance": 0.5},
    },
    "train": {**WORDS_READ, "drawing": DRAWING},
}
RETENTION = [{"batch": n, "perplexity": value} for n, value in ((0, 217.32), (300, 365.9), (601, 184.24))]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Project:
    """A project of one benchmark, one claim and a demo, rendered."""
    for page, blocks in {
        "README.md": ["measured"],
        "benchmarks/README.md": ["benchmark speed", "benchmark later"],
        "docs/claims.md": ["claims"],
    }.items():
        write(
            tmp_path / page,
            "".join(f"before\n<!-- report: {name} -->\n<!-- end -->\nafter\n" for name in blocks),
        )
    write(tmp_path / "benchmarks/results/speed.json", json.dumps(RESULT))
    write(tmp_path / "docs/results/demo.json", json.dumps(DEMO))
    write(tmp_path / "docs/results/claims/depth.json", json.dumps(RUN))
    write(tmp_path / "conf/experiment/claims/depth.yaml", yaml.safe_dump(CLAIM))
    project = Project(tmp_path)
    for page in project.pages():
        page.write_text(report.rendered(project, page), encoding="utf-8")
    return project


def read(project: Project, page: str) -> str:
    return (project.root / page).read_text(encoding="utf-8")


# --- the pages that are here ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", Project().pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_page_says_what_the_files_of_the_runs_say(page: Path):
    assert page.read_text(encoding="utf-8") == report.rendered(Project(), page), "run: make report"


def test_the_pages_with_numbers_are_among_them():
    pages = {path.relative_to(ROOT).as_posix() for path in Project().pages()}
    assert pages >= {"README.md", "benchmarks/README.md", "docs/claims.md"}


def test_every_benchmark_has_a_section_and_every_section_a_benchmark():
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## `(\w+)\.py`", text, re.M)) == SCRIPTS, (
        "benchmarks/README.md: a section a script"
    )
    assert sorted(re.findall(r"<!-- report: benchmark (\w+) -->", text)) == SCRIPTS


def test_every_result_belongs_to_a_benchmark_and_every_kept_claim_to_a_claim():
    assert set(Project().results()) <= set(SCRIPTS)
    kept = {path.stem for path in Project().claims_folder.glob("*.json")}
    assert kept <= {claim.name for claim in Project().claims()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_writes_results_in_the_common_form(name: str):
    source = (ROOT / f"benchmarks/{name}.py").read_text(encoding="utf-8")
    assert "record.add_out(" in source and "record.keep(" in source


def test_every_claim_has_a_section():
    text = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    for path in (ROOT / "conf/experiment/claims").glob("*.yaml"):
        assert f"\n## {path.stem}\n" in text, f"{path}: run make report"


def test_every_command_is_started_with_a_wrong_type():
    assert set(startup.commands()) == set(startup.WRONG)


# --- what is made of them ---------------------------------------------------------------------------------------


def test_rendering_again_changes_nothing(small: Project):
    for page in small.pages():
        assert report.rendered(small, page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "number"),
    [("README.md", "23.19"), ("benchmarks/README.md", "11.25"), ("docs/claims.md", "21 ± 1")],
)
def test_a_number_typed_by_hand_is_put_right(small: Project, page: str, number: str):
    text = read(small, page)
    assert number in text
    forged = write(small.root / page, text.replace(number, "99.9"))
    assert report.rendered(small, forged) == text


def test_text_outside_the_blocks_stays(small: Project):
    text = read(small, "benchmarks/README.md")
    assert (
        text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and text.count("before\n") == 2
    )


def test_a_benchmark_without_a_run_says_so(small: Project):
    assert "Not rendered yet" in read(small, "benchmarks/README.md")


def test_the_measured_block_has_the_demo_the_benchmarks_and_the_count_of_claims(small: Project):
    text = read(small, "README.md")
    assert (
        "23.19 dB" in text
        and "100% of the codes used (50% by held-out pictures)" in text
        and "23.4% of 64" in text
    )
    assert "[`benchmarks/speed.py`](benchmarks/README.md) | 7.5 times as fast" in text
    assert "[claims of the field](docs/claims.md) | 1 too small to tell here" in text


def test_a_claim_says_what_was_compared_with_its_bounds_and_verdict(small: Project):
    text = read(small, "docs/claims.md")
    assert "| [depth](#depth) | A \\| B | somebody 2024 | too small to tell here |" in text
    assert "| PSNR dB: Q = 2 − Q = 1 | ≥ 0.5 | 2 | 0.314 to 3.686 | too small to tell here |" in text
    assert "| seconds: Q = 2 / Q = 1 | ≤ 1.3 | 1.25 | – to – | too small to tell here |" in text
    assert "| Q = 1 | 21 ± 1 (3) | – |" in text and "| Q = 2 | 23 ± 0 (3) | 0.5 |" in text
    assert "3 seeds, size laptop, 12.3 minutes. cores 2, device cpu, torch 2.13.0." in text


def test_a_run_of_training_is_fetched_told_and_kept(small: Project):
    page = write(small.root / "docs/emoji.md", "<!-- report: run emoji runs/lm -->\n<!-- end -->\n")
    assert "**not run**" in report.rendered(small, page)
    write(small.root / "runs/lm/metrics.json", json.dumps(TRAINED))
    write(small.root / "runs/lm/retention.jsonl", "\n".join(map(json.dumps, RETENTION)))
    write(small.root / "docs/results/emoji.png", "a picture from elsewhere")
    report.fetch(small, small.root / "runs")
    made = report.rendered(small, page)
    assert "| training, 64 | 75.0% (1.7%) | 50% | – | 1.25 | 5% | 0.73 |\n| held-out things, 64 |" in made
    assert "| 75.0% (1.7%) | 50% | 80% (50%) | 1.25 |" in made
    assert "| before | 217.3 |\n| after 300 batches | 365.9 |\n| at the end | 184.2: times 0.85 |\n" in made
    assert "held-out texts" in made and "601 batches, 9,616 documents, 52 minutes; 2 of 136 M weights" in made
    assert (small.root / "docs/results/emoji.png").exists()
    write(small.root / "docs/results/emoji.json", "{}")
    with pytest.raises(ValueError, match=r"emoji.json: not what lm-train leaves: KeyError"):
        report.rendered(small, page)


def test_a_new_claim_changes_the_page_until_it_is_run(small: Project):
    write(small.root / "conf/experiment/claims/other.yaml", yaml.safe_dump(CLAIM))
    page = small.root / "docs/claims.md"
    made = report.rendered(small, page)
    assert made != read(small, "docs/claims.md") and "changed since" not in made
    assert "## other" in made and "vqlm-claim experiment/claims=other" in made and "**not run**" in made


@pytest.mark.parametrize("part", EXPERIMENT)
def test_a_claim_that_changed_since_it_ran_says_so(small: Project, part: str):
    page = small.root / "docs/claims.md"
    assert "has changed since" not in read(small, "docs/claims.md")
    other = {**CLAIM, part: {**EXPERIMENT[part], "more": []} if part != "holds" else []}
    write(small.root / "conf/experiment/claims/depth.yaml", yaml.safe_dump(other))
    assert report.rendered(small, page).count("; its file has changed since, run it again") == 2


@pytest.mark.parametrize(("size", "changed"), [("laptop", 2), ("gpu", 0)])
def test_words_of_another_size_do_not_count(small: Project, size: str, changed: int):
    other = {**CLAIM, "sizes": {size: {"tokenizer": ["learner.optimizer.lr=1e-3"]}}}
    write(small.root / "conf/experiment/claims/depth.yaml", yaml.safe_dump(other))
    made = report.rendered(small, small.root / "docs/claims.md")
    assert made.count("its file has changed since") == changed


def test_numbers_of_a_claim_are_read_as_its_command_reads_them(small: Project):
    run = json.loads(json.dumps(RUN))
    run["experiment"]["holds"][0]["least"] = 1e-3
    write(small.claims_folder / "depth.json", json.dumps(run))
    path = small.root / "conf/experiment/claims/depth.yaml"
    write(path, path.read_text().replace("least: 0.5", "least: 1e-3"))
    assert "changed since" not in report.rendered(small, small.root / "docs/claims.md")


def test_one_seed_has_no_spread_and_a_run_may_have_been_stopped(small: Project):
    alone = {**RUN, "seeds": [0], "figures": {"PSNR dB": {"Q = 1": [20.0]}}}
    alone["comparisons"] = []
    del alone["minutes"]
    write(small.claims_folder / "depth.json", json.dumps(alone))
    made = report.rendered(small, small.root / "docs/claims.md")
    assert "| Q = 1 | 20 |" in made and "stopped before its last seed" in made


def test_the_script_keeps_writes_and_says_what_is_wrong(small: Project, monkeypatch, capsys):
    monkeypatch.setattr(report, "Project", lambda: small)
    run = small.root / "runs/claims/depth/claim.json"
    write(run, json.dumps({**RUN, "verdict": "holds"}))
    os.utime(run, (2**31, 2**31))
    assert report.main() == 0 and "docs/claims.md: written" in capsys.readouterr().out
    assert "| holds |" in (small.root / "docs/claims.md").read_text()
    stopped = {key: value for key, value in RUN.items() if key != "minutes"}
    write(run, json.dumps({**stopped, "verdict": "fails"}))
    os.utime(run, (2**31 + 9, 2**31 + 9))
    assert report.main() == 0 and "| holds |" in (small.root / "docs/claims.md").read_text()  # was finished
    write(run, "{")
    assert report.main() == 1 and "claim.json" in capsys.readouterr().err


def test_a_verdict_says_of_how_many_parts_it_was_made(small: Project):
    parts = [{**RUN["comparisons"][0], "verdict": each} for each in ("holds", "fails", "holds")]
    write(small.claims_folder / "depth.json", json.dumps({**RUN, "comparisons": parts, "verdict": "fails"}))
    assert "| fails (2 holds, 1 fails) |" in report.rendered(small, small.root / "docs/claims.md")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("benchmarks/results/speed.json", "{"),
        ("benchmarks/results/speed.json", "[]"),
        ("benchmarks/results/speed.json", json.dumps({**RESULT, "more": 1})),
        (
            "benchmarks/results/speed.json",
            json.dumps({**RESULT, "tables": [{**RESULT["tables"][0], "rows": [["a"]]}]}),
        ),
        ("docs/results/claims/depth.json", "{}"),
        ("docs/results/claims/depth.json", json.dumps({**RUN, "verdict": "maybe"})),
        ("docs/results/demo.json", "{"),
        ("docs/results/demo.json", json.dumps({"minutes": 1})),
        ("conf/experiment/claims/depth.yaml", "claim: A"),
    ],
)
def test_a_malformed_file_is_named(small: Project, file: str, text: str):
    write(small.root / file, text)
    with pytest.raises(ValueError, match=re.escape(str(small.root / file))):
        for page in small.pages():
            report.rendered(small, page)


def test_an_unknown_block_is_named_with_its_page(small: Project):
    page = write(small.root / "docs/new.md", "<!-- report: speeds -->\n<!-- end -->\n")
    with pytest.raises(
        ValueError, match=r"docs/new\.md: <!-- report: speeds --> is not known; there are benchmark NAME"
    ):
        report.rendered(small, page)


# --- what is fetched from runs/ -----------------------------------------------------------------------------------


def test_newer_runs_are_kept_with_reduced_pictures_and_smoke_runs_are_not(small: Project, tmp_path: Path):
    runs = tmp_path / "runs"
    write(runs / "demo/metrics.json", json.dumps({**DEMO, "minutes": 1.5}))
    write(runs / "claims/depth/claim.json", json.dumps({**RUN, "minutes": 99.0}))
    write(runs / "claims/toy/claim.json", json.dumps({**RUN, "name": "toy", "size": "smoke"}))
    Image.new("RGB", (2000, 500)).save(runs / "claims/depth/claim.png")
    report.fetch(small, runs)
    assert json.loads((small.root / "docs/results/demo.json").read_text())["minutes"] == 1.5
    assert json.loads((small.claims_folder / "depth.json").read_text())["minutes"] == 99.0
    with Image.open(small.claims_folder / "depth.png") as image:
        assert image.size == (1000, 250)
    assert sorted(path.name for path in small.claims_folder.iterdir()) == ["depth.json", "depth.png"]
    assert "![depth: figures of each cell](results/claims/depth.png)" in report.rendered(
        small, small.root / "docs/claims.md"
    )


def test_older_runs_do_not_take_the_place_of_what_is_kept(small: Project, tmp_path: Path):
    old = write(tmp_path / "runs/claims/depth/claim.json", json.dumps({**RUN, "minutes": 99.0}))
    before = (small.claims_folder / "depth.json").stat().st_mtime - 100
    os.utime(old, (before, before))
    report.fetch(small, tmp_path / "runs")
    assert json.loads((small.claims_folder / "depth.json").read_text())["minutes"] == RUN["minutes"]


# --- the common form ----------------------------------------------------------------------------------------------


def test_a_result_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys, "argv", ["anywhere/speed.py", "--out", "/somewhere/else/x.json", "--images", "two words"]
    )
    table = record.Table("t", ["", "ms"], [["ours", "1.5"]])
    record.keep(tmp_path / "x.json", "How fast?\n\nMore.", record.machine(3, "numpy"), "fast", [table])
    found = record.Result.read(tmp_path / "x.json")
    assert found.tables == [table] and found.question == "How fast?" and found.machine["threads"] == 3
    assert found.command == 'python benchmarks/speed.py --out x.json --images "two words"'
    assert {"cores", "processor", "device", "load"} <= set(found.machine) and "numpy" in found.machine[
        "versions"
    ]


def test_nothing_is_written_unless_it_is_asked_for():
    record.keep(None, "How fast?", {}, "fast", [])


def test_a_table_is_aligned_and_refuses_a_ragged_row():
    assert (
        str(record.Table("t", ["", "ms"], [["ours", "1.5"], ["a", "11"]]))
        == "t\n       ms\nours  1.5\na      11"
    )
    with pytest.raises(ValueError, match="2 columns, but a row is"):
        record.Table("t", ["", "ms"], [["ours"]])
