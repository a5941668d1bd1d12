"""vq/archives.py: what is read from tars, Parquet and streams is what was put in, and bad files are told."""

import io
import json
import pickle
import tarfile

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


@pytest.mark.parametrize("cut", [3000, 2048 + 700])
def test_a_cut_tar_gives_what_is_whole_and_one_reject(tmp_path, cut):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(9)])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    found = [outcome(each) for each in Tars(str(tmp_path)).read("x.tar")]
    assert found[:2] == [[0, 255, 7], [1, 254, 7]] and found[-1] == "damaged-file"
    assert len({each.id for each in Tars(str(tmp_path)).read("x.tar")}) == len(found)


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
    with pytest.raises(ConfigError, match=r"no column 'txt'.*did you mean 'text'\?"):
        ParquetFiles(str(tmp_path), text_column="txt").pictures()
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"y\.parquet of .* is no Parquet file"):
        ParquetFiles(str(tmp_path)).pictures()


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


def test_a_tar_can_be_trained_on(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(20)])
    images = ImageData(Tars(str(tmp_path)), 8, holdout=0.2)
    images.setup()
    assert len(images.train) + len(images.heldout) == 20 and Image.MAX_IMAGE_PIXELS
