"""Claims: the plan of runs, what is run once, figures, verdicts, and the command that ties them together.

scipy's t distribution is the independent word on intervals. Commands are replaced by one that writes a metrics.json.
"""

import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from vqlm import claim, command, experiment
from vqlm.command import CONF
from vqlm.errors import ConfigError
from vqlm.experiment import Experiment, merged, number_at
from vqlm.verdict import FAILS, HOLDS, UNCLEAR, Comparison, error, overall, quantile

STEPS = {
    "tokenizer": ["vq-train", "images=shapes", "seed={seed}"],
    "store": ["vq-encode", "images=shapes", "tokenizer={tokenizer}/tokenizer"],
    "lm": ["lm-train", "store={store}"],
}
CELLS = {
    "a": {},
    "b": {"lm": ["head=parallel"]},
    "no lm": {"tokenizer": ["quantizer=none"], "store": None, "lm": None},
}
FIGURES = {"PSNR": "tokenizer:heldout.psnr", "bits": "lm:heldout.image_bits"}


def small(**changes):
    return Experiment(**{"steps": STEPS, "cells": CELLS, "figures": FIGURES, **changes})


# --- verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 10, 12, 30, 200])
def test_quantiles_are_those_of_students_t(freedom):
    assert quantile(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=2e-4)


def test_the_interval_is_that_of_a_one_sided_t_test():
    """A bar at its lower end is rejected with exactly 5 %."""
    values = [1.2, 0.7, 1.9, 1.1]
    low = float(np.mean(values)) - error(values)
    assert stats.ttest_1samp(values, low, alternative="greater").pvalue == pytest.approx(0.05, rel=1e-3)
    assert error([1.0]) is None


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        ({"least": 0.5}, HOLDS),
        ({"least": 1.0}, UNCLEAR),
        ({"least": 1.5}, FAILS),
        ({"most": 1.5}, HOLDS),
        ({"most": 1.0}, UNCLEAR),
        ({"most": 0.5}, FAILS),
    ],
)
def test_a_comparison_is_judged_by_its_interval(bar, verdict):
    judged = Comparison("f", "a", **bar).judge([0.9, 1.0, 1.1])
    assert judged.verdict == verdict and judged.low < 1 < judged.high


@pytest.mark.parametrize(("bar", "verdict"), [({"least": 1.0}, FAILS), ({"most": 1.0}, HOLDS)])
def test_the_bar_itself_belongs_to_the_claim(bar, verdict):
    """high = bar: `most` holds there, `least` does not fail there."""
    judged = Comparison("f", "a", **bar).judge([1.0, 1.0])
    assert judged.verdict == HOLDS
    assert Comparison("f", "a", **bar).judge([0.5, 0.5]).verdict == verdict


def test_one_seed_shows_no_spread():
    judged = Comparison("f", "a", least=0).judge([100.0])
    assert (judged.verdict, judged.low, judged.mean) == (UNCLEAR, None, 100)


def test_differences_are_taken_seed_by_seed():
    """What a seed adds to both cells cancels."""
    figures = {"f": {"a": [1.0, 5.0, 9.0], "b": [0.5, 4.5, 8.5]}}
    assert Comparison("f", "a", "b", least=0).values(figures) == [0.5, 0.5, 0.5]
    assert Comparison("f", "a", "b", ratio=True, least=1).values(figures) == [2, 5 / 4.5, 9 / 8.5]
    with pytest.raises(ValueError, match="of b is 0"):
        Comparison("f", "a", "b", ratio=True, least=1).values({"f": {"a": [1.0], "b": [0.0]}})


@pytest.mark.parametrize("told", [{}, {"least": 1, "most": 2}, {"ratio": True, "least": 1}])
def test_a_comparison_that_says_nothing_is_refused(told):
    with pytest.raises(ValueError, match=r"give one of them|name the cell"):
        Comparison("f", "a", **told)


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNCLEAR], UNCLEAR),
        ([UNCLEAR, FAILS], FAILS),
        ([HOLDS, FAILS], FAILS),
        ([], UNCLEAR),
    ],
)
def test_a_claim_is_as_good_as_its_parts(parts, whole):
    assert overall(parts) == whole


# --- what is run ----------------------------------------------------------------------------------------------


def test_what_cells_have_in_common_is_run_once():
    runs = [(seed, cell, run.step) for seed, cell, run in small().all_runs([0, 1])]
    assert runs == [
        *[(0, "a", step) for step in STEPS],
        (0, "b", "lm"),
        (0, "no lm", "tokenizer"),
        *[(1, "a", step) for step in STEPS],
        (1, "b", "lm"),
        (1, "no lm", "tokenizer"),
    ]


def test_a_run_is_named_by_what_it_reads(tmp_path):
    """Not by the names of steps and cells: another experiment finds it."""
    run = small().runs_of("a", 0)["lm"]
    assert run.digest != small().runs_of("a", 1)["lm"].digest  # another tokenizer
    steps = {
        "t": STEPS["tokenizer"],
        "s": [*STEPS["store"][:2], "tokenizer={t}/tokenizer"],
        "l": ["lm-train", "store={s}"],
    }
    other = Experiment(steps, {"x": {}}, {"bits": "l:heldout.image_bits"}).runs_of("x", 0)["l"]
    assert other.digest == run.digest
    store = small().runs_of("a", 0)["store"].folder(tmp_path)
    assert run.told(tmp_path) == [f"store={store.as_posix()}"]


def test_steps_that_nothing_needs_are_left_out():
    assert list(small(figures={"PSNR": "tokenizer:heldout.psnr"}).runs_of("a", 0)) == ["tokenizer"]
    assert "lm" in small(figures={"PSNR": "tokenizer:x"}, pictures="lm:samples.png").runs_of("a", 0)


def test_later_words_replace_earlier_ones():
    """A cell's those of a step, a size's those of a cell."""
    assert merged(["images=openmoji", "seed=1", "images=shapes"]) == ["images=shapes", "seed=1"]
    made = small(more={"lm": ["head=layered", "seed=4"]}).runs_of("b", 0)["lm"]
    assert made.words == ("store={store}", "head=layered", "seed=4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": {"tokenizer": ["vq-trian"]}}, "did you mean 'vq-train'"),
        (
            {"cells": {"a": {"tokeniser": ["x=1"]}}},
            "cells.a.tokeniser: there is no step tokeniser; did you mean 'tokenizer'",
        ),
        ({"figures": {"PSNR": "lmm:heldout.psnr"}}, "no step lmm"),
        ({"figures": {"PSNR": "heldout.psnr"}}, "must be STEP:PLACE"),
        ({"steps": {**STEPS, "lm": ["lm-train", "store={stor}"]}}, r"reads \{stor\}.*did you mean 'store'"),
        ({"cells": {"a": {"store": None}}}, r"reads \{store\}"),
        ({"more": {"lmm": []}}, "sizes.lmm"),
    ],
)
def test_an_experiment_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        small(**change)


def test_numbers_are_found_in_files(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(
        json.dumps({"a": {"b": 2, "used": [0.5, 1.0], "none": None, "of": [{"x": 3}]}, "yes": True})
    )
    assert number_at(file, "a.b") == 2.0
    assert number_at(file, "a.used") == 0.75
    assert number_at(file, "a.of.0.x") == 3
    with pytest.raises(ConfigError, match=r"no a.c \(c is missing; there: \['b', 'used'"):
        number_at(file, "a.c")
    for keys in ("a.none", "yes", "a", "a.of.1.x", "a.of"):
        with pytest.raises(ConfigError):
            number_at(file, keys)


@pytest.mark.parametrize("text", ['{"psnr": NaN}', '{"psnr": Infinity}', '{"psn', None])
def test_a_damaged_file_is_named(text, tmp_path):
    file = tmp_path / "metrics.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.json"):
        number_at(file, "psnr")


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """Commands write what a formula says instead of training. The list of what was run."""
    made = []

    def run(title, name, words):
        made.append([name, *words])
        told = dict(word.split("=", 1) for word in words)
        folder = experiment.Path(told["out"])
        (folder / "checkpoints").mkdir(parents=True)
        seed = float(told.get("seed", 0))
        if name == "vq-train" and told["seed"] == "9":
            raise SystemExit(1)
        found = {"heldout": {"psnr": 20 + seed, "image_bits": 3 if "head" in told else 4 + seed / 100}}
        (folder / "metrics.json").write_text(json.dumps(found))
        Image.new("RGB", (8, 8)).save(folder / "seen.png")

    monkeypatch.setattr(experiment, "run", run)
    return made


def conf(folder, **changes):
    """A folder with one claim of its own, for --config-dir."""
    told = {
        "name": "mine",
        "claim": "Parallel heads need fewer bits.",
        "source": "nobody",
        "predicted": "yes",
        "steps": STEPS,
        "cells": CELLS,
        "figures": FIGURES,
        "holds": [{"figure": "bits", "cell": "b", "than": "a", "most": -0.5}],
        **changes,
    }
    (folder / "experiment/claims").mkdir(parents=True, exist_ok=True)
    (folder / "experiment/claims/mine.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(told, sort_keys=False)
    )
    return folder


def call(monkeypatch, folder, *words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys, "argv", ["vqlm-claim", "--config-dir", "conf", "experiment/claims=mine", "size=laptop", *words]
    )
    claim.main()


def test_the_command_runs_judges_and_goes_on(ran, tmp_path, monkeypatch, capsys):
    conf(tmp_path / "conf")
    call(monkeypatch, tmp_path, "seeds=[0,1,2]")
    result = json.loads((tmp_path / "runs/claims/mine/claim.json").read_text())
    assert result["figures"] == {
        "PSNR": {"a": [20, 21, 22], "b": [20, 21, 22], "no lm": [20, 21, 22]},
        "bits": {"a": [4, 4, 4], "b": [3, 3, 3]},
    }
    assert result["verdict"] == HOLDS and result["comparisons"][0]["values"] == [-1, -1, -1]
    assert (tmp_path / "runs/claims/mine/claim.png").is_file() and "verdict: holds" in capsys.readouterr().out
    assert len(ran) == 3 * 5 and not list(tmp_path.rglob("checkpoints"))
    call(monkeypatch, tmp_path, "seeds=[0,1,2,3]")
    assert len(ran) == 4 * 5  # the new seed alone
    assert json.loads((tmp_path / "runs/claims/mine/claim.json").read_text())["minutes"] >= result["minutes"]


def test_a_run_is_made_again_unless_it_is_whole(ran, tmp_path, monkeypatch):
    """Without its marker, with a damaged one, without its folder; and refused when defaults were others."""
    conf(tmp_path / "conf", figures={"PSNR": "tokenizer:heldout.psnr"}, cells={"a": {}}, holds=[])
    call(monkeypatch, tmp_path, "seeds=[0]")
    (marker,) = (tmp_path / "runs/claims/runs").glob("*.json")
    folder, kept = marker.with_suffix(""), json.loads(marker.read_text())
    call(monkeypatch, tmp_path, "seeds=[0]")
    assert len(ran) == 1
    for spoil in (lambda: marker.unlink(), lambda: marker.write_text("{"), lambda: None):
        spoil()
        shutil.rmtree(folder)
        call(monkeypatch, tmp_path, "seeds=[0]")
    assert len(ran) == 4
    marker.unlink()  # stopped before its end: the command goes on in its folder
    call(monkeypatch, tmp_path, "seeds=[0]")
    assert len(ran) == 5
    marker.write_text(json.dumps({**kept, "config": "other"}))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, "seeds=[0]")
    assert stopped.value.code == 2


def test_sizes_pictures_and_all_comparisons_count(ran, tmp_path, monkeypatch, capsys):
    holds = [{"figure": "bits", "cell": "b", "than": "a", "most": 0.0}]
    holds += [{"figure": "bits", "cell": "b", "than": "a", "ratio": True, "least": 2.0}]
    sizes = {"smoke": {"lm": ["lm_size=smoke"]}}
    conf(tmp_path / "conf", holds=holds, sizes=sizes, pictures="tokenizer:seen.png")
    call(monkeypatch, tmp_path, "seeds=[0,1]", "size=smoke")
    out = tmp_path / "runs/claims/mine"
    result = json.loads((out / "claim.json").read_text())
    assert [each["verdict"] for each in result["comparisons"]] == [HOLDS, FAILS] and result[
        "verdict"
    ] == FAILS
    assert result["command"] == "vqlm-claim experiment/claims=mine size=smoke seeds=[0,1]"
    assert all("lm_size=smoke" in words for words in ran if words[0] == "lm-train")
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.size == (1000, 3 * (22 + 500))  # three cells, the upper half of a square each
    said = capsys.readouterr().out
    assert "b - a = -1" in said and "said to be at most 0: holds" in said
    assert "b / a = 0.7" in said and "said to be at least 2: fails" in said and "20.5 ± 0.71" in said


def test_a_figure_that_is_not_there_is_told_after_the_first_run(ran, tmp_path, monkeypatch, capsys):
    conf(tmp_path / "conf", figures={"PSNR": "tokenizer:heldout.psmr", "bits": "lm:heldout.image_bits"})
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path)
    assert len(ran) == 1 and "figures.PSNR: " in capsys.readouterr().err


def test_two_claims_at_once_wait_for_each_other(tmp_path, monkeypatch, capsys):
    made = small().runs_of("a", 0)["tokenizer"]
    ran = []

    def slow(title, name, words):
        time.sleep(0.3)
        made.folder(tmp_path).mkdir()
        ran.append(title)

    monkeypatch.setattr(experiment, "run", slow)
    both = [threading.Thread(target=made.make, args=(tmp_path, "t")) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(ran) == 1 and "another process makes this run" in capsys.readouterr().out


def test_a_run_that_fails_leaves_what_is_known(ran, tmp_path, monkeypatch):
    conf(tmp_path / "conf")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, "seeds=[0,9]")
    assert stopped.value.code == 1
    result = json.loads((tmp_path / "runs/claims/mine/claim.json").read_text())
    assert result["seeds"] == [0] and result["verdict"] == UNCLEAR


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ["seeds=[1,1]"], "different numbers"),
        ({}, ["seeds=[]"], "one or more"),
        ({}, ["size=smoke"], "this claim has laptop only"),
        ({"steps": {**STEPS, "tokenizer": STEPS["tokenizer"][:2]}}, [], "all seeds are one"),
        ({"cells": {**CELLS, "b": {}}}, [], "bits of b: a runs the same words"),
        (
            {"holds": [{"figure": "PSMR", "cell": "a", "least": 1}]},
            [],
            "holds.0.figure=PSMR.*did you mean 'PSNR'",
        ),
        ({"holds": [{"figure": "PSNR", "cell": "c", "least": 1}]}, [], "holds.0.cell=c"),
        ({"holds": [{"figure": "PSNR", "cell": "a"}]}, [], "give one of them"),
        ({"holds": [{"figure": "PSNR", "cell": "a", "leats": 1}]}, [], "leats"),
        ({"holds": [{"figure": "bits", "cell": "no lm", "least": 1}]}, [], "does without the step lm"),
        (
            {"cells": {"a": {"lm": ["haed=linear"]}}, "holds": []},
            [],
            r"step lm of cell a \(lm-train\): .*haed",
        ),
        ({"cells": {"a": {"lm": ["head=lineer"]}}, "holds": []}, [], "did you mean 'linear'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    ran, change, words, message, tmp_path, monkeypatch, capsys
):
    import re

    conf(tmp_path / "conf", **change)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, *words)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, told, re.S), told
    assert ran == [] and not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_without_a_claim_the_choice_is_explained(monkeypatch, capsys, tmp_path):
    (tmp_path / "runs/claims/depth").mkdir(parents=True)  # of another one
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vqlm-claim"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "vqlm-claim experiment/claims=NAME" in capsys.readouterr().err


# --- the claims that ship -------------------------------------------------------------------------------------

SHIPPED = sorted(path.stem for path in (CONF / "experiment/claims").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_step_of_every_claim_fits_its_command(name, tmp_path):
    told = yaml.safe_load((CONF / f"experiment/claims/{name}.yaml").read_text())
    assert told["name"] == name and told["predicted"] and told["holds"]
    for size in ("laptop", "smoke", "gpu"):
        # sizes add the same words to every cell: one of them will do
        cells = told["cells"] if size == "laptop" else dict([next(iter(told["cells"].items()))])
        made = Experiment(
            told["steps"], cells, told["figures"], told.get("pictures"), told["sizes"].get(size, {})
        )
        for n, each in enumerate(told["holds"] if size == "laptop" else []):
            claim.comparison(each, f"holds.{n}", made)
        claim.check_words(made, [0], tmp_path)
    assert {"smoke", "gpu"} <= set(told["sizes"])


def test_composing_within_a_job_leaves_the_job_as_it_was():
    from hydra.core.global_hydra import GlobalHydra

    import vq.train

    before = GlobalHydra.instance().hydra
    told = command.compose(vq.train.main, ["images=shapes", "out=x"])
    assert told["images"]["source"]["_target_"] == "vq.shapes.Shapes" and told["out"] == "x"
    assert GlobalHydra.instance().hydra is before
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        command.compose(vq.train.main, ["sede=1"])
