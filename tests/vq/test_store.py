"""The store: written = read, killed and resumed = uninterrupted, and nothing wrong is opened quietly."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vq.store import CodeStore, Loaded, Ranges, Record, StoreWriter, reader, write_store
from vq.store import shard as shard_module
from vq.store.manifest import hashes_of
from vq.store.shard import Damaged, canonical, read_shard, to_bytes
from vq.store.writer import check_unique
from vqlm.errors import ConfigError
from vqlm.files import sha256, write_bytes, write_json
from vqlm.places import LocalPlace

SOURCE = {"name": "made", "size": 8, "fit": "crop"}


class FakeTokenizer:
    """Codes are a hash of the cell's pixels: 8 px cells unless told otherwise."""

    image_size = 8

    def __init__(self, fingerprint="aaaa", codebook_size=16, depth=2, downsample=4):
        self.fingerprint, self.codebook_size = fingerprint, codebook_size
        self.depth, self.downsample = depth, downsample
        self.calls = 0

    def encode(self, x_BCHW):
        self.calls += 1
        assert x_BCHW.is_floating_point() and x_BCHW.abs().max() <= 1
        f = self.downsample
        cells = torch.nn.functional.avg_pool2d(x_BCHW.double(), f).sum(1)
        codes = [(cells * 1e6 * (q + 1)).round().long() % self.codebook_size for q in range(self.depth)]
        return torch.stack(codes, dim=-1)

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps({"fingerprint": self.fingerprint}))


@dataclass
class Set:
    x_NCHW: torch.Tensor
    ids: list
    captions: list
    concepts: list


def make_set(name, n, seed, height=8, width=8):
    x = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed))
    ids = [f"{name}/{i}" for i in range(n)]
    captions = [f"a picture of {each}, naïve 🍎" for each in ids]
    return Set(x.to(torch.uint8), ids, captions, [f"concept {i // 2}" for i in range(n)])


class SplitPictures:
    """`Pictures` in memory: the training set, the held-out set, then what was rejected while they were decoded.

    ValueError if an id occurs twice.
    """

    def __init__(
        self,
        train,
        heldout,
        rejects=(),
    ):
        self.sets = {"train": train, "heldout": heldout}
        self.rejects = list(rejects)
        self.records = [
            Record(*columns, split)
            for split, each in self.sets.items()
            for columns in zip(each.ids, each.captions, each.concepts, strict=True)
        ]
        check_unique(record.id for record in self.records)

    def __len__(self) -> int:
        return len(self.records) + len(self.rejects)

    def load(self, start: int, stop: int) -> Loaded:
        border, end = len(self.sets["train"].ids), len(self.records)
        parts = [
            self.sets["train"].x_NCHW[min(start, border) : min(stop, border)],
            self.sets["heldout"].x_NCHW[max(start - border, 0) : max(stop - border, 0)],
        ]
        filled = [part for part in parts if len(part)]  # an empty set may have no size to concatenate
        x_BCHW = torch.cat(filled) if filled else ()
        rejects = self.rejects[max(start - end, 0) : max(stop - end, 0)]
        return Loaded(self.records[start:stop], x_BCHW, rejects)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every record, reject and pixel."""
        rows = [asdict(record) for record in self.records]
        told = hashlib.sha256(canonical([rows, [dict(reject) for reject in self.rejects]]))
        for each in self.sets.values():
            told.update(str((tuple(each.x_NCHW.shape), each.x_NCHW.dtype)).encode())
            for x_BCHW in each.x_NCHW.split(1024):
                told.update(x_BCHW.cpu().contiguous().view(torch.uint8).numpy().data)
        return told.hexdigest()


REJECTS = [
    {"id": "bad/0", "reason": "corrupt", "detail": "cut off"},
    {"id": "bad/1", "reason": "empty", "detail": ""},
]


def pictures(n=10, heldout=3, rejects=REJECTS, **size):
    return SplitPictures(make_set("t", n, 0, **size), make_set("h", heldout, 1, **size), rejects)


def write(folder, tokenizer=None, made=None, **options):
    options = {"source": SOURCE, "shard_size": 4, "batch_size": 3, "progress": False, **options}
    made = pictures() if made is None else made
    return write_store(folder, tokenizer or FakeTokenizer(), made, **options)


def contents(folder):
    """Every file of a folder with its hash: two equal folders hold the same bytes."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def expected_codes(tokenizer, x_NCHW):
    return tokenizer.encode(x_NCHW.float() / 127.5 - 1)


# --- what is written is what is read


@pytest.mark.parametrize("height, width", [(8, 8), (8, 20)])
@pytest.mark.parametrize("codebook_size, stored", [(16, "uint16"), (2**16, "uint16"), (100_000, "uint32")])
def test_round_trip(tmp_path, height, width, codebook_size, stored):
    tokenizer = FakeTokenizer(codebook_size=codebook_size)
    made = pictures(height=height, width=width)
    write(tmp_path / "store", tokenizer, made)
    store = CodeStore.open(tmp_path / "store")

    assert len(store) == 13
    assert store.grid == (height // 4, width // 4)
    assert (store.codebook_size, store.depth, store.downsample) == (codebook_size, 2, 4)
    assert (store.tokenizer_fingerprint, store.image_size) == ("aaaa", 8)
    for split in ("train", "heldout"):
        each = made.sets[split]
        codes = store.codes_NhwQ(split)
        assert codes.dtype == torch.int64
        assert torch.equal(codes, expected_codes(tokenizer, each.x_NCHW))
        assert (store.ids(split), store.captions(split)) == (each.ids, each.captions)
        assert store.concepts(split) == each.concepts
    assert store.indices("heldout") == [10, 11, 12]
    assert len(store.codes_NhwQ()) == 13
    if codebook_size == 100_000:
        assert store.codes_NhwQ().max() > 2**16  # else the test would not tell uint16 from uint32
    schema = pq.read_schema(tmp_path / "store" / "shard-00000.parquet")
    assert str(schema.field("codes").type.value_type) == stored


def test_rows_one_by_one(tmp_path):
    write(tmp_path / "store")
    store = CodeStore.open(tmp_path / "store")
    rows = list(store)
    assert len(rows) == 13
    assert [r.id for r in rows] == store.ids()
    assert torch.equal(torch.stack([r.codes_hwQ for r in rows]), store.codes_NhwQ())
    assert rows[0].codes_hwQ.dtype == torch.int64
    last = store[-1]
    told = (last.id, last.caption, last.concept, last.split)
    assert told == ("h/2", "a picture of h/2, naïve 🍎", "concept 1", "heldout")
    for i in (13, -14):
        with pytest.raises(IndexError):
            store[i]


def test_order_of_a_cell_survives(tmp_path):
    """Row-major (h, w, Q): a transposed or depth-first writer gives other codes."""
    codes = torch.arange(2 * 3 * 2).reshape(1, 2, 3, 2)
    write(
        tmp_path / "store",
        made=pictures(1, 0, []),
        encode=lambda x: codes,
        tokenizer=FakeTokenizer(codebook_size=12),
    )
    assert torch.equal(CodeStore.open(tmp_path / "store")[0].codes_hwQ, codes[0])
    column = pq.read_table(tmp_path / "store" / "shard-00000.parquet").to_pylist()[0]
    assert (column["height"], column["width"], column["codes"]) == (2, 3, list(range(12)))


class Varied:
    """Pictures of several sizes, candidates 2 and 5 rejected while a range is loaded; no digest."""

    sizes = [(8, 8), (8, 8), None, (8, 12), (4, 4), None, (8, 8)]

    def __len__(self):
        return len(self.sizes)

    def load(self, start, stop):
        good = [i for i in range(start, stop) if self.sizes[i]]
        bad = [i for i in range(start, stop) if not self.sizes[i]]
        x = [torch.rand(3, *self.sizes[i], generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in good]
        records = [Record(str(i), "", "", "train") for i in good]
        return Loaded(records, x, [{"id": str(i), "reason": "huge", "detail": "9x9"} for i in bad])


def test_pictures_of_several_sizes(tmp_path):
    tokenizer = FakeTokenizer()
    summary = write(tmp_path / "store", tokenizer, Varied(), shard_size=3)
    assert (summary["pictures"], summary["rejects"], summary["shards"]) == (5, 2, 3)
    store = CodeStore.open(tmp_path / "store")
    assert store.grid is None
    assert store.ids() == ["0", "1", "3", "4", "6"]
    for row, i in zip(store, (0, 1, 3, 4, 6), strict=True):
        x = torch.rand(3, *Varied.sizes[i], generator=torch.Generator().manual_seed(i)) * 2 - 1
        assert torch.equal(row.codes_hwQ, tokenizer.encode(x[None])[0])
    with pytest.raises(ValueError, match="different grids"):
        store.codes_NhwQ()
    assert [r["id"] for r in store.rejects] == ["2", "5"]


class Changing(Varied):
    """As Varied, with one candidate whose pixels may be others."""

    def __init__(self, dark=None):
        self.dark = dark

    def load(self, start, stop):
        loaded = super().load(start, stop)
        for record, x_CHW in zip(loaded.records, loaded.x_BCHW, strict=True):
            if record.id == self.dark:
                x_CHW.zero_()
        return loaded


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_without_a_digest_each_shard_knows_its_pictures(tmp_path, batch_size):
    """However the pieces are cut, the same pictures are recognised, and a changed one costs its shard alone."""
    write(tmp_path / "store", made=Varied(), shard_size=3)
    before = contents(tmp_path / "store")
    same = write(tmp_path / "store", made=Changing(), shard_size=3, batch_size=batch_size)
    assert (same["kept"], same["encoded"]) == (3, 0) and contents(tmp_path / "store") == before
    other = write(tmp_path / "store", made=Changing("3"), shard_size=3, batch_size=batch_size)
    assert (other["kept"], other["encoded"]) == (2, 1)
    assert "shard-00001.parquet: was made of other pictures" in other["damage"][0]
    row = CodeStore.open(tmp_path / "store")[2]
    assert torch.equal(row.codes_hwQ, FakeTokenizer().encode(torch.zeros(1, 3, 8, 12))[0])


def test_pictures_are_loaded_ahead_of_the_encoder(tmp_path):
    """While a piece is encoded the next one is already being loaded."""
    made = pictures(12, 0, [])
    load, begun, encoded = made.load, {start: threading.Event() for start in (0, 3, 6, 9)}, []

    def loading(start, stop):
        begun[start].set()
        return load(start, stop)

    def encoding(x_BCHW):
        encoded.append(len(x_BCHW))
        following = begun.get(3 * len(encoded))
        assert following is None or following.wait(5), "the next piece waits for the encoder"
        return FakeTokenizer().encode(x_BCHW)

    made.load = loading
    write(tmp_path / "store", made=made, encode=encoding, shard_size=12)
    assert encoded == [3, 3, 3, 3]


def test_what_fails_while_loading_is_raised(tmp_path):
    made = pictures()

    def loading(start, stop):
        raise ConfigError("no more")

    made.load = loading
    with pytest.raises(ConfigError, match="no more"):
        write(tmp_path / "store", made=made)


def test_rejects_are_recorded(tmp_path):
    strange = [*REJECTS, {"id": "bad/2", "reason": "corrupt", "detail": 'line\u2028break\n"quoted"'}]
    summary = write(tmp_path / "store", made=pictures(rejects=strange))
    assert summary["rejects"] == 3
    lines = (tmp_path / "store" / "rejects.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == strange
    store = CodeStore.open(tmp_path / "store")
    assert store.rejects == strange
    assert store.manifest["rejects"] == {"total": 3, "reasons": {"corrupt": 2, "empty": 1}}
    assert store.manifest["splits"] == {"train": 10, "heldout": 3}


def test_a_shard_of_rejects_alone(tmp_path):
    many = [{"id": f"bad/{i}", "reason": "empty", "detail": ""} for i in range(9)]
    assert write(tmp_path / "store", made=pictures(2, 0, many))["shards"] == 3
    store = CodeStore.open(tmp_path / "store")
    assert (len(store), store.grid) == (2, (2, 2))
    assert len(store.rejects) == 9


def test_the_store_carries_its_tokenizer(tmp_path):
    write(tmp_path / "store")
    store = CodeStore.open(tmp_path / "store")
    assert json.loads((store.tokenizer_folder / "config.json").read_text()) == {"fingerprint": "aaaa"}


def test_a_module_encodes_as_a_plain_object_does(tmp_path):
    class Module(torch.nn.Module, FakeTokenizer):
        def __init__(self):
            torch.nn.Module.__init__(self)
            FakeTokenizer.__init__(self)
            self.weight = torch.nn.Parameter(torch.zeros(1))

    write(tmp_path / "module", Module())
    write(tmp_path / "plain")
    assert contents(tmp_path / "module") == contents(tmp_path / "plain")


# --- run again, killed and finished


def test_a_second_run_encodes_nothing(tmp_path):
    first, second = FakeTokenizer(), FakeTokenizer()
    summary = write(tmp_path / "store", first)
    assert first.calls == 7  # 15 candidates in shards of 4, batches of 3: 3+1, 3+1, 3+1, 1 (and two rejects)
    assert (summary["encoded"], summary["kept"], summary["redone"]) == (4, 0, 0)
    before = contents(tmp_path / "store")
    summary = write(tmp_path / "store", second)
    assert second.calls == 0
    assert (summary["encoded"], summary["kept"], summary["redone"]) == (0, 4, 0)
    assert contents(tmp_path / "store") == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls_before", [0, 2, 3, 6])
def test_killed_and_finished_equals_uninterrupted(tmp_path, calls_before):
    write(tmp_path / "whole")
    tokenizer = FakeTokenizer()

    def encode(x_BCHW):
        if tokenizer.calls == calls_before:
            raise Killed
        return tokenizer.encode(x_BCHW)

    with pytest.raises(Killed):
        write(tmp_path / "store", tokenizer, encode=encode)
    assert not (tmp_path / "store" / "manifest.json").exists()
    (tmp_path / "store" / ".shard-00001.parquet.0123abcd.part").write_bytes(b"half")  # what kill -9 leaves
    rest = FakeTokenizer()
    summary = write(tmp_path / "store", rest)
    assert summary["kept"] == calls_before // 2  # two calls a shard: whole shards are kept
    assert rest.calls == 7 - 2 * summary["kept"]
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_killed_between_shards_and_manifest(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    write_file = LocalPlace.write

    def killed_at_the_manifest(self, name, data):
        if name == "manifest.json":
            raise Killed
        write_file(self, name, data)

    monkeypatch.setattr(LocalPlace, "write", killed_at_the_manifest)
    with pytest.raises(Killed):
        write(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"unfinished: 4 of 4 shards.*vq-encode.*out="):
        CodeStore.open(tmp_path / "store")
    monkeypatch.undo()
    assert write(tmp_path / "store")["encoded"] == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_bytes_depend_on_neither_time_nor_place(tmp_path, monkeypatch):
    write(tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 4e9)
    write(tmp_path / "elsewhere" / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere" / "two")


def damage_truncate(data):
    return data[: len(data) // 2]


def damage_empty(data):
    return b""


def damage_flip(data):
    at = data.index(b"PAR1") + 40  # inside the first pages
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def damage_description(data):
    at = data.index(b'"fingerprint":"aaaa"') + 15
    return data[:at] + b"b" + data[at + 1 :]


DAMAGES = [damage_truncate, damage_empty, damage_flip, damage_description]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_and_redone(tmp_path, damage, finished):
    folder = tmp_path / "store"
    write(folder)
    whole = contents(folder)
    path = folder / "shard-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    if finished:
        with pytest.raises(ConfigError, match=r"shard-00001\.parquet.*vq-encode"):
            CodeStore.open(folder)
    else:
        (folder / "manifest.json").unlink()
    tokenizer = FakeTokenizer()
    summary = write(folder, tokenizer)
    assert (summary["redone"], summary["encoded"], summary["kept"]) == (1, 1, 3)
    assert "shard-00001.parquet" in summary["damage"][0]
    assert tokenizer.calls == 2
    assert contents(folder) == whole


def test_any_flipped_bit_is_found(tmp_path):
    """Fault 5 for stores, 200 seeded flips anywhere in any file: by open, by a second run, and never a crash."""
    folder = tmp_path / "store"
    write(folder)
    whole = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    digests = contents(folder)
    random = np.random.default_rng(0)
    paths = list(whole)
    for _ in range(200):
        path = paths[random.integers(len(paths))]
        data = bytearray(whole[path])
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            opened = CodeStore.open(folder)
        except ConfigError:
            pass
        else:  # only the manifest has no hash of its own: then codes and words must be the same all the same
            assert path.name == "manifest.json"
            assert opened.codes_NhwQ().shape == (13, 2, 2, 2)
        path.write_bytes(whole[path])
    assert contents(folder) == digests


def test_flipped_bits_of_an_unfinished_store_are_redone_or_harmless(tmp_path):
    """Without a manifest a shard has only its own hash: what survives must hold the same rows."""
    folder = tmp_path / "store"
    write(folder)
    job = json.loads((folder / "manifest.json").read_text())["job"]
    path = folder / "shard-00001.parquet"
    whole, sound = path.read_bytes(), read_shard(path.read_bytes(), job)
    random = np.random.default_rng(1)
    found = 0
    for _ in range(150):
        data = bytearray(whole)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            shard = read_shard(path.read_bytes(), job)
        except Damaged:
            found += 1
        else:
            assert shard.text == sound.text
            assert np.array_equal(shard.codes, sound.codes)
    assert found > 50


def test_a_lost_shard_or_tokenizer_is_found_and_replaced(tmp_path):
    folder = tmp_path / "store"
    write(folder)
    whole = contents(folder)
    for name in ("shard-00002.parquet", "tokenizer/config.json", "rejects.jsonl"):
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            CodeStore.open(folder)
        assert write(folder)["redone"] == 0
        assert contents(folder) == whole


def test_a_repair_that_is_killed_leaves_no_finished_store(tmp_path):
    folder = tmp_path / "store"
    write(folder)
    whole = contents(folder)
    (folder / "shard-00003.parquet").write_bytes(b"")

    def encode(x_BCHW):
        raise Killed

    with pytest.raises(Killed):
        write(folder, encode=encode)
    with pytest.raises(ConfigError, match="unfinished: 3 of 4 shards"):
        CodeStore.open(folder, verify=False)
    assert write(folder)["encoded"] == 1
    assert contents(folder) == whole


def test_a_caption_edited_with_other_software_is_redone(tmp_path):
    """A well-formed file: only the hash of the content can tell."""
    folder = tmp_path / "store"
    write(folder)
    whole = contents(folder)
    (folder / "manifest.json").unlink()
    path = folder / "shard-00001.parquet"
    table, about = pq.read_table(path), pq.read_metadata(path).metadata
    captions = pa.array(["something else", *table["caption"].to_pylist()[1:]])
    table = table.set_column(1, table.schema.field("caption"), captions)
    with pq.ParquetWriter(path, table.schema, store_schema=False) as file:
        file.write_table(table)
        file.add_key_value_metadata(about)
    assert "content was changed" in write(folder)["damage"][0]
    assert contents(folder) == whole


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "tokenizer/../../out.txt"])
def test_a_manifest_that_points_outside_is_refused(tmp_path, name):
    write(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    listed = json.loads(manifest.read_text())
    write_json(manifest, {**listed, "files": {**listed["files"], name: "0" * 64}})
    with pytest.raises(ConfigError, match="is damaged"):
        CodeStore.open(tmp_path / "store")


def test_a_shard_of_another_store_is_refused(tmp_path):
    write(tmp_path / "store")
    write(tmp_path / "other", FakeTokenizer("bbbb"))
    path, manifest = tmp_path / "store" / "shard-00001.parquet", tmp_path / "store" / "manifest.json"
    path.write_bytes((tmp_path / "other" / "shard-00001.parquet").read_bytes())
    listed = json.loads(manifest.read_text())
    listed["shards"][1].update(bytes=path.stat().st_size, sha256=sha256(path))
    write_json(manifest, listed)
    with pytest.raises(ConfigError, match=r"shard-00001\.parquet: belongs to another job"):
        CodeStore.open(tmp_path / "store")


def test_a_swapped_shard_is_redone(tmp_path):
    folder = tmp_path / "store"
    write(folder)
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.parquet").write_bytes((folder / "shard-00000.parquet").read_bytes())
    summary = write(folder)
    assert summary["damage"] == ["shard-00001.parquet: holds shard 0"]
    assert CodeStore.open(folder).ids()[4:6] == ["t/4", "t/5"]


# --- another job


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "options, told",
    [
        ({"tokenizer": FakeTokenizer("bbbb")}, r'fingerprint: "aaaa" → "bbbb"'),
        ({"source": {**SOURCE, "fit": "pad"}}, "source: .*crop.* → .*pad"),
        ({"shard_size": 5}, "shard_size: 4 → 5"),
        ({"made": pictures(n=11)}, "candidates: 15 → 16"),
        ({"made": SplitPictures(make_set("t", 10, 7), make_set("h", 3, 1), REJECTS)}, "digest: "),
    ],
)
def test_another_job_is_refused_before_work(tmp_path, options, told, finished):
    folder = tmp_path / "store"
    write(folder)
    if not finished:
        (folder / "manifest.json").unlink()
    before = contents(folder)
    with pytest.raises(ConfigError, match=told):
        write(folder, **options)
    assert contents(folder) == before


def test_another_batch_size_is_the_same_job(tmp_path):
    write(tmp_path / "store")
    assert write(tmp_path / "store", batch_size=1)["kept"] == 4


def test_digest_sees_every_part():
    base = pictures()
    assert base.digest == pictures().digest
    changed = [
        pictures(rejects=REJECTS[:1]),
        SplitPictures(replace(base.sets["train"], captions=["x"] * 10), base.sets["heldout"], REJECTS),
        SplitPictures(
            base.sets["train"], replace(base.sets["heldout"], x_NCHW=make_set("h", 3, 9).x_NCHW), REJECTS
        ),
        SplitPictures(base.sets["heldout"], base.sets["train"], REJECTS),
    ]
    assert len({base.digest, *(each.digest for each in changed)}) == 5


# --- what must not be written


def test_bad_codes_are_not_written(tmp_path):
    bad = {
        "outside": lambda x: torch.full((len(x), 2, 2, 2), 16),
        "from -1": lambda x: torch.full((len(x), 2, 2, 2), -1),
        "expected integers": lambda x: torch.zeros(len(x), 2, 2, 2),
        r"\(3, 2, 2, 3\)": lambda x: torch.zeros(len(x), 2, 2, 3, dtype=torch.int64),
        r"\(2, 2, 2, 2\)": lambda x: torch.zeros(len(x) - 1, 2, 2, 2, dtype=torch.int64),
    }
    for told, encode in bad.items():
        with pytest.raises(ValueError, match=told):
            write(tmp_path / "store", encode=encode)
    assert not list((tmp_path / "store").glob("shard-*"))


def test_what_cannot_be_a_store_says_why(tmp_path):
    empty = make_set("t", 0, 0)
    with pytest.raises(ConfigError, match="no pictures"):
        write(tmp_path / "a", made=SplitPictures(empty, empty))
    with pytest.raises(ConfigError, match=r"none of 2 pictures.*corrupt"):
        write(tmp_path / "b", made=SplitPictures(empty, empty, REJECTS))
    with pytest.raises(ConfigError, match="'t/0' occurs twice"):
        SplitPictures(make_set("t", 2, 0), make_set("t", 2, 1))
    with pytest.raises(ConfigError, match="plain JSON"):
        write(tmp_path / "c", source={"when": object()})
    with pytest.raises(ConfigError, match="at least 1"):
        write(tmp_path / "d", shard_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write(tmp_path / "file")


class One:
    """A single candidate, given as it is."""

    def __init__(self, *records, rejects=(), count=1):
        self.loaded, self.count = Loaded(records, torch.zeros(len(records), 3, 8, 8), rejects), count

    def __len__(self):
        return self.count

    def load(self, start, stop):
        return self.loaded


def test_bad_records_name_the_picture(tmp_path):
    good = Record("x", "a caption", "c", "train")
    bad = {
        "split 'test'": replace(good, split="test"),
        "caption must be text": replace(good, caption=None),
        "id must be text": replace(good, id=""),
        "not valid Unicode": replace(good, caption="\udc80"),
    }
    for told, record in bad.items():
        with pytest.raises(ConfigError, match=told):
            write(tmp_path / "store", made=One(record))
    with pytest.raises(
        ValueError, match="1 records, 1 pictures, 0 rejects"
    ):  # one of two was dropped silently
        write(tmp_path / "store", made=One(good, count=2))
    with pytest.raises(ConfigError, match="'x' occurs twice"):
        write(tmp_path / "store", made=One(good, count=2), shard_size=1)


# --- what must not be opened


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    write(tmp_path / "store")
    store = CodeStore.open(tmp_path / "store")
    store.check(FakeTokenizer())
    with pytest.raises(ValueError, match=r"aaaa.*bbbb"):
        store.check(FakeTokenizer("bbbb"))


def test_a_folder_that_is_no_store_says_what_it_is(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"no store at .*stroe; did you mean 'store'\?"):
        CodeStore.open(tmp_path / "stroe")
    with pytest.raises(ConfigError, match="no store at"):
        CodeStore.open(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "stores").mkdir()
    with pytest.raises(ConfigError, match=r"not a store: it has no manifest.json; did you mean 'store'\?"):
        CodeStore.open(tmp_path / "stores")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"unfinished: 4 of 4 shards"):
        CodeStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"version": 2}, "format version 2; this version of vqlm reads 1"),
        ({"format": "other"}, "not the manifest of a code store"),
        ({"shards": []}, "damaged"),
        ({"grid": [3, 3]}, "another grid"),
        ({"pictures": 12}, "damaged"),
        ({"files": {"../secret": "0"}}, "damaged"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change, told):
    write(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(ConfigError, match=told):
        CodeStore.open(tmp_path / "store")


def test_a_manifest_that_is_no_json_is_refused_and_replaced(tmp_path):
    write(tmp_path / "store")
    whole = contents(tmp_path / "store")
    for data in (b"", b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "store" / "manifest.json").write_bytes(data)
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            CodeStore.open(tmp_path / "store")
        assert write(tmp_path / "store")["kept"] == 4
        assert contents(tmp_path / "store") == whole


def tamper(folder, change):
    """Rewrite shard 1 by `change`, with every hash made right again: only the codes themselves can tell."""
    listed = json.loads((folder / "manifest.json").read_text())
    path = folder / "shard-00001.parquet"
    shard = read_shard(path.read_bytes(), listed["job"])
    change(shard)
    write_bytes(path, to_bytes(shard))
    listed["shards"][1].update(bytes=path.stat().st_size, sha256=sha256(path))
    write_json(folder / "manifest.json", listed)


@pytest.mark.parametrize("verify", [None, True, False])
def test_codes_outside_the_codebook_are_refused(tmp_path, verify):
    write(tmp_path / "store")

    def change(shard):
        shard.codes = shard.codes.copy()
        shard.codes[2 * 8] = 16  # 8 codes a row: the first one of row 2

    tamper(tmp_path / "store", change)
    told = r"shard-00001\.parquet: row 2 \('t/6'\) has code 16, outside the codebook \[0, 16\)"
    with pytest.raises(ConfigError, match=told):
        CodeStore.open(tmp_path / "store", verify=verify).codes_NhwQ()


def test_a_grid_that_does_not_fit_its_codes_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "store")

    def change(shard):
        offsets = np.arange(5) * 8
        shard.heights = np.array([2, 3, 1, 2], np.int16)  # as many codes in all
        monkeypatch.setattr(shard_module, "offsets_of", lambda *_: offsets)

    tamper(tmp_path / "store", change)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"row 1 \('t/5'\) has 8 codes, its grid needs 12"):
        CodeStore.open(tmp_path / "store")


def test_without_verification_the_cheap_checks_and_the_first_reading_stand(tmp_path):
    folder = tmp_path / "store"
    write(folder)
    path = folder / "shard-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(damage_flip(whole))
    store = CodeStore.open(folder, verify=False)  # same size, same rows: nothing to see yet
    with pytest.raises(ConfigError, match=r"shard-00001\.parquet"):
        store.captions("train")
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="bytes, not"):
        CodeStore.open(folder, verify=False)


def test_large_stores_are_hashed_only_when_asked(tmp_path, monkeypatch):
    write(tmp_path / "store")
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    monkeypatch.setattr(CodeStore, "verify", lambda self: 1 / 0)
    CodeStore.open(tmp_path / "store")
    with pytest.raises(ZeroDivisionError):
        CodeStore.open(tmp_path / "store", verify=True)


# --- read in parts


@pytest.fixture(params=["folder", "far away"])
def parted(request, tmp_path, monkeypatch):
    """13 pictures of a store that memory does not hold, where they are, and the same store in memory."""
    where = tmp_path / "store" if request.param == "folder" else "memory://store"
    write(where)
    whole = CodeStore.open(where)
    assert whole.in_memory and list(whole)
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    yield CodeStore.open(where), whole
    if request.param != "folder":
        fsspec.filesystem("memory").rm("/store", recursive=True)


def test_a_store_in_parts_gives_what_one_in_memory_gives(parted, monkeypatch):
    store, whole = parted
    assert not store.in_memory
    store.verify()
    monkeypatch.setattr(CodeStore, "_rows", property(lambda self: 1 / 0))  # never all at once
    rows = [store[i] for i in range(-13, 13)]
    assert [row.id for row in rows] == 2 * [row.id for row in whole.__dict__["_rows"]]
    for found, expected in zip(store, whole.__dict__["_rows"], strict=True):
        assert torch.equal(found.codes_hwQ, expected.codes_hwQ)
        assert (found.caption, found.concept, found.split) == (
            expected.caption,
            expected.concept,
            expected.split,
        )
    with pytest.raises(IndexError):
        store[13]
    assert store.counts("train").tolist() == [4, 4, 2, 0] and store.counts("heldout").tolist() == [0, 0, 2, 1]
    assert store.known_concepts("train", {"concept 0", "concept 3", "x"}) == {"concept 0", "concept 3"}
    assert store.known_concepts("heldout", {"concept 0", "concept 3", "x"}) == {"concept 0"}
    assert store.grids == ((2, 2),)
    assert [len(store.sample("train", most).ids("train")) for most in (1, 5, 9, 99)] == [4, 6, 10, 10]
    assert store.sample("heldout", 3).ids("heldout") == ["h/0", "h/1", "h/2"]
    assert sum(len(store.part(number)) for number in range(store.parts)) == 13


def test_the_latest_part_is_kept_and_no_other(parted, monkeypatch):
    store, _ = parted
    read, part = [], CodeStore.part
    monkeypatch.setattr(CodeStore, "part", lambda self, number: read.append(number) or part(self, number))
    assert len(list(store)) == 13 and read == [0, 1, 2, 3]


def test_grids_of_a_store_in_parts_are_counted_without_its_codes(tmp_path, monkeypatch):
    write(tmp_path / "store", FakeTokenizer(), Varied(), shard_size=3)
    whole = CodeStore.open(tmp_path / "store").grids
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    monkeypatch.setattr(CodeStore, "part", lambda *_: 1 / 0)
    assert CodeStore.open(tmp_path / "store").grids == whole == ((2, 2), (1, 1), (2, 3))


def test_a_manifest_with_other_splits_than_the_shards_is_refused(parted):
    store, _ = parted
    store.manifest["splits"] = {"train": 9, "heldout": 4}
    with pytest.raises(ConfigError, match="gives 9 pictures of split train, the shards have 10"):
        store.counts("train")


def test_damage_is_found_when_a_part_is_read_and_not_in_the_others(tmp_path, monkeypatch):
    write(tmp_path / "store")
    monkeypatch.setattr(reader, "IN_MEMORY", 1)
    path = tmp_path / "store" / "shard-00001.parquet"
    path.write_bytes(damage_flip(path.read_bytes()))
    store = CodeStore.open(tmp_path / "store")
    assert len(store.part(0)) == 4 and store[3].id == "t/3"
    for read in (lambda: store.part(1), lambda: store[4], store.verify):
        with pytest.raises(ConfigError, match=r"shard-00001\.parquet was changed after.*vq-encode"):
            read()


def test_an_unknown_split_is_refused(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(ValueError, match=r"no split 'held-out'.*did you mean 'heldout'\?"):
        CodeStore.open(tmp_path / "store").captions("held-out")


# --- the parts that other drivers use


def test_shards_can_be_written_in_any_order_by_several_writers(tmp_path):
    write(tmp_path / "whole")
    arguments = tmp_path / "store", FakeTokenizer(), Ranges(pictures(), 4), SOURCE, 3
    StoreWriter(*arguments).begin()
    for index in (3, 1, 0, 2):
        StoreWriter(*arguments).write_shard(index)
    StoreWriter(*arguments).finish()
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_finish_refuses_what_is_missing(tmp_path):
    writer = StoreWriter(tmp_path / "store", FakeTokenizer(), Ranges(pictures(), 4), SOURCE, 3)
    writer.begin()
    for index in (0, 1, 3):
        writer.write_shard(index)
    with pytest.raises(ConfigError, match=r"shard-00002\.parquet"):
        writer.finish()
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("again", [False, True])
def test_progress_reaches_the_number_of_candidates(tmp_path, again):
    if again:
        write(tmp_path / "store")
    writer = StoreWriter(tmp_path / "store", FakeTokenizer(), Ranges(pictures(), 4), SOURCE, 3)
    writer.begin()
    counts = []
    for index in range(writer.shards):
        writer.write_shard(index, counts.append)
    assert sum(counts) == 15
    assert len(counts) == (4 if again else 8)  # kept shards at once, new ones piece by piece, then rejects


def test_manifest_lists_the_hash_of_every_file(tmp_path):
    write(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    listed = hashes_of(manifest)
    assert listed == {k: v for k, v in contents(tmp_path / "store").items() if k != "manifest.json"}
    shard = (tmp_path / "store" / "shard-00000.parquet").read_bytes()
    assert listed["shard-00000.parquet"] == hashlib.sha256(shard).hexdigest()
