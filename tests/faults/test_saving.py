"""C.1, C.3, C.5, C.8: what is on disk after a kill, on a full or read-only disk, after damage, and after many saves."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from faults import saver
from faults.saver import State, load
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from lm.pipeline import Pipeline
from vq.store import CodeStore, Loaded, Record, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.files import LEFTOVER
from vqlm.training import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
SAVERS = ("ours", "torch.save", "Lightning")


# --- C.1 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saving():
    """order → answer, of the process in saver.py."""
    alone = ["unshare", "--map-root-user", "--mount"]  # a process that may mount a small disk
    can = shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    words = [*(alone if can else []), sys.executable, saver.__file__]
    process = subprocess.Popen(words, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(order, **details):
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"order": order, **details}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def other_disk(tmp_path_factory):
    """A folder on another file system than pytest's, as TMPDIR often is."""
    here = os.stat(tmp_path_factory.getbasetemp()).st_dev
    for place in ("/dev/shm", str(Path.home()), "/var/tmp", str(ROOT)):
        if os.access(place, os.W_OK) and os.stat(place).st_dev != here:
            folder = tempfile.mkdtemp(prefix="vqlm-faults-", dir=place)
            yield folder
            shutil.rmtree(folder)
            return
    yield None


def survived(saving, by, folder, tmp, first, seconds, chance):
    """One killed save: is what a new process finds at least the last state whose save had returned?"""
    folder.mkdir()
    # the first save of all, or one that replaces another; killed somewhere in the first two saves
    order = {"order": "kill", "by": by, "folder": str(folder), "tmp": str(tmp), "first": first}
    told = saving(**order, delay=2 * seconds * chance.random())
    found = load(by, folder)
    shutil.rmtree(folder)
    if found is None:
        return told["done"] < 1
    return found != "lost" and found >= told["done"]


def test_a_kill_while_saving_loses_nothing(count, figure, saving, other_disk, tmp_path):
    trials, theirs = count(5, 50), count(3, 50)
    cells = {
        "same disk": (tmp_path, 2),
        "TMPDIR on another disk": (other_disk, 2),
        "first save": (tmp_path, 0),
    }
    cells = {name: cell for name, cell in cells.items() if cell[0]}
    kept = dict.fromkeys(SAVERS, "")
    for by in SAVERS:
        for n in "ab":
            (tmp_path / n).mkdir()
        warm = [
            saving("kill", by=by, folder=str(tmp_path / n), tmp=str(tmp_path), first=2, delay=0) for n in "ab"
        ]
        for n in "ab":
            shutil.rmtree(tmp_path / n)
        seconds, chance = min(each["seconds"] for each in warm), random.Random(0)
        n = trials if by == "ours" else theirs
        parts = []
        for name, (tmp, first) in cells.items():
            good = sum(
                survived(saving, by, tmp_path / f"{by}-{name}-{i}", tmp, first, seconds, chance)
                for i in range(n)
            )
            parts.append(f"{good}/{n} ({name})")
            if by == "ours":
                assert good == n, name
        kept[by] = ", ".join(parts)
    ours = kept.pop("ours")
    figure(
        "C.1",
        "kill -9 while saving",
        "written beside the target, forced to disk, renamed; leftovers cleared at the next start",
        f"{ours} resume",
        {name: f"{told} loadable" for name, told in kept.items()},
    )


def test_leftovers_are_cleared_at_the_start(saving, tmp_path):
    """A kill in the middle of a save leaves a part; resuming removes it."""
    seen = 0
    for n in range(30):
        folder = tmp_path / str(n)
        folder.mkdir()
        saving("kill", by="ours", folder=str(folder), tmp=str(tmp_path), first=2, delay=0.004 * n)
        seen += any(LEFTOVER.match(path.name) for path in folder.iterdir())
        assert load("ours", folder) >= 1
        assert not any(LEFTOVER.match(path.name) for path in folder.iterdir())
        if seen >= 2:
            return
    pytest.fail("no kill came in time")


# --- C.3 ------------------------------------------------------------------------------------------------------


def on_a_full_disk(saving, by, way, folder, tmp):
    folder.mkdir()
    told = saving("full", by=by, way=way, folder=str(folder), tmp=str(tmp))
    assert "fault" not in told, told
    return told


@pytest.mark.parametrize("way", ["quota", "full", "read-only"])
def test_a_save_without_room_keeps_what_was_there(way, figure, saving, other_disk, tmp_path):
    """quota: no file may outgrow 6 MB (RLIMIT_FSIZE); full: a disk of 6 MB (tmpfs); read-only: that disk, remounted."""
    if way != "quota" and not saving("mounts")["mounts"]:
        pytest.skip("this process may not mount a small disk: neither root nor user namespaces")
    places = {"same": tmp_path} | ({"TMPDIR on another disk": other_disk} if other_disk else {})
    lost = {by: [] for by in SAVERS[1:]}
    for name, tmp in places.items():
        ours = on_a_full_disk(saving, "ours", way, tmp_path / f"ours, {name}", tmp)
        assert ours["found"] == 1, ours
        assert str(tmp_path) in ours["error"] and "bytes" in ours["error"] and "intact" in ours["error"], ours
        for by, where in lost.items():
            if on_a_full_disk(saving, by, way, tmp_path / f"{by}, {name}", tmp)["found"] != 1:
                where.append(name)
    stock = {
        by: f"lost {len(where)} of {len(places)}" + (f" ({', '.join(where)})" if where else "")
        for by, where in lost.items()
    }
    what = {
        "quota": "quota (RLIMIT_FSIZE)",
        "full": "disk full (tmpfs)",
        "read-only": "disk read-only (tmpfs)",
    }
    figure(
        "C.3",
        f"{what[way]} while saving",
        "what was there is replaced by a rename alone; the error names path and bytes",
        f"lost 0 of {len(places)}, resumes",
        stock,
    )


# --- C.5 ------------------------------------------------------------------------------------------------------


def damaged(data, chance):
    """One bit flipped, or the end cut off."""
    if chance.random() < 0.25:
        return data[: chance.randrange(len(data))]
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


class Artefact:
    """A folder to damage. `read(folder)` gives what is used of it, or raises a ConfigError that names the file."""

    def __init__(self, folder, read, damaged="."):
        self.folder, self.read = folder, read
        self.files = sorted(
            path for path in (folder / damaged).rglob("*") if path.is_file() and path.stat().st_size
        )
        self.content = read(folder)

    def trial(self, chance):
        """ "found" by an error that names the file; "harmless": what is read is the same; else what went wrong."""
        path = chance.choice(self.files)
        if chance.random() < 0.5:  # anywhere; else small files would be forgotten
            (path,) = chance.choices(self.files, [each.stat().st_size for each in self.files])
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, chance))
        try:
            return "harmless" if equal(self.read(self.folder), self.content) else f"silent: {path.name}"
        except ConfigError as error:
            names = (path.name, path.parent.name, *(["text tokenizer"] if "tokenizer" in path.name else []))
            return "found" if any(name in str(error) for name in names) else f"unnamed: {path.name}: {error}"
        except Exception as error:
            return f"crash: {path.name}: {error!r}"
        finally:
            path.write_bytes(whole)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def read_store(folder):
    store = CodeStore.open(folder, verify=True)
    return [[(row.id, row.caption, row.concept, row.codes_hwQ) for row in store], store.tokenizer_fingerprint]


def read_bundle(folder):
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    ids = [pipe.encode_text(text) for text in ("a red circle, inset 1", "blue square", "naïve 🍎")]
    form = pipe.model.form
    about = (
        form.vocabulary,
        form.layout.name,
        form.grids,
        pipe.sampling,
        pipe.images.fingerprint,
        pipe.model.lm.config.to_dict(),
    )
    return [dict(pipe.model.state_dict()), ids, pipe.tokenizer.get_vocab(), repr(about)]


def read_checkpoint(folder):
    """What is resumed from; a ConfigError where the newest one was passed over, as `resume` warns."""
    state = State(0, 500)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Checkpoints(folder).resume(state)
    said = " ".join(str(each.message) for each in told if "damaged" in str(each.message))
    if said:
        assert state.batches_seen == 1, "the last valid one"
        raise ConfigError(said)
    assert found is not None
    return list(state.training_state())


def make_checkpoints(folder):
    for n in (1, 2):
        Checkpoints(folder).save(State(n, 500))
    return Artefact(folder, read_checkpoint, "batch-00000002")


class Noise:
    """Pictures of noise, as a store's writer asks for them."""

    def __init__(self, count=12):
        random_ = torch.Generator().manual_seed(0)
        self.x_BCHW = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random_)
        splits = ["heldout" if n % 3 == 0 else "train" for n in range(count)]
        self.records = [Record(f"{n}.png", f"no. {n} 🍎", f"c{n}", split) for n, split in enumerate(splits)]

    def __len__(self):
        return len(self.records)

    def load(self, start, stop):
        return Loaded(self.records[start:stop], self.x_BCHW[start:stop])


def make_store(folder):
    options = {"source": {"name": "noise"}, "shard_size": 5, "batch_size": 4, "progress": False}
    write_store(folder, make_tokenizer(), Noise(), **options)
    return Artefact(folder, read_store)


def make_bundle(folder):
    model, tokenizer = make_model()
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(folder)
    return Artefact(folder, read_bundle)


def read_tokenizer(folder):
    tokenizer = ImageTokenizer.from_pretrained(folder)
    return [dict(tokenizer.state_dict()), tokenizer.fingerprint, tokenizer.image_size]


def make_tokenizer_folder(folder):
    make_tokenizer().save_pretrained(folder)
    return Artefact(folder, read_tokenizer)


ARTEFACTS = {
    "checkpoint": make_checkpoints,
    "tokenizer": make_tokenizer_folder,
    "store": make_store,
    "bundle": make_bundle,
}


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_damage_is_found_and_named(kind, count, figure, tmp_path):
    artefact, trials = ARTEFACTS[kind](tmp_path / kind), count(24, 200)
    found = Counter(artefact.trial(random.Random(n)) for n in range(trials))
    assert set(found) <= {"found", "harmless"}, found
    figure(
        "C.5",
        f"bits flipped and ends cut off, {kind}",
        "checksums; the error names the file"
        + ("; the last valid one is resumed from" if kind == "checkpoint" else ""),
        f"{trials}/{trials}: {found['found']} found, {found['harmless']} harmless (the same is read), 0 silent",
        files_alone(trials, tmp_path) if kind == "checkpoint" else {},
    )


def files_alone(trials, folder):
    """The same damage to what torch.save and safetensors write."""
    tensors, chance, stock = State(2, 500).training_state()[0], random.Random(0), {}
    for name, write, read in (
        ("torch.save", torch.save, lambda path: torch.load(path, weights_only=True)),
        ("safetensors", save_file, load_file),
    ):
        path = folder / name
        write({key: value.detach().clone() for key, value in tensors.items()}, path)
        whole, silent = path.read_bytes(), 0
        for _ in range(trials):
            path.write_bytes(damaged(whole, chance))
            with contextlib.suppress(Exception):
                silent += not equal(dict(read(path)), tensors)
        stock[name] = f"{silent}/{trials} loaded silently wrong"
    return stock


# --- C.8 ------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_kept(count, figure, monkeypatch, tmp_path):
    """Two checkpoints stay, the one that a run goes on from among them; what cannot be deleted stops nothing."""
    saves = count(30, 300)
    for n in range(1, saves + 1):
        Checkpoints(tmp_path / "a").save(State(n, 10))
        assert [path.name for path in Checkpoints(tmp_path / "a").all()] == [
            f"batch-{each:08d}" for each in range(max(1, n - 1), n + 1)
        ]
    (tmp_path / "a" / "best").mkdir()  # of another's, or the user's own
    state = State(0, 10)
    resumed = Checkpoints(tmp_path / "a").resume(state)
    Checkpoints(tmp_path / "a").save(State(state.batches_seen + 1, 10))
    assert resumed in Checkpoints(tmp_path / "a").all() and (tmp_path / "a" / "best").is_dir()
    files = len(list((tmp_path / "a").rglob("*")))

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "rmdir", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    for n in (1, 2, 3, 4):
        Checkpoints(tmp_path / "b").save(State(n, 10))
    state = State(0, 10)
    assert Checkpoints(tmp_path / "b").resume(state) and state.batches_seen == 4
    figure(
        "C.8",
        "retention",
        "the newest two stay; a failed purge stops nothing",
        f"{saves} saves: last and resumed one always there, {files} files and folders left",
    )
