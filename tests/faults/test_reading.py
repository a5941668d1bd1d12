"""Faults of reading: a long epoch, a run that stops within one, and one that goes on with other processes.

Knows neither pictures nor what a language model learns.
"""

import gc
import os
import time
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from faults.runs import CPU, adam
from on_ranks import continue_lm, make_documents, make_lm_learner, run_on_ranks, train_lm_killed
from safetensors.torch import load_file
from tiny import make_format, make_model, write_made_store
from torch.multiprocessing import ProcessExitedException

from lm.data import PairsInParts, open_store
from lm.learner import LMLearner
from lm.mixture import Mixture
from lm.objectives.next_token import NextToken
from lm.parts import PartedBatches
from lm.vocab import text_to_ids
from vq.store import reader
from vqlm.training import Budget, Once, fit

DOCUMENTS = 64  # a batch


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(reader, "IN_MEMORY", 1)


def batches(store, documents=DOCUMENTS, mixture=None):
    """total → batches of a store in parts, read as `lm-train` reads them."""
    form, tokenizer = make_format()
    pairs = PairsInParts(store, "train", lambda text: text_to_ids(tokenizer, text), 32)
    return lambda total: PartedBatches(pairs, form, mixture or Mixture(), documents, None, 0, total)


class Watched(L.Callback):
    """Resident memory and open files of this process, after some batches."""

    def __init__(self, every):
        self.every, self.bytes, self.handles = every, [], []

    def on_train_batch_end(self, trainer, learner, *_):
        if learner.batches_seen % self.every == 0:
            gc.collect()
            resident = Path("/proc/self/statm").read_text().split()[1]
            self.bytes.append(int(resident) * os.sysconf("SC_PAGE_SIZE"))
            self.handles.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.timeout(1800)
def test_an_epoch_of_captions_leaves_memory_flat(tmp_path, in_parts, count, figure):
    captions, shard = count(2000, 200_000), count(50, 1000)
    store = open_store(write_made_store(tmp_path / "store", captions, shard))
    made = batches(store)
    pairs = made(1).pairs
    steps = len(pairs) // DOCUMENTS
    watched, start = Watched(max(1, steps // 200)), time.monotonic()
    learner = LMLearner(make_model()[0].train(), NextToken(), adam, Budget(batches=steps, warmup=2))
    fit(learner, made, tmp_path / "run", CPU, "test", callbacks=[watched], checkpoint_minutes=60)
    seconds = time.monotonic() - start
    order = made(1).order
    seen = Counter(each for n in range(steps) for each in order.samples(n, range(DOCUMENTS)))
    assert len(seen) == learner.samples_seen == steps * DOCUMENTS > len(pairs) - DOCUMENTS
    late = np.array(watched.bytes[len(watched.bytes) // 4 :], float)
    slope = np.polyfit(np.arange(len(late)) * watched.every * DOCUMENTS, late, 1)[0]
    assert max(watched.handles) - min(watched.handles) <= 1
    assert late[-1] - late[0] < 64 * 2**20
    if captions >= 100_000:
        assert slope < 50, f"{slope:.1f} bytes a caption"
    figure(
        "C.30",
        f"{captions:,} captions in {store.parts} shards, one epoch of a language model",
        "shards are read when documents of them are due; as many are held as a batch looks into",
        f"memory {slope:+.2f} bytes a caption ({(late[-1] - late[0]) / 2**20:+.1f} MB over the last three quarters); "
        f"open files {watched.handles[0]} → {watched.handles[-1]}; "
        f"each caption once; {learner.samples_seen / seconds:,.0f} documents a second",
    )


ROWS, STOP, BUFFER = 1000, 200, 100


def resumed_stream():
    """Rows that `datasets` gives before it stops, and after its state was loaded again."""
    from datasets import Dataset, IterableDataset, disable_progress_bars

    disable_progress_bars()

    def stream() -> IterableDataset:
        whole = Dataset.from_dict({"row": list(range(ROWS))}).to_iterable_dataset(num_shards=4)
        return whole.shuffle(seed=0, buffer_size=BUFFER)

    before, first = [], stream()
    for each in first:
        before.append(each["row"])
        if len(before) == STOP:
            break
    state, second = first.state_dict(), stream()
    second.load_state_dict(state)
    return before, [each["row"] for each in second]


def test_a_stream_that_stops_within_an_epoch_loses_no_row(tmp_path, in_parts, figure):
    store = open_store(write_made_store(tmp_path / "store", ROWS, 100))
    mixture = Mixture(text_to_image=1.0, image_to_text=0.0, drop_condition=0.0, noise=0.0)
    made = batches(store, 10, mixture)
    rows, stop = len(made(1).pairs) // 10, STOP // 10
    parts = [Once(made(rows), start, workers) for start, workers in ((0, 0), (stop, 2))]
    before = [captions(batch) for batch, _ in zip(parts[0], range(stop), strict=False)]
    ours = Counter(each for batch in [*before, *map(captions, parts[1])] for each in batch)
    train = sum(len(store.part(number).ids("train")) for number in range(store.parts))
    assert set(ours.values()) == {1} and len(ours) == rows * 10 and train - len(ours) < 10
    theirs = Counter(each for part in resumed_stream() for each in part)
    missing, twice = ROWS - len(theirs), sum(times > 1 for times in theirs.values())
    figure(
        "C.4",
        f"a shuffled stream of {ROWS:,} rows, stopped after {STOP} and gone on with",
        "which rows make batch n is a function of seed and n: nothing has to be remembered",
        f"0 rows missing, 0 twice (of {len(ours)}; 0 workers before, 2 after)",
        {f"datasets, streamed, shuffle buffer {BUFFER}": f"{missing} of {ROWS:,} missing, {twice} twice"},
    )


def captions(batch):
    """The text of each document of a batch, as ids."""
    first = make_format()[0].vocabulary.image_offset
    rows = zip(batch.ids_BTW[:, :, 0], batch.document_BT, strict=True)
    return [
        str([each for each in ids[at == k].tolist() if 0 <= each < first])
        for ids, at in rows
        for k in range(int(at.max()) + 1)
    ]


@pytest.mark.skipif(os.environ.get("FAULTS") != "full", reason="tests/lm/test_ranks.py has it in small")
@pytest.mark.timeout(600)
def test_another_number_of_processes_goes_on(tmp_path, figure):
    """40 steps by 2 processes, against 20 and a kill and 20 by another number of processes."""
    steps, stop = 40, 20
    for name in ("two", "a", "b"):
        (tmp_path / name).mkdir()
    run_on_ranks(continue_lm, tmp_path / "two", "killed", steps)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(train_lm_killed, tmp_path / "a", steps, stop)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(train_lm_killed, tmp_path / "b", steps, stop, world=1)
    (tmp_path / "b" / "meet").unlink(missing_ok=True)
    run_on_ranks(continue_lm, tmp_path / "b", "killed", steps)
    alone = make_lm_learner(steps, average=0.5)
    fit(alone, make_documents(), tmp_path / "a" / "killed", CPU, "test")
    expected = load_file(tmp_path / "two" / "killed.safetensors")
    found = {
        "2 → 1": {k: v for k, v in alone.training_state()[0].items() if k in expected},
        "1 → 2": load_file(tmp_path / "b" / "killed.safetensors"),
    }
    largest = max(float(v.abs().max()) for k, v in expected.items() if k.startswith("model/"))
    told = []
    for name, tensors in found.items():
        apart = max(
            float((tensors[k] - v).abs().max()) for k, v in expected.items() if k.startswith("model/")
        )
        assert apart < 1e-4
        told.append(f"{name}: {apart:.1e}")
    figure(
        "C.4",
        f"{steps} steps by 2 processes, against {stop}, kill -9 and {steps - stop} by another number (DDP)",
        "the documents of batch n do not depend on the number of processes",
        f"0 documents lost; largest difference of a weight {', '.join(told)} (largest weight {largest:.1f})",
    )
