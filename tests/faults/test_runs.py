"""C.2, C.4, C.6, C.7: runs that are stopped, resumed, repeated and counted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from faults.runs import COUNT, CPU, RUNS, Disturbed, difference, pictures, sending, state, tokenizer_run
from tiny import write_pictures
from torch.utils.data import DataLoader

from vqlm.errors import Interrupted
from vqlm.files import sha256
from vqlm.training import Checkpoints, fit, read_log

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}


# --- C.4 ------------------------------------------------------------------------------------------------------


def shuffled_rows_after_a_stop():
    """datasets' own streaming shuffle: 1000 rows, buffer 100, stopped at 200 and resumed. Missing, twice."""
    from datasets import Dataset

    def rows():
        made = Dataset.from_dict({"n": list(range(1000))}).to_iterable_dataset(num_shards=4)
        return made.shuffle(seed=0, buffer_size=100)

    first, seen = rows(), []
    for row in first:
        seen.append(row["n"])
        if len(seen) == 200:
            kept = first.state_dict()
            break
    second = rows()
    second.load_state_dict(kept)
    seen += [row["n"] for row in second]
    return 1000 - len(set(seen)), len(seen) - len(set(seen))


def library_codebook_after_a_stop():
    """vector-quantize-pytorch with re-initialised codes, state_dict saved and loaded at half: largest difference."""
    from vector_quantize_pytorch import VectorQuantize

    def made():
        torch.manual_seed(0)
        return VectorQuantize(dim=4, codebook_size=32, threshold_ema_dead_code=2, kmeans_init=False).train()

    def batch(n):
        return torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(n))

    whole = made()
    for n in range(40):
        if n == 20:
            kept = {key: value.clone() for key, value in whole.state_dict().items()}
        whole(batch(n))
    again = made()
    torch.manual_seed(99)
    again.load_state_dict(kept)
    for n in range(20, 40):
        again(batch(n))
    ours, theirs = whole.state_dict(), again.state_dict()
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)


def uninterrupted(road, steps, folder):
    """A whole run, and the number of each picture that it read."""
    make, batches = RUNS[road]
    learner = make(steps)
    fit(learner, batches, folder, CPU, "test")
    return state(learner)


@pytest.mark.parametrize("road", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(road, count, figure, tmp_path):
    make, batches = RUNS[road]
    steps, places = count(10, 40), count((5,), (20, 1, 11, 33))
    whole, differences = uninterrupted(road, steps, tmp_path / "whole"), []
    for workers in count((0,), (0, 2)):
        for at in places:
            folder = tmp_path / f"{workers}-{at}"
            with pytest.raises(Interrupted):
                stopped = Disturbed(batches(steps), {at - 1}, sending(signal.SIGTERM))
                fit(make(steps), lambda _, stopped=stopped: stopped, folder, CPU, "test")
            resumed = make(steps, seed=99)
            fit(resumed, batches, folder, CPU, "test", workers)
            differences.append(difference(whole, state(resumed)))
            numbers = [entry["batch"] for entry in read_log(folder / "log.jsonl")]
            assert numbers == sorted(set(numbers)) and numbers[-1] == steps
    assert max(differences) == 0 and len(whole[0]) > 100
    stock = {}
    if road == "tokenizer":
        missing, twice = shuffled_rows_after_a_stop()
        assert seen_twice(steps) == (0, 0)
        stock = {
            "vector-quantize-pytorch, state_dict": f"maximal difference {library_codebook_after_a_stop():.2g}",
            "datasets, shuffle buffer": f"{missing} of 1000 rows missing, {twice} twice",
        }
    kinds = {
        "tokenizer": "EMA codebooks, re-initialised codes, GAN, averaged weights",
        "language model": "packed mixture of six tasks, drawn codes, averaged weights",
    }
    figure(
        "C.4",
        f"{road} stopped and resumed ({kinds[road]})",
        "every tensor, counter and random state is saved; batch n is a function of seed and n",
        f"{steps} steps against {steps}, stopped {len(differences)} times (0{count('', ' and 2')} workers): "
        f"maximal difference {max(differences):g} over {len(whole[0])} tensors",
        stock,
    )


def seen_twice(steps):
    """Pictures of a whole epoch that a run stopped in the middle of it has missed, or read twice."""
    made = pictures(steps)
    epoch = COUNT // 4
    resumed = pictures(steps)
    ids = [name for n in range(epoch // 2) for name in made[n].ids]
    ids += [name for n in range(epoch // 2, epoch) for name in resumed[n].ids]
    return COUNT - len(set(ids)), len(ids) - len(set(ids))


# --- C.2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_the_step_that_was_under_way(number, tmp_path):
    at, expected = 3, SIGNALS[number]
    stopped = Disturbed(pictures(8), {at}, sending(number))
    learner = tokenizer_run(8)
    with pytest.raises((Interrupted, KeyboardInterrupt)) as told:
        fit(learner, lambda _: stopped, tmp_path, CPU, "test")
    code = told.value.code if isinstance(told.value, SystemExit) else 130  # the command turns Ctrl-C into 130
    assert code == expected
    assert learner.batches_seen == at + 1
    resumed = tokenizer_run(8)
    assert Checkpoints(tmp_path / "checkpoints").resume(resumed) and resumed.batches_seen == at + 1
    assert difference(state(learner), state(resumed)) == 0


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_does_not_wait_for_the_step(number, tmp_path):
    """Nothing is saved of the step, what was saved before is there, and the exit code says what happened."""
    send = sending(number)
    fit(tokenizer_run(2), pictures, tmp_path, CPU, "test")
    with pytest.raises(SystemExit) as told:
        twice = Disturbed(pictures(8), {3}, lambda batch: send(send(batch)))
        fit(tokenizer_run(8), lambda _: twice, tmp_path, CPU, "test")
    assert told.value.code == SIGNALS[number]
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").all()] == ["batch-00000002"]


def command(folder, *words):
    """vq-train over drawings, in a process of its own."""
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "vq.train",
                "images=folder",
                "images.source.path=pictures",
                "images.size=16",
            ),
            *(
                "vq_size=smoke",
                "learner.budget.batches=100000",
                "device=cpu",
                "watch=none",
                "out=run",
                *words,
            ),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def running(process, log, beyond):
    """Wait until the run has logged a batch beyond this one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and any(entry["batch"] > beyond for entry in read_log(log)):
            return
        time.sleep(0.1)
    pytest.fail(f"the run has not begun: {process.stderr.read() if process.poll() is not None else ''}")


PLAIN = """
import signal, sys, time, lightning as L, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 4)
    def training_step(self, batch, n):
        print("step", n, flush=True)
        time.sleep(0.01)
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
rows = torch.utils.data.DataLoader(torch.randn(100000, 4), batch_size=2)
keep = L.pytorch.callbacks.ModelCheckpoint(dirpath=sys.argv[1], save_last=True)
L.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False,
          enable_model_summary=False).fit(Plain(), rows)
"""


def lightning_signalled(number, folder):
    """A plain Lightning run with ModelCheckpoint, stopped in its first epoch: exit code, and files left."""
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 20"):
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    return process.returncode, len(list(folder.glob("*.ckpt")))


def test_signals_to_a_command_lose_no_step(count, figure, tmp_path):
    """From the command line: signals at random moments, each run resumed by the next one."""
    signals = count([], list(SIGNALS) * 3)
    if not signals:
        pytest.skip("processes: make faults; tests/test_journey.py terminates one")
    write_pictures(tmp_path / "pictures")
    chance, done, seconds, codes = random.Random(0), 0, [], []
    for number in signals:
        process = command(tmp_path)
        running(process, tmp_path / "run/log.jsonl", done)
        time.sleep(chance.random())
        began = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
        seconds.append(time.monotonic() - began)
        codes.append(process.returncode == SIGNALS[number])
        assert codes[-1], (number, process.returncode, said[-2000:])
        newest = int(Checkpoints(tmp_path / "run/checkpoints").all()[-1].name.removeprefix("batch-"))
        last = read_log(tmp_path / "run/log.jsonl")[-1]["batch"]
        assert newest >= last > done
        assert not done or f"going on from run/checkpoints/batch-{done:08d}" in said
        done = newest
    stock = {}
    for number in SIGNALS:
        code, files = lightning_signalled(number, tmp_path / number.name)
        stock[f"Lightning, {number.name}"] = f"exit {code}, {files} checkpoints"
    figure(
        "C.2",
        "SIGTERM, SIGINT, SIGUSR1 in the middle of an epoch",
        "the step is finished and saved; exit 143 (130 for SIGINT); the same command goes on",
        f"{sum(codes)}/{len(signals)} right exit codes, 0 steps lost, all resumed, "
        f"at most {max(seconds):.1f} s from signal to exit",
        stock,
    )


# --- C.6 ------------------------------------------------------------------------------------------------------


def finished(folder, out, seed):
    process = command(folder, f"out={out}", f"seed={seed}", "learner.budget.batches=6")
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    losses = [(entry["batch"], entry.get("loss")) for entry in read_log(folder / out / "log.jsonl")]
    return sha256(folder / out / "tokenizer/model.safetensors"), dict(losses)[6]


def test_the_same_seed_gives_the_same_run(count, figure, tmp_path):
    write_pictures(tmp_path / "pictures")
    if count(True, False):  # without processes: fit, twice
        states = []
        for name in "ab":
            learner = tokenizer_run(6)
            fit(learner, pictures, tmp_path / name, CPU, "test")
            states.append((state(learner), [e["loss"] for e in read_log(tmp_path / name / "log.jsonl")]))
        assert states[0][1] == states[1][1] and difference(states[0][0], states[1][0]) == 0
        ours = "2 runs in one process: weights and losses equal"
    else:
        runs = [finished(tmp_path, f"run{n}", seed) for n, seed in enumerate((0, 0, 0, 1))]
        assert runs[0] == runs[1] == runs[2] != runs[3]
        ours = "3 runs from the command line: SHA-256 of the weights and losses equal, another seed's are not"
    figure("C.6", "the same seed again", "every draw comes from a generator with a seed of its own", ours)


# --- C.7 ------------------------------------------------------------------------------------------------------


class TwoPlayers(L.LightningModule):
    """A GAN as Lightning's documentation has it: manual optimisation, two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.batches = 0

    def training_step(self, batch, n):
        self.batches += 1
        for net, optimizer in zip((self.one, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.one, self.other)]


def lightning_batches(steps):
    players = TwoPlayers()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(players, DataLoader(torch.randn(100, 2), batch_size=1))
    return players.batches


def test_a_step_is_a_batch(count, figure, tmp_path):
    steps, starts = 10, count((0.0, 0.5), (0.0, 0.1, 0.3, 0.5, 0.9))
    seen = {}
    for start in (*starts, None):
        learner = tokenizer_run(steps)
        if start is None:
            from vq.losses.adversarial import NoAdversary

            learner.adversary = NoAdversary()
        else:
            learner.adversary.start, learner.adversary.ramp = start, 0.0
        fit(learner, pictures, tmp_path / str(start), CPU, "test")
        seen[start] = (learner.batches_seen, learner.samples_seen)
        if start is not None:
            assert learner.adversary.steps == steps - round(start * steps)
    assert set(seen.values()) == {(steps, 4 * steps)}
    figure(
        "C.7",
        "steps asked for, with a discriminator that starts at any time",
        "batches and samples are counted, not the steps of optimizers",
        f"{steps} batches asked for, {steps} trained on, {len(seen)}/{len(seen)} settings",
        {"Lightning, two optimizers": f"max_steps={steps}: {lightning_batches(steps)} batches"},
    )
