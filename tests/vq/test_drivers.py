"""One store by many processes: whoever encodes, however often, here or far away, it holds the same bytes."""

import importlib.util
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from archives import png, write_parquet, write_tar, write_tars
from tiny import make_tokenizer, write_pictures
from torch.utils.data import DataLoader

from vq.archives import ParquetFiles, StreamedHub, Tars
from vq.data import ImageData, ImageFolder
from vq.drivers import Local, Ray, _next_outcome, _write_all, share_of
from vq.encode import encode, main
from vq.store import CodeStore, reader
from vqlm import files
from vqlm.errors import ConfigError
from vqlm.places import LocalPlace, place

S3 = all(importlib.util.find_spec(each) for each in ("moto", "flask", "flask_cors", "s3fs"))
needs_s3 = pytest.mark.skipif(
    not S3, reason='needs moto[s3], flask, flask-cors and s3fs: pip install "vqlm[dev]"'
)
needs_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason='needs ray: pip install "vqlm[dev]"'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("made") / "tars")


def run(source, tokenizer, out, rank=None, ranks=None, driver=None, batch_size=4, **options):
    images = ImageData(source, **{"size": None, "holdout": 0.2, **options})
    encode(tokenizer, images, str(out), batch_size, 10, "cpu", "auto", rank, ranks, driver or Local())


def contents(where):
    """Every file of a store, here or far away."""
    found = {}
    for name in place(where).names():
        with place(where).open(name) as file:
            found[name] = file.read()
    return found


@pytest.fixture(scope="module")
def whole(tars, tokenizer, tmp_path_factory):
    """What an uninterrupted run in one process leaves."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run(Tars(str(tars)), tokenizer, out)
    return contents(out)


def test_a_shard_for_each_tar(tars, tokenizer, tmp_path):
    run(Tars(str(tars)), tokenizer, tmp_path / "store")
    store, model = CodeStore.open(tmp_path / "store"), make_tokenizer()
    assert len(store) == 40 and len(store.manifest["shards"]) == 4
    assert store.ids()[11] == "00001.tar/000011" and store[11].caption == "picture 11"
    loaded = ImageData(Tars(str(tars)), 16, holdout=0.2)
    loaded.setup()
    assert store.ids("train") == loaded.train.ids and store.ids("heldout") == loaded.heldout.ids
    assert loaded.heldout.ids
    codes = model.encode(loaded.train.x_NCHW.float() / 127.5 - 1)
    assert (store.codes_NhwQ("train") == codes).all()


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_leave_what_one_process_leaves(tars, tokenizer, tmp_path, capsys, order, folder):
    source = ImageFolder(write_pictures(tmp_path / "pictures")) if folder else Tars(str(tars))
    run(source, tokenizer, tmp_path / "one")
    for rank in order:
        assert not (tmp_path / "many" / "manifest.json").exists()
        run(source, tokenizer, tmp_path / "many", rank, 3)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    told = capsys.readouterr().out
    assert f"rank {order[0]} of 3" in told and "the rank that comes last finishes" in told
    assert told.count("store: ") == 2


def test_ranks_that_finish_at_once(tars, tokenizer, tmp_path, whole):
    """More ranks than shards, all at once; each may take itself for the last one."""
    threads = [
        threading.Thread(target=run, args=(Tars(str(tars)), tokenizer, tmp_path / "store", rank, 6))
        for rank in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "store") == whole


def test_a_rank_comes_before_its_damaged_shard_is_mended(tars, tokenizer, tmp_path, whole, capsys):
    out = tmp_path / "store"
    for rank in (0, 1):
        run(Tars(str(tars)), tokenizer, out, rank, 2)
    (out / "manifest.json").unlink()
    data = (out / "shard-00001.parquet").read_bytes()
    (out / "shard-00001.parquet").write_bytes(data[:-9])
    run(Tars(str(tars)), tokenizer, out, 0, 2)
    assert "not finished yet" in capsys.readouterr().out and not (out / "manifest.json").exists()
    run(Tars(str(tars)), tokenizer, out, 1, 2)
    assert contents(out) == whole


def test_a_changed_tar_costs_its_shard_alone_and_no_other_is_decoded(
    tmp_path, tokenizer, capsys, monkeypatch
):
    tars = write_tars(tmp_path / "tars")
    run(Tars(str(tars)), tokenizer, tmp_path / "store")
    write_tar(tars / "00002.tar", [("1.png", png(99))])
    asked, decode = [], ImageData.decode
    monkeypatch.setattr(ImageData, "decode", lambda self, each: asked.append(each.id) or decode(self, each))
    run(Tars(str(tars)), tokenizer, tmp_path / "store")
    assert asked == ["00002.tar/1"]
    assert "1 shards encoded, 3 kept, 1 redone" in capsys.readouterr().out
    run(Tars(str(tars)), tokenizer, tmp_path / "other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_more_tars_are_another_job(tmp_path, tokenizer):
    tars = write_tars(tmp_path / "tars")
    run(Tars(str(tars)), tokenizer, tmp_path / "store")
    write_tar(tars / "00009.tar", [("1.png", png(99))])
    with pytest.raises(ConfigError, match=r"pieces: 4 → 5"):
        run(Tars(str(tars)), tokenizer, tmp_path / "store")


def test_too_many_rejects_leave_no_manifest(tmp_path, tokenizer):
    tars = write_tars(tmp_path / "tars", 1)
    write_tar(tars / "00001.tar", [(f"{n}.png", b"bad") for n in range(9)])
    with pytest.raises(
        ConfigError, match=r"9 of 19 pictures.*9 not-an-image.*max_bad_fraction=0\.4 allows 7"
    ):
        run(Tars(str(tars)), tokenizer, tmp_path / "store", max_bad_fraction=0.4)
    assert not (tmp_path / "store" / "manifest.json").exists()
    run(Tars(str(tars)), tokenizer, tmp_path / "store", max_bad_fraction=0.5)
    assert len(CodeStore.open(tmp_path / "store").rejects) == 9


def test_parquet_and_streams_hold_the_same_codes(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    for n in range(3):
        write_parquet(tmp_path / "data" / f"{n}.parquet", range(9 * n, 9 * n + 9), True)
    run(ParquetFiles(str(tmp_path / "data")), tokenizer, tmp_path / "parquet")
    run(StreamedHub(str(tmp_path / "data")), tokenizer, tmp_path / "stream", 1, 2)
    run(StreamedHub(str(tmp_path / "data")), tokenizer, tmp_path / "stream", 0, 2)
    one, other = CodeStore.open(tmp_path / "parquet"), CodeStore.open(tmp_path / "stream")
    assert len(one.manifest["shards"]) == len(other.manifest["shards"]) == 3
    assert (one.codes_NhwQ() == other.codes_NhwQ()).all() and one.captions() == other.captions()
    assert one.ids()[10] == "1.parquet/1" and other.ids()[10] == "00001/1"


def test_who_this_process_is(monkeypatch):
    assert share_of(None, None) == (0, 1) and share_of(2, 3) == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share_of(None, None) == (1, 4)  # torchrun
    for wrong in ((1, None), (None, 2)):
        with pytest.raises(ConfigError, match="give both"):
            share_of(*wrong)
    for wrong in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="rank must be from 0 to"):
            share_of(*wrong)


def test_what_goes_wrong_in_a_process_of_a_pool_is_told(tars, tokenizer):
    class Bad:
        def write(self, index, model, advance):
            advance(3)
            raise ConfigError("no more")

    told = queue.Queue()
    _write_all(Bad(), [0], Path(tokenizer), "cpu", torch.get_num_threads(), told)
    counts = []
    with pytest.raises(ConfigError, match="no more"):
        _next_outcome(told, [], counts.append)
    assert counts == [3]
    with pytest.raises(ConfigError, match="at least 1"):
        Local(0)


def command(monkeypatch, *arguments):
    """vq-encode in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vq-encode", "device=cpu", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_sweep_over_ranks_shares_one_folder(tars, tokenizer, tmp_path, whole, monkeypatch, capsys):
    """As with submitit's launcher, which makes one SLURM array of it."""
    settings = [f"images.source.path={tars}", "images=tars", f"tokenizer={tokenizer}", "images.holdout=0.2"]
    out = tmp_path / "store"
    assert command(monkeypatch, "-m", "rank=0,1,2", "ranks=3", *settings, f"out={out}") == 0
    left = contents(out)
    config = left.pop("config.yaml").decode()
    assert "rank: null" in config and "ranks: null" in config
    assert left == whole
    capsys.readouterr()
    assert (
        command(monkeypatch, *settings, f"out={out}", "rank=1", "ranks=2") == 0
    )  # two go on where three were
    assert "0 shards encoded, 2 kept" in capsys.readouterr().out
    assert contents(out) == {**whole, "config.yaml": config.encode()}


# --- far away -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An S3 server on loopback; yields the URL of a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "wb")  # noqa: SIM115 - as long as the server
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("pictures")
        yield "s3://pictures"
        s3fs.S3FileSystem.clear_instance_cache()
    server.terminate()
    server.wait()
    log.close()


@needs_s3
def test_from_s3_to_s3(bucket, tars, tokenizer, whole, monkeypatch):
    import s3fs

    s3fs.S3FileSystem().put(f"{tars}/", "pictures/tars/", recursive=True)
    out = f"{bucket}/store"
    with pytest.raises(ConfigError, match="there is no store at s3://pictures/store"):
        CodeStore.open(out)
    for rank in (1, 0):
        run(Tars(f"{bucket}/tars"), tokenizer, out, rank, 2)
    assert contents(out) == whole
    store = CodeStore.open(out)
    assert len(store) == 40 and store[3].caption == "picture 3"
    store.verify()
    assert store.tokenizer_folder.joinpath("config.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(reader, "IN_MEMORY", 1)
        parted = CodeStore.open(
            out
        )  # read shard by shard, by processes that are forked from one with open connections
        assert [row.id for row in DataLoader(parted, None, num_workers=2, timeout=60)] == store.ids()
        assert parted.counts("train").sum() == len(store.ids("train"))

    before = contents(out)["shard-00002.parquet"]
    s3fs.S3FileSystem().pipe_file("pictures/store/shard-00002.parquet", before[:-7])
    with pytest.raises(ConfigError, match=r"s3://pictures/store/shard-00002\.parquet"):
        CodeStore.open(out)
    s3fs.S3FileSystem().rm_file("pictures/store/shard-00001.parquet")
    run(Tars(f"{bucket}/tars/*.tar"), tokenizer, out)
    assert contents(out) == whole


@needs_s3
def test_the_command_writes_to_s3_and_is_refused_for_another_job(
    bucket, tars, tokenizer, monkeypatch, capsys
):
    settings = [f"images.source.path={tars}", "images=tars", f"tokenizer={tokenizer}", f"out={bucket}/other"]
    assert command(monkeypatch, *settings) == 0
    assert "40 pictures, 0 rejects" in capsys.readouterr().out
    assert "config.yaml" not in contents(f"{bucket}/other")
    assert command(monkeypatch, *settings, "images.fit=pad") == 2
    assert "begun with other settings" in capsys.readouterr().err


# --- Ray ------------------------------------------------------------------------------------------------------


class Deadly(Tars):
    """Tars; the process that reads the second one is killed, the first time."""

    def __init__(self, path, mark):
        super().__init__(path)
        self.mark = mark

    def read(self, name):
        if name == "00001.tar" and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name)


def test_a_killed_process_of_a_pool_is_told_and_the_next_run_goes_on(tars, tokenizer, tmp_path, whole):
    source, out = Deadly(str(tars), str(tmp_path / "mark")), tmp_path / "store"
    with pytest.raises(RuntimeError, match=r"ended with -9; run the same command again"):
        run(source, tokenizer, out, driver=Local(2))
    assert not (out / "manifest.json").exists()
    run(source, tokenizer, out, driver=Local(2))
    assert contents(out) == whole


@needs_ray
def test_ray_actors_leave_what_one_process_leaves_though_one_is_killed(tars, tokenizer, tmp_path, whole):
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    try:
        run(Deadly(str(tars), str(tmp_path / "mark")), tokenizer, tmp_path / "store", driver=Ray(actors=2))
        assert (tmp_path / "mark").exists()
        assert contents(tmp_path / "store") == whole
    finally:
        ray.shutdown()


def test_rays_numbers_are_checked():
    for wrong in ({"actors": 0}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ConfigError, match="at least one actor"):
            Ray(**wrong)


def test_names_are_listed_while_another_process_writes(tmp_path):
    """A folder that is renamed or removed in the middle of a listing is passed over."""
    place, ended = LocalPlace(tmp_path), threading.Event()
    place.write("kept", b"1")

    def churn():
        number = 0
        while not ended.is_set():
            number += 1
            with files.new_folder(tmp_path / "made") as part:
                (part / "inner").mkdir()
                (part / "inner" / str(number)).touch()
            shutil.rmtree(tmp_path / "made")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all("kept" in place.names() for _ in range(1000))
    finally:
        ended.set()
        thread.join()
