"""Stores that are read shard by shard: every row once an epoch, whoever reads it, and the same after a resumption."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import make_format, write_made_store

from lm.data import PairsInParts, identity, open_store, read_pairs
from lm.mixture import TASKS, DocumentBatches, Mixture
from lm.parts import PartedBatches
from lm.sequence import Image, Text
from vq.store import CodeStore, reader
from vqlm.batches import ShardOrder
from vqlm.errors import ConfigError
from vqlm.training import Once

ONLY = dict.fromkeys(TASKS, 0.0) | {"noise": 0.0, "drop_condition": 0.0}
PAIRS = {"text_to_image": 1.0}
ALL = {task: 1.0 for task in TASKS if task != "written"} | {"noise": 0.2, "drop_condition": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """203 pictures in shards of 16; 164 of them to train on."""
    return write_made_store(tmp_path_factory.mktemp("made") / "store", 203, 16)


@pytest.fixture
def whole(folder):
    return open_store(folder)


@pytest.fixture
def store(folder, whole, monkeypatch):
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    return open_store(folder)


def encode(text):
    return [ord(each) % 200 for each in text]


def batches(store, tasks, documents=12, total=100, texts=([1, 2, 3],), seed=0, bare=(), **ranks):
    form, mixture = make_format()[0], Mixture(**ONLY | tasks)
    pairs = Bare(store, "train", encode, 64)
    pairs.bare = bare
    return PartedBatches(pairs, form, mixture, documents, None, seed, total, texts, **ranks)


class Bare(PairsInParts):
    """Some shards have no captions."""

    bare = ()

    def part(self, number):
        made = super().part(number)
        if number in self.bare:
            made.captions, made.texts = [()] * len(made), [""] * len(made)
        return made


def documents_of(batch):
    """Each document of a batch: its ids and what is to be predicted."""
    return [
        (batch.ids_BTW[b, at].flatten().tolist(), batch.next_BTW[b, at].flatten().tolist())
        for b, row in enumerate(batch.document_BT)
        for at in (row == k for k in range(int(row.max()) + 1))
    ]


def same(a, b):
    return documents_of(a) == documents_of(b)


# --- the order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 12, 130])
@pytest.mark.parametrize("counts", [[5], [0, 3, 0, 4], [9, 1, 0, 30, 2, 2, 17], [1] * 40])
def test_every_sample_comes_once_an_epoch(counts, batch_size):
    order, total = ShardOrder(counts, batch_size, 3), sum(counts)
    expected = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    found = [each for n in range(3 * total // batch_size + 1) for each in order.samples(n, range(batch_size))]
    epochs = [found[start : start + total] for start in (0, total, 2 * total)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    if total > 20:
        assert epochs[0] != epochs[1] != epochs[2]
        other = ShardOrder(counts, batch_size, 4)
        assert [other.samples(n, [0]) for n in range(9)] != [order.samples(n, [0]) for n in range(9)]
    for n in (4, 2):  # whatever was asked before, and by whom
        apart = [ShardOrder(counts, batch_size, 3).samples(n, [place])[0] for place in range(batch_size)]
        assert apart == order.samples(n, range(batch_size))


def test_a_batch_holds_many_shards_and_a_process_reads_few():
    order = ShardOrder([1000] * 64, 32, 0)
    assert order.lanes == 32 and len({shard for shard, _ in order.samples(700, range(32))}) == 32
    read = []
    for rank in range(8):
        places = range(rank, 32, 8)
        assert order.open_shards(places) == 4
        read.append({shard for n in range(64_000 // 32) for shard, _ in order.samples(n, places)})
    assert set.union(*read) == set(range(64))
    assert max(map(len, read)) <= 4 * 3  # two shards a stretch, and one that a border cuts
    rows = [row for shard, row in (order.samples(n, [0])[0] for n in range(1000))]
    assert np.abs(np.diff(rows)).mean() > 250  # a shuffled shard: 333; one in its order: 1
    assert [ShardOrder([100], n, 0).lanes for n in (1, 64, 65, 96, 1000, 127)] == [1, 64, 13, 48, 50, 1]
    with pytest.raises(ValueError, match="0 samples"):
        ShardOrder([0, 0], 4, 0)


def test_a_shard_is_shuffled_anew_for_each_seed_epoch_and_shard():
    def rows(order, epoch):
        return [order.samples(30 * epoch + n, [0])[0] for n in range(30)]

    order = ShardOrder([30], 1, 0)
    assert len({str(rows(each, epoch)) for each in (order, ShardOrder([30], 1, 1)) for epoch in (0, 1)}) == 4
    pair = ShardOrder([15, 15], 1, 0)
    apart = [[row for shard, row in rows(pair, 0) if shard == k] for k in (0, 1)]
    assert sorted(apart[0]) == sorted(apart[1]) and apart[0] != apart[1]


# --- batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_over_ranks_and_workers_an_epoch_is_what_a_store_in_memory_gives(store, whole, ranks, workers):
    pairs, form = read_pairs(whole, "train", encode, 64), make_format()[0]
    assert len(pairs) == 164
    held = DocumentBatches(pairs, form, Mixture(**ONLY | PAIRS), 4, None, 0, 41)
    expected = Counter(map(str, (each for n in range(41) for each in documents_of(held[n]))))
    assert len(expected) == 164 and set(expected.values()) == {1}
    found = Counter()
    for rank in range(ranks):
        data = batches(store, PAIRS, documents=41, total=8, rank=rank, ranks=ranks)  # two epochs
        for batch in Once(data, 0, workers):
            found.update(map(str, documents_of(batch)))
    assert set(found.values()) == {2} and found.keys() == expected.keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_what_was_left(store, workers):
    data = batches(store, ALL, total=18)  # 164 pairs, 12 a batch: an epoch ends within batch 13
    whole = [data[n] for n in range(18)]
    resumed = list(Once(batches(store, ALL, total=18), 11, workers))
    assert len(resumed) == 7 and all(map(same, whole[11:], resumed))
    assert not same(whole[10], whole[11])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_all_ranks_together_see_what_one_process_sees(store, ranks):
    one = batches(store, ALL)
    parts = [batches(store, ALL, rank=rank, ranks=ranks) for rank in range(ranks)]
    for n in (0, 9, 13):
        found = [each for part in parts for each in documents_of(part[n])]
        assert sorted(documents_of(one[n])) == sorted(found)


def test_noise_replaces_codes_that_are_read_and_none_that_are_to_be_predicted(store):
    clean, noisy = (batches(store, PAIRS | {"noise": noise})[3] for noise in (0.0, 0.4))
    assert clean.next_BTW.tolist() == noisy.next_BTW.tolist()
    changed = clean.ids_BTW != noisy.ids_BTW
    picture = clean.ids_BTW >= make_format()[0].vocabulary.image_offset
    assert not changed[~picture].any() and 0.25 < changed[picture].float().mean() < 0.5


def test_what_a_document_takes_beside_its_pair_is_of_its_shard(store, whole):
    form, known = make_format()[0], read_pairs(whole, "train", encode, 64)
    places = {str(known.image(i)): i for i in range(len(known))}
    shard_of = np.repeat(np.arange(store.parts), store.counts("train"))
    for task in ("edit", "interleaved"):
        kinds = set()
        for ids, _ in documents_of(batches(store, {task: 1.0}, documents=48)[2]):
            segments = form.split(torch.tensor(ids).view(-1, form.width))
            chosen = [places[str(each)] for each in segments if isinstance(each, Image)]
            assert len({shard_of[i] for i in chosen}) == 1 and any(isinstance(s, Text) for s in segments)
            kinds.add(len(chosen))
        assert max(kinds) >= 2


def test_what_a_document_draws_is_its_own_in_each_place_batch_and_seed(store):
    def drawn(n, seed):
        texts = [[i] for i in range(200)]
        return sorted(
            str(ids) for ids, _ in documents_of(batches(store, {"text": 1.0}, 6, texts=texts, seed=seed)[n])
        )

    kinds = [drawn(0, 0), drawn(1, 0), drawn(0, 1)]
    assert all(len(set(each)) > 3 for each in kinds)
    assert len({str(each) for each in kinds}) == 3 and kinds[0] == drawn(0, 0)


@pytest.mark.parametrize(
    ("task", "lacks"),
    [
        (
            "edit",
            "two pictures of one concept with unlike captions; its documents of this task are text_to_image",
        ),
        ("interleaved", "captions; its documents of this task are text_to_image"),
        ("image_to_text", "captions; its documents of this task are pictures alone"),
    ],
)
def test_a_shard_that_has_nothing_for_a_task_is_told_once_and_a_store_that_has_nothing_is_refused(
    store, task, lacks, capsys
):
    form, bare = make_format()[0], (2, 7)
    some = batches(store, {task: 1.0}, documents=41, bare=bare)
    epoch = [ids for n in range(4) for ids, _ in documents_of(some[n])]
    lengths = [len(form.split(torch.tensor(ids).view(-1, form.width))) for ids in epoch]
    expected = sum(store.counts("train")[shard] for shard in bare)
    assert lengths.count(1) == expected  # pictures alone, for these shards have no captions at all
    assert sum(length < (2 if task == "image_to_text" else 3) for length in lengths) == expected
    (told,) = capsys.readouterr().err.splitlines()
    assert any(f"mixture.{task}: shard-{k:05}.parquet has no {lacks}" in told for k in bare)
    with pytest.raises(
        ConfigError, match=rf"mixture\.{task}=1\.0, but .* none of the \d+ shards .* has {lacks[:8]}"
    ):
        batches(store, {task: 1.0}, bare=range(store.parts))
    batches(store, PAIRS, bare=range(store.parts))  # pictures alone, as in memory


def test_no_more_shards_are_held_than_are_looked_into(store, monkeypatch):
    read, part = Counter(), CodeStore.part

    def counted(self, number):
        read[number] += 1
        return part(self, number)

    monkeypatch.setattr(CodeStore, "part", counted)
    data = batches(store, PAIRS, documents=4, total=41)  # 4 stretches of 41 pairs, 12 or 13 pairs a shard
    for n in range(41):
        _ = data[n]
        assert len(data._held) <= data.order.open_shards(data.places) == 4
    assert set(read) == set(range(store.parts)) and sum(read.values()) <= store.parts + 4


def test_a_damaged_shard_is_named_before_a_row_of_it_is_used(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "store")
    path = tmp_path / "store" / "shard-00005.parquet"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    damaged = batches(open_store(tmp_path / "store"), PAIRS, documents=4)
    sound, hit = batches(store, PAIRS, documents=4), 0
    for n in range(41):
        if 5 in {shard for shard, _ in sound.order.samples(n, range(4))}:
            hit += 1
            with pytest.raises(ConfigError, match=r"shard-00005\.parquet was changed after.*vq-encode"):
                _ = damaged[n]
        else:
            assert same(damaged[n], sound[n])
    assert 0 < hit < 30


# --- what is refused, and what a run remembers ----------------------------------------------------------------


def test_what_a_store_in_parts_cannot_give_is_refused(store):
    for tasks, told in (
        ({"written": 1.0, "documents": "d.jsonl"}, "written=1.0: documents of a file name any picture"),
        ({"text": 1.0}, r"text=1\.0, but there are 0 texts"),
    ):
        with pytest.raises(ConfigError, match=told):
            batches(store, tasks, texts=())
    with pytest.raises(ConfigError, match=r"longest_caption=null.*give a number"):
        PairsInParts(store, "train", encode, None)
    with pytest.raises(ConfigError, match="rank=2 of ranks=2"):
        batches(store, PAIRS, rank=2, ranks=2)
    pairs = PairsInParts(store, "train", encode, 64)
    with pytest.raises(ConfigError, match=r"pictures of \(2, 2\) cells"):
        PartedBatches(pairs, make_format(grid=(1, 3))[0], Mixture(**ONLY | PAIRS), 4, None, 0, 1)
    with pytest.raises(ConfigError, match="row_length=8: the longest document has"):
        PartedBatches(pairs, make_format()[0], Mixture(**ONLY | PAIRS), 4, 8, 0, 1)
    vocabulary = make_format()[0].vocabulary
    for id_ in (vocabulary.image_start, vocabulary.image_offset, vocabulary.size - 1):
        pairs.encode_text = lambda text, id_=id_: [5, id_]
        with pytest.raises(ConfigError, match=r"caption of 'p\d+' holds ids of special tokens"):
            _ = PartedBatches(pairs, make_format()[0], Mixture(**ONLY | PAIRS), 4, None, 0, 1)[0]


def test_the_order_is_part_of_what_a_run_was_trained_on(folder, monkeypatch):
    form = make_format()[0]
    held = identity(open_store(folder), form)
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    parted = identity(open_store(folder), form)
    assert parted == held | {"order": "shards, 1"} and "order" not in held
