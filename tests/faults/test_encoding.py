"""Faults of encoding: killed again and again, and long. Knows neither training nor what a code means."""

import gc
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from archives import png, write_tars
from tiny import make_tokenizer

from vq.archives import Archives, Tars
from vq.data import ImageData, Picture
from vq.drivers import Local
from vq.encode import encode
from vq.images import open_image
from vq.store import CodeStore
from vqlm.files import sha256


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def contents(folder):
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def arguments(source, tokenizer, out):
    images = ImageData(source, None, holdout=0.2)
    return tokenizer, images, str(out), 4, 10, "cpu", "auto", None, None, Local()


def started(processes, *given):
    process = processes.Process(target=encode, args=given)
    process.start()
    return process


def test_encoding_killed_at_random(tmp_path, tokenizer, count, figure):
    """kill -9, wherever it strikes: while a shard is read, encoded, written, or while the manifest is."""
    kills, tars = count(3, 20), write_tars(tmp_path / "tars", count(6, 25), 20)
    processes = multiprocessing.get_context("forkserver")
    # what encode imports when it is called
    processes.set_forkserver_preload(["vq.drivers", "vq.pieces", "vq.store.writer", "vq.tokenizer"])
    given = Tars(str(tars)), tokenizer
    start = time.monotonic()
    started(processes, *arguments(*given, tmp_path / "whole")).join()
    seconds = time.monotonic() - start
    out, draw, killed = tmp_path / "store", random.Random(0), 0
    while killed < kills:
        process = started(processes, *arguments(*given, out))
        process.join(draw.uniform(0.02, 0.8) * seconds)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        if (out / "manifest.json").exists():  # all was done before the kill: a part of it is lost again
            names = sorted(path.name for path in out.glob("shard-*"))
            for name in draw.sample(names, len(names) // 2):
                (out / name).unlink()
    started(processes, *arguments(*given, out)).join()
    assert contents(out) == contents(tmp_path / "whole")
    store = CodeStore.open(out)
    assert len(set(store.ids())) == len(store) == 20 * len(store.manifest["shards"])
    figure(
        "C.18",
        "encoding killed (kill -9)",
        "a shard is written at once and depends on its pictures and the tokenizer alone; what is sound is kept",
        f"{killed} kills: every file equal to an uninterrupted run's",
    )


class Endless(Archives):
    """Files of pictures that are made while they are read."""

    name = "made"

    def __init__(self, count, each):
        self.count, self.each = count, each
        self.made = [png(n, 16) for n in range(64)]

    def files(self):
        return [f"{n:06d}" for n in range(self.count)]

    def content(self, name):
        return name

    def read(self, name):
        for n in range(self.each):
            data = self.made[(int(name) + n) % 64]
            yield Picture(
                f"{name}/{n}", f"picture {n} of {name}", f"{name}/{n}", lambda data=data: open_image(data)
            )


class Watched(Local):
    """Resident memory and open files of this process after each shard."""

    def __init__(self):
        super().__init__()
        self.bytes, self.handles = [], []

    def run(self, *arguments):
        for outcome in super().run(*arguments):
            gc.collect()
            resident = Path("/proc/self/statm").read_text().split()[1]
            self.bytes.append(int(resident) * os.sysconf("SC_PAGE_SIZE"))
            self.handles.append(len(os.listdir("/proc/self/fd")))
            yield outcome


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.timeout(1800)
def test_memory_and_open_files_stay_flat(tmp_path, tokenizer, count, figure):
    each, shards = 500, count(6, 400)
    watched = Watched()
    images = ImageData(Endless(shards, each), None, holdout=0.2)
    start = time.monotonic()
    encode(tokenizer, images, str(tmp_path / "store"), 64, 10, "cpu", "auto", None, None, watched)
    seconds = time.monotonic() - start
    late = np.array(watched.bytes[len(watched.bytes) // 4 :], float)  # once libraries have what they keep
    slope = np.polyfit(np.arange(len(late)) * each, late, 1)[0]
    handles = watched.handles[1:]
    assert max(handles) - min(handles) <= 1
    if shards >= 100:
        assert slope < 20, f"{slope:.1f} bytes a picture"
    assert late[-1] - late[0] < 64 * 2**20
    pictures = each * shards
    figure(
        "C.30",
        f"{pictures:,} pictures encoded",
        "pictures are decoded batch by batch, one batch ahead",
        f"memory {slope:+.2f} bytes a picture ({(late[-1] - late[0]) / 2**20:+.1f} MB over the last three quarters); "
        f"open files {handles[0]} → {handles[-1]}; {pictures / seconds:,.0f} pictures a second",
    )
    assert len(CodeStore.open(tmp_path / "store")) == pictures
