"""vq/archives.py: what is read from tars, Parquet and streams is what was put in, and bad files are told."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from contextlib import contextmanager

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import png, write_parquet, write_tar
from PIL import Image

from vq.archives import ParquetFiles, StreamedHub, Tars
from vq.data import ImageData
from vq.images import Reject
from vqlm.errors import ConfigError
from vqlm.places import place


def facts(pictures):
    return [(each.id, each.caption, each.concept) for each in pictures]


def colour(picture):
    return np.asarray(picture.load())[0, 0].tolist()


def outcome(picture):
    try:
        return colour(picture)
    except Reject as reject:
        return reject.reason


def test_a_tar_gives_its_samples(tmp_path):
    members = [
        ("a/1.png", png(1)),
        ("a/1.txt", b"a red\n thing"),
        ("a/1.json", json.dumps({"caption": "not this", "what": "Thing"}).encode()),
        ("a/1.npy", b"of no use"),
        ("2.json", json.dumps({"caption": "second"}).encode()),
        ("2.JPG", png(2)),
        ("3.left.png", png(3)),
        ("3.right.png", png(4)),
        ("4.txt", b"words alone"),
        ("5.png", b"no picture"),
        ("6.png", png(6)),
        ("6.json", b"{"),
    ]
    write_tar(tmp_path / "x.tar", members)
    source = Tars(str(tmp_path), concept_key="what")
    assert source.files() == ["x.tar"]
    found = list(source.read("x.tar"))
    assert facts(found) == [
        ("x.tar/a/1", "a red thing", "Thing"),
        ("x.tar/2", "second", "second"),
        ("x.tar/3.left.png", "", "x.tar/3.left.png"),
        ("x.tar/3.right.png", "", "x.tar/3.right.png"),
        ("x.tar/5", "", "x.tar/5"),
        ("x.tar/6", "", "x.tar/6"),
    ]
    wanted = [[n, 255 - n, 7] for n in (1, 2, 3, 4)]
    assert [outcome(each) for each in found] == [*wanted, "not-an-image", [6, 249, 7]]
    assert facts(source.pictures()) == facts(found)


def test_a_name_that_comes_twice_is_told_apart(tmp_path):
    write_tar(tmp_path / "x.tar", [("1.png", png(1)), ("2.png", png(2)), ("1.png", png(3))])
    found = list(Tars(str(tmp_path / "x.tar")).read("x.tar"))
    assert [(each.id, colour(each)[0]) for each in found] == [
        ("x.tar/1", 1),
        ("x.tar/2", 2),
        ("x.tar/1#2", 3),
    ]


@pytest.mark.parametrize(
    "names, ids",
    [
        ("a.png b.png a.png a#2.png", "a b a#2 a#2#2"),
        ("a.png a#2.png a.png a.png", "a a#2 a#3 a#4"),
        ("a.png a.png", "a a#2"),
        ("a.png a.PNG", "a a#2"),
        ("a.png a.txt a.png a.txt", "a a#2"),
    ],
)
def test_no_picture_is_lost_and_no_id_comes_twice(tmp_path, names, ids):
    members = [(name, b"t" if ".txt" in name else png(n)) for n, name in enumerate(names.split())]
    write_tar(tmp_path / "x.tar", members)
    found = list(Tars(str(tmp_path)).read("x.tar"))
    assert [each.id for each in found] == [f"x.tar/{each}" for each in ids.split()]
    assert [colour(each)[0] for each in found] == [n for n, (_, data) in enumerate(members) if data != b"t"]


@pytest.mark.parametrize("cut", [3000, 2048 + 700])
def test_a_cut_tar_gives_what_is_whole_and_one_reject(tmp_path, cut):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(9)])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    found = [outcome(each) for each in Tars(str(tmp_path)).read("x.tar")]
    assert found[:2] == [[0, 255, 7], [1, 254, 7]] and found[-1] == "damaged-file"
    assert len({each.id for each in Tars(str(tmp_path)).read("x.tar")}) == len(found)


def broken(path, start, stop, data):
    """Nine pictures, 1,024 bytes each, of which some bytes are replaced; stop=None: all that follow."""
    write_tar(path, [(f"{n}.png", png(n)) for n in range(9)])
    whole = path.read_bytes()
    assert whole[4096:4102] == b"4.png\0" and len(whole) > 9 * 1024
    path.write_bytes(whole[:start] + data + (b"" if stop is None else whole[stop:]))


@pytest.mark.parametrize(
    "start, stop, data",
    [
        (4096 + 1, 4096 + 2, b"/"),
        (4096 + 148, 4096 + 156, b"no digit"),
        (4096, 4096 + 512, bytes(512)),
        (4096 + 100, None, b""),
        (4096 + 1, None, b""),
        (4096, None, bytes(700) + b"x"),
    ],
    ids=[
        "flipped",
        "no checksum",
        "zeroed",
        "cut in a header",
        "one byte of a header",
        "something after the end",
    ],
)
def test_what_follows_a_broken_header_is_not_lost_in_silence(tmp_path, start, stop, data):
    broken(tmp_path / "x.tar", start, stop, data)
    found = list(Tars(str(tmp_path)).read("x.tar"))
    assert [outcome(each) for each in found] == [*([n, 255 - n, 7] for n in range(4)), "damaged-file"]
    with pytest.raises(Reject, match=r"x\.tar: .*4096"):
        found[-1].load()


@pytest.mark.parametrize("after", [0, 1, 512, 1024, 5000])
def test_a_tar_may_end_without_the_blocks_that_end_it(tmp_path, after):
    broken(tmp_path / "x.tar", 4096, None, bytes(after))
    found = [outcome(each) for each in Tars(str(tmp_path)).read("x.tar")]
    assert found == [[n, 255 - n, 7] for n in range(4)]


def header(kind, size, data=b"", name="1.png"):
    """A header as it lies in a tar, and what follows it."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def test_a_picture_that_is_whole_is_given_although_its_last_block_is_cut(tmp_path):
    broken(tmp_path / "x.tar", 4095, None, b"")
    found = [outcome(each) for each in Tars(str(tmp_path)).read("x.tar")]
    assert found == [*([n, 255 - n, 7] for n in range(4)), "damaged-file"]


LONG_NAME, PAX, SPARSE = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE


def sparse(real_size, is_extended=False):
    block = bytearray(header(SPARSE, 0))
    block[482] = is_extended
    block[483:495] = tarfile.itn(real_size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]
    return bytes(block)


@pytest.mark.parametrize(
    "hostile, told",
    [
        (header(LONG_NAME, 0) * 3000, "recursion"),
        (header(PAX, 0) * 3000, "recursion"),
        (header(PAX, 30, b"30 GNU.sparse.size=xx\n"), "invalid literal"),
        (header(tarfile.REGTYPE, 2**60), "'1.png' does not lie inside"),
        (header(tarfile.REGTYPE, 2**60, name="1.npy"), "'1.npy' does not lie inside"),
        (header(tarfile.REGTYPE, 500, bytes(100))[:612], "unexpected end"),
        (header(tarfile.REGTYPE, -1024), "names -1024 bytes"),
        (header(LONG_NAME, -512), "names -512 bytes"),
        (header(PAX, 20, b"15 size=-99999\n"), "does not lie inside"),
        (header(LONG_NAME, 2**17, b"1.png".ljust(2**17, b"\0")), "names 131072 bytes"),
        (header(PAX, 2**17, b"14 path=1.png\n".ljust(2**17, b"\0")), "names 131072 bytes"),
        (sparse(1000, is_extended=True), "index out of range"),
    ],
)
def test_a_hostile_tar_is_one_reject(tmp_path, hostile, told):
    whole = header(tarfile.REGTYPE, len(png(1)), png(1), "0.png")
    follows = b"" if hostile[156:157] in (SPARSE, b"0") else whole
    (tmp_path / "x.tar").write_bytes(whole + hostile + follows)
    found = Tars(str(tmp_path)).read("x.tar")
    first, second = next(found), next(found)
    assert colour(first) == [1, 254, 7] and not list(found)
    with pytest.raises(Reject, match=f"damaged-file: x.tar: .*{told}"):
        second.load()


def test_a_sparse_member_is_refused_and_what_follows_it_is_read(tmp_path):
    whole = header(tarfile.REGTYPE, len(png(1)), png(1), "2.png")
    (tmp_path / "x.tar").write_bytes(sparse(2**40) + whole)
    assert [outcome(each) for each in Tars(str(tmp_path)).read("x.tar")] == ["damaged-file", [1, 254, 7]]


@pytest.mark.parametrize("source", [Tars, ParquetFiles])
def test_what_the_reader_of_the_pictures_raises_is_its_own(tmp_path, source):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(9)])
    write_parquet(tmp_path / "x.parquet", range(9), True)
    found = source(str(tmp_path)).read(f"x{source.ending}")
    next(found)
    with pytest.raises(ValueError, match="mine"):
        found.throw(ValueError("mine"))


class FailingDisk(io.FileIO):
    """Bytes that lie behind the first ones cannot be read."""

    def readinto(self, buffer):
        if self.tell():
            raise OSError(errno.EIO, "the disk fails")
        return super().readinto(buffer)


@pytest.mark.parametrize("source", [Tars, ParquetFiles])
def test_a_failing_disk_is_no_damaged_file(tmp_path, source, monkeypatch):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(90)])
    write_parquet(tmp_path / "x.parquet", range(90), True)

    @contextmanager
    def failing(self, name):
        with io.BufferedReader(FailingDisk(tmp_path / name)) as file:
            yield file

    monkeypatch.setattr(source, "_open", failing)
    with pytest.raises(OSError, match="the disk fails"):
        list(source(str(tmp_path)).read(f"x{source.ending}"))


def test_garbage_with_a_tars_name_is_one_reject(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    (reject,) = Tars(str(tmp_path)).read("x.tar")
    assert outcome(reject) == "damaged-file"


def test_links_in_a_tar_lead_nowhere_and_large_members_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vq.archives.LARGEST_PICTURE", 1000)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("1.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../../2.png")
        member.size = 1001
        tar.addfile(member, io.BytesIO(bytes(1001)))
    (only,) = Tars(str(tmp_path)).read("x.tar")
    assert outcome(only) == "too-large"


@pytest.mark.parametrize(
    "pattern, names",
    [("", ["a.tar", "b/c.tar"]), ("*.tar", ["a.tar"]), ("b", ["c.tar"]), ("b/c.tar", ["c.tar"])],
)
def test_files_by_folder_pattern_or_name(tmp_path, pattern, names):
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "a.tar", [("1.png", png(1))])
    write_tar(tmp_path / "b" / "c.tar", [("1.png", png(2))])
    (tmp_path / "a.txt").write_text("no tar")
    source = Tars(f"{tmp_path}/{pattern}")
    assert source.files() == names
    assert [outcome(each) for each in source.pictures()] == [
        [n, 255 - n, 7] for n in ((1, 2) if not pattern else (1,) if "*" in pattern else (2,))
    ]


def test_a_folder_with_a_files_name_is_passed_over(tmp_path):
    for name in ("a.tar", "b.tar/c.tar"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "d.tar").symlink_to(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=r"no file there .*/b\.tar is a folder, .* / at its end"):
        Tars(f"{tmp_path}/b.tar").files()
    write_tar(tmp_path / "b.tar" / "x.tar", [("1.png", png(1))])
    write_tar(tmp_path / "y.tar", [("1.png", png(1))])
    (tmp_path / "z.tar").symlink_to(tmp_path / "y.tar")
    assert Tars(f"{tmp_path}/*.tar").files() == ["y.tar", "z.tar"]
    assert Tars(f"{tmp_path}/b.tar/").files() == ["x.tar"]
    assert Tars(str(tmp_path)).files() == ["b.tar/x.tar", "y.tar", "z.tar"]


def test_the_scheme_of_a_url_may_be_in_upper_case(tmp_path):
    write_tar(tmp_path / "X.tar", [("1.png", png(1))])
    (picture,) = Tars(f"FILE://{tmp_path}").pictures()
    assert picture.id == "X.tar/1" and place(f"File://{tmp_path}").names() == ["X.tar"]


def test_a_copied_folder_is_gone_when_the_process_ends(tmp_path):
    (tmp_path / "far" / "tokenizer").mkdir(parents=True)
    (tmp_path / "far" / "tokenizer" / "a").write_bytes(b"abc")
    (tmp_path / "temporary").mkdir()
    program = (
        "import sys; from vqlm.places import place\n"
        "folder = place(sys.argv[1]).local_folder('tokenizer')\n"
        "print(folder, (folder / 'a').read_text())"
    )
    command = [sys.executable, "-c", program, f"file://{tmp_path}/far"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert told.startswith(str(tmp_path / "temporary")) and told.endswith(" abc\n")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_name_that_leads_out_of_its_folder_is_not_copied(monkeypatch):
    far = place("memory://far")
    monkeypatch.setattr(type(far), "names", lambda self, start: [f"{start}../../a"])
    with pytest.raises(ConfigError, match="leads out of its folder"):
        far.local_folder("tokenizer")


@pytest.mark.parametrize("source", [Tars, ParquetFiles])
def test_a_source_is_pickled_without_the_file_that_it_holds(tmp_path, source):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(9)])
    write_parquet(tmp_path / "x.parquet", range(9), True)
    held = source(f"file://{tmp_path}")
    found = facts(held.pictures())
    assert os.path.exists(copy := held._held[1].name)
    other = pickle.loads(pickle.dumps(held))
    assert other._held is None and facts(other.pictures()) == found and other._held[1].name != copy
    del other
    assert os.path.exists(copy)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no file there ends in \.tar"):
        Tars(str(tmp_path)).files()
    with pytest.raises(ConfigError, match="must not be empty"):
        Tars("")
    with pytest.raises(ConfigError, match="nowhere://x cannot be opened"):
        Tars("nowhere://x")


def test_content_is_that_of_the_bytes_wherever_they_lie(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", [("1.png", png(1))])
    a, b = (Tars(str(tmp_path / folder)) for folder in "ab")
    assert a.content("x.tar") == b.content("x.tar")
    write_tar(tmp_path / "b" / "x.tar", [("1.png", png(2))])
    assert a.content("x.tar") != b.content("x.tar")


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_gives_its_rows(tmp_path, struct):
    write_parquet(tmp_path / "x.parquet", range(40), struct)
    source = ParquetFiles(str(tmp_path), concept_column="what")
    found = source.pictures()
    assert facts(found) == [(f"x.parquet/{n}", f"picture {n}", f"thing {n // 2}") for n in range(40)]
    assert [colour(each)[0] for each in found] == list(range(40))


def test_bad_rows_and_columns_of_parquet(tmp_path):
    pq.write_table(
        pa.table({"image": [png(1), None, b"x"], "text": [None, "b", "c"]}), tmp_path / "x.parquet"
    )
    found = ParquetFiles(str(tmp_path)).pictures()
    assert [outcome(each) for each in found] == [[1, 254, 7], "missing", "not-an-image"]
    assert [each.caption for each in found] == ["", "b", "c"]
    with pytest.raises(
        ConfigError,
        match=r"images\.source\.text_column=txt: x\.parquet has no such column; there are image, text.*mean 'text'\?",
    ):
        ParquetFiles(str(tmp_path), text_column="txt").files()  # before anything is read


@pytest.mark.parametrize(
    "damage, rows, told",
    [
        (lambda whole: b"no parquet", 0, "Parquet magic bytes not found"),
        (lambda whole: whole[:-100], 0, "Parquet magic bytes not found"),
        (lambda whole: whole[:4] + b"\xff" * 20 + whole[24:], 0, "page header"),
        (lambda whole: whole[:-50] + b"\xff" * 30 + whole[-20:], 0, "thrift"),
        (lambda whole: whole.replace(b"picture 20", b"picture \xff0"), 16, "can't decode byte 0xff"),
    ],
    ids=["none", "cut", "page", "footer", "text"],
)
def test_a_damaged_parquet_file_is_one_reject(tmp_path, damage, rows, told):
    rng = np.random.default_rng(0)
    columns = {"image": [rng.bytes(500) for _ in range(40)], "text": [f"picture {n}" for n in range(40)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="none")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    write_parquet(tmp_path / "b.parquet", range(3), True)
    found = ParquetFiles(str(tmp_path)).pictures()
    assert [each.id for each in found] == [
        *(f"a.parquet/{n}" for n in range(rows + 1)),
        *(f"b.parquet/{n}" for n in range(3)),
    ]
    assert [outcome(each) for each in found[rows:]] == ["damaged-file", *([n, 255 - n, 7] for n in range(3))]
    with pytest.raises(Reject, match=rf"a\.parquet: .*{told}"):
        found[rows].load()


def test_rows_of_parquet_that_are_not_there_are_told(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", range(40), True)
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: iter(list(whole(*a, **k))[:2]))
    *_, last = ParquetFiles(str(tmp_path)).pictures()
    with pytest.raises(Reject, match=r"x\.parquet: \d+ rows of 40 are there"):
        last.load()


def test_a_streamed_data_set_gives_its_rows(tmp_path):
    for part in range(3):
        write_parquet(tmp_path / f"train-{part}.parquet", range(10 * part, 10 * part + 10), True)
    source = pickle.loads(pickle.dumps(StreamedHub(str(tmp_path))))
    assert source.files() == ["00000", "00001", "00002"]
    for part, name in enumerate(source.files()):
        found = list(source.read(name))
        assert [each.id for each in found] == [f"{name}/{n}" for n in range(10)]
        assert [colour(each)[0] for each in found] == list(range(10 * part, 10 * part + 10))
        assert found[3].caption == f"picture {10 * part + 3}"
    with pytest.raises(ConfigError, match=r"column 'caption' is not there"):
        StreamedHub(str(tmp_path), text_column="caption").files()
    with pytest.raises(ConfigError, match="cannot be opened"):
        StreamedHub(str(tmp_path), split="tests").files()


def test_a_row_without_a_class_label_has_no_caption(tmp_path):
    """`datasets` writes -1 there, which would name the last class."""
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": [png(0), png(1)], "label": [1, -1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    source = StreamedHub(str(tmp_path), text_column="label")
    assert [each.caption for each in source.read("00000")] == ["dog", ""]


def test_a_tar_can_be_trained_on(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(20)])
    images = ImageData(Tars(str(tmp_path)), 8, holdout=0.2)
    images.setup()
    assert len(images.train) + len(images.heldout) == 20 and Image.MAX_IMAGE_PIXELS
