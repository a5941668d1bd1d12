"""Two processes train one language model: they stay equal, and equal to one process that is fed all they are fed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_ranks import (
    LM_BATCHES,
    LM_STOP,
    make_documents,
    make_lm_learner,
    run_on_ranks,
    train_lm,
    train_lm_killed,
)
from safetensors.torch import load_file
from tiny import Signalled
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import Dataset

from vqlm.errors import ConfigError, Interrupted
from vqlm.hardware import Hardware, detect
from vqlm.ranks import start
from vqlm.training import Checkpoints, fit, read_log

ALONE = Hardware(torch.device("cpu"), "fp32")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # sums over ranks are taken in another order


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of two ranks, and what each of them ends with."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(Interrupted):
        begun = lambda total: Signalled(make_documents()(total), LM_STOP)  # noqa: E731
        fit(make_lm_learner(average=0.5), begun, folder / "from-one", ALONE, "test")
    run_on_ranks(train_lm, folder)
    return folder, [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


def test_two_ranks_are_one_process_with_the_joined_batch(together, tmp_path):
    folder, ranks = together
    alone = make_lm_learner(average=0.5)
    fit(alone, make_documents(), tmp_path, Hardware(torch.device("cpu"), "fp32"), "test")
    expected = alone.training_state()[0]
    for name, tensor in expected.items():
        if name.startswith("random/"):
            continue
        torch.testing.assert_close(ranks[0][f"whole/{name}"], tensor, atol=2e-5, rtol=1e-4, msg=name)
        assert torch.equal(ranks[0][f"whole/{name}"], ranks[1][f"whole/{name}"]), name
    (*_, last), (*_, theirs) = read_log(tmp_path / "log.jsonl"), read_log(folder / "whole" / "log.jsonl")
    names = ("loss", "text", "image", "z", "text_bits", "image_bits", "samples", "batch")
    for name in (*names, "grad_trunk", "grad_text_rows", "grad_image_rows", "grad_head"):
        assert theirs[name] == pytest.approx(last[name], rel=1e-3), name
    assert int(ranks[0]["whole/samples"]) == 6 * LM_BATCHES


def test_a_signal_to_one_rank_stops_all_and_they_go_on_to_the_bit(together):
    _, ranks = together
    for found in ranks:
        assert bool(found["parts/signals"])  # handlers were put back
        keys = [key.partition("/")[2] for key in found if key.startswith("whole/")]
        assert len(keys) > 100 and "random/cpu/1" in keys
        for key in keys:
            assert torch.equal(found[f"whole/{key}"], found[f"parts/{key}"]), key


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(together, tmp_path):
    folder, ranks = together
    shutil.copytree(folder / "parts", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(Checkpoints(tmp_path / "checkpoints").all()[-1])
    alone = make_lm_learner(average=0.5)
    fit(alone, make_documents(), tmp_path, Hardware(torch.device("cpu"), "fp32"), "test")
    assert len(read_log(tmp_path / "log.jsonl")) < LM_BATCHES  # it went on
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(tensor, ranks[0][f"whole/model/{name}"], atol=2e-5, rtol=1e-4, msg=name)


def test_a_checkpoint_of_one_process_goes_on_in_two(together):
    _, ranks = together
    for found in ranks:
        assert int(found["from-one/samples"]) == 6 * LM_BATCHES
        names = [name for name in found if name.startswith("from-one/") and "/random/" not in name]
        assert len(names) > 100
        for name in names:
            expected = found[name.replace("from-one", "whole")]
            torch.testing.assert_close(found[name], expected, **CLOSE, msg=name)
            assert torch.equal(found[name], ranks[0][name]), name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_two_processes_that_were_killed_go_on_in_one(together, tmp_path):
    """After the batches that were saved the same documents come in the same order, and weights end within rounding."""
    _, ranks = together
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(train_lm_killed, tmp_path)
    seen = []

    class Seen(Dataset):
        def __len__(self):
            return LM_BATCHES

        def __getitem__(self, n):
            seen.append(n)
            return make_documents()(LM_BATCHES)[n]

    alone = make_lm_learner(average=0.5)
    fit(alone, lambda total: Seen(), tmp_path / "killed", ALONE, "test")
    assert seen == list(range(LM_STOP, LM_BATCHES))
    assert alone.samples_seen == 6 * LM_BATCHES
    for name, tensor in alone.training_state()[0].items():
        if not name.startswith("random/"):
            torch.testing.assert_close(tensor, ranks[0][f"whole/{name}"], **CLOSE, msg=name)


TOGETHER = """
import sys, torch
sys.path.insert(0, {tests!r})
from on_ranks import make_documents, make_lm_learner
from vqlm import ranks
from vqlm.hardware import detect
from vqlm.training import fit
hardware = detect("cpu", "fp32", devices=2)
ranks.start(hardware.devices, hardware.device)
learner = make_lm_learner(4)
fit(learner, make_documents(ranks.rank(), ranks.rank_count()), {folder!r}, hardware, "test")
print("after", ranks.rank_count(), learner.batches_seen)
"""


def test_a_command_starts_its_other_rank_and_goes_on_alone(tmp_path):
    script = tmp_path / "train.py"
    tests = Path(__file__).parents[1]
    script.write_text(TOGETHER.format(tests=str(tests), folder=str(tmp_path / "run")))
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = outside | {"PYTHONPATH": str(tests.parent)}
    made = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == ["after", "1", "4"]  # said once
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["batch-00000004"]


def test_what_cannot_run_together_is_refused_by_name(monkeypatch):
    for settings, reason in (
        ({"devices": 1, "strategy": "fsdp"}, "needs several"),
        ({"devices": 0}, "at least 1"),
        ({"devices": 1, "strategy": "ddp"}, "needs several"),
    ):
        with pytest.raises(ConfigError, match=reason):
            detect("cpu", "fp32", **settings)
    assert detect("cpu", "fp32", devices=2).strategy == "ddp"
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 processes"):
        start(2, torch.device("cpu"))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lm.train", "seed=1,2", "-m"])
    with pytest.raises(ConfigError, match="sweep"):
        start(2, torch.device("cpu"))
