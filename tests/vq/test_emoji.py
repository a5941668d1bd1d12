"""vq/emoji.py on a made folder of the packages' layout: captions, concepts, joins by code point and by name, the split.

Nothing is fetched; npm is a script of ours where it is called at all.
"""

import hashlib
import importlib.util
import tarfile

import pytest
from PIL import Image

from vq import emoji
from vq.data import ImageData
from vq.emoji import EmojiStyles, Package, fetch, named, points_of, slug
from vqlm.errors import ConfigError

RENDERER = pytest.mark.skipif(not importlib.util.find_spec("resvg_py"), reason="needs resvg-py")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="{}"/></svg>'
TABLE = """hexcode,group,subgroups,annotation,tags
E001,extras-openmoji,animals-nature,fox,""
1F98A,animals-nature,animal-mammal,fox,"animal, face, fox"
1F452,objects,clothing,woman’s hat,
1F44B,people-body,hand,waving hand,"hello, hi"
1F44B-1F3FD,people-body,hand,waving hand: medium skin tone,"hello, hi"
E300,extras-openmoji,brand,Some Brand,
2764-FE0F,smileys-emotion,heart,red heart,love
"""
DRAWN = {
    "openmoji-17.0.0/color/svg": ("1F98A", "E001", "1F452", "1F44B", "1F44B-1F3FD", "E300", "2764"),
    "openmoji-17.0.0/black/svg": ("1F98A", "E001", "1F452", "1F44B", "1F44B-1F3FD", "E300", "2764"),
    "fluentui-emoji-1.3.0/icons/flat": (
        "fox",
        "womans-hat",
        "waving-hand-default",
        "waving-hand-medium",
        "nothing",
    ),
    "lobehub-fluent-emoji-3d-1.1.0/assets": ("1f98a", "2764-fe0f", "1f44b-1f3fd"),
    "emoji-datasource-google-16.0.0/img/google/64": ("1f98a", "2764-fe0f", "1f47e"),
}


@pytest.fixture
def packages(tmp_path):
    for number, (folder, stems) in enumerate(DRAWN.items()):
        (tmp_path / folder).mkdir(parents=True)
        for stem in stems:
            if number < 3:
                (tmp_path / folder / f"{stem}.svg").write_text(SVG.format(("red", "black", "blue")[number]))
            else:
                suffix = ("webp", "png")[number - 3]
                Image.new("RGBA", (16, 16), (0, 255, 0, 0)).save(tmp_path / folder / f"{stem}.{suffix}")
    (tmp_path / "openmoji-17.0.0/data").mkdir()
    (tmp_path / "openmoji-17.0.0/data/openmoji.csv").write_text(TABLE)
    return tmp_path


def facts(source):
    return {each.id: (each.caption, each.concept) for each in source.pictures()}


@RENDERER
def test_captions_name_the_style_and_concepts_do_not(packages):
    found = facts(EmojiStyles(folder=str(packages)))
    assert found["3d/1F98A"] == ("a 3D picture of fox", "1F98A")
    assert found["line/1F98A"] == ("a line drawing of fox", "1F98A")
    assert found["flat/1F452"] == ("a flat picture of woman's hat", "1F452")
    assert found["flat/1F44B"] == ("a flat picture of waving hand", "1F44B")
    assert found["3d/2764"] == ("a 3D picture of red heart", "2764")
    # no brand, no name of Fluent's own, no emoji without a label, no second fox, no skin tones
    assert sorted(found) == sorted(
        [
            f"{style}/{points}"
            for style in ("outlined", "line")
            for points in ("1F98A", "1F452", "1F44B", "2764")
        ]
        + ["flat/1F98A", "flat/1F452", "flat/1F44B", "3d/1F98A", "3d/2764", "shaded/1F98A", "shaded/2764"]
    )


@RENDERER
def test_groups_choose_what_is_drawn_in_every_style(packages):
    found = facts(EmojiStyles(["flat", "3d"], groups=["animals-nature", "objects"], folder=str(packages)))
    assert sorted(found) == ["3d/1F98A", "flat/1F452", "flat/1F98A"]


@RENDERER
def test_skin_tones_are_variants_of_one_concept(packages):
    found = facts(EmojiStyles(["line", "flat", "3d"], skin_tones=True, folder=str(packages)))
    hand = ("waving hand: medium skin tone", "1F44B")
    for style, words in (
        ("line", "a line drawing of"),
        ("flat", "a flat picture of"),
        ("3d", "a 3D picture of"),
    ):
        assert found[f"{style}/1F44B-1F3FD"] == (f"{words} {hand[0]}", hand[1])


@RENDERER
def test_tags_that_are_no_part_of_the_name(packages):
    found = facts(EmojiStyles(["line"], tags=2, folder=str(packages)))
    assert found["line/1F98A"][0] == "a line drawing of fox (animal, face)"
    assert found["line/1F452"][0] == "a line drawing of woman's hat"


@RENDERER
def test_pictures_are_rendered_on_the_background(packages):
    images = {
        each.id: each.load() for each in EmojiStyles(background="white", folder=str(packages)).pictures(100)
    }
    assert images["outlined/1F98A"].size == (100, 100)
    assert images["outlined/1F98A"].getpixel((50, 50)) == (255, 0, 0)
    assert images["shaded/1F98A"].getpixel((5, 5)) == (255, 255, 255)


@RENDERER
def test_one_style_of_some_emoji_is_withheld_and_the_others_are_trained_on(packages):
    images = ImageData(EmojiStyles(withheld=0.99, folder=str(packages)), 16, holdout=0.0)
    train, heldout = images.candidates()
    assert {each.concept for each in heldout} == {"1F98A", "1F452", "1F44B", "2764"}
    assert len(heldout) == 4
    assert {each.concept for each in train} == {each.concept for each in heldout}
    none, _ = ImageData(EmojiStyles(withheld=0.0, folder=str(packages)), 16, holdout=0.0).candidates()
    assert len(none) == len(train) + 4
    alone, heldout = ImageData(
        EmojiStyles(["line"], withheld=0.99, folder=str(packages)), 16, holdout=0.0
    ).candidates()
    assert len(alone) == 4 and not heldout  # nothing else of those concepts to learn from


@RENDERER
def test_a_concept_that_is_held_out_is_held_out_in_every_style(packages):
    train, heldout = ImageData(
        EmojiStyles(withheld=0.0, folder=str(packages)), 16, holdout=0.5, seed=3
    ).candidates()
    assert train and heldout
    assert not {each.concept for each in train} & {each.concept for each in heldout}


def test_names_of_files():
    slugs = {
        "police-car": "1F693",
        "waving-hand": "1F44B",
        "police-car-light": "1F6A8",
        "elf": "1F9DD",
        "woman-elf": "1F9DD-200D-2640",
    }
    assert named("waving-hand-default", slugs) == "1F44B"
    assert named("waving-hand-medium-dark", slugs) == "1F44B-1F3FE"
    assert named("woman-elf-light", slugs) == "1F9DD-1F3FB-200D-2640"
    assert named("police-car-light", slugs) == "1F6A8"
    assert named("person-elf-dark", slugs) == "1F9DD-1F3FF"
    assert named("a-thing", slugs) == ""
    assert points_of("39-fe0f-20e3") == "0039-20E3"
    assert points_of("1f3f4-e0067_e0062") == "1F3F4-E0067-E0062"
    assert slug("piñata") == "pinata" and slug("woman's hat") == "womans-hat"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"styles": ["lines"]}, "did you mean 'line'"),
        ({"styles": []}, "different ones of outlined"),
        ({"styles": ["line", "line"]}, "different ones"),
        ({"groups": ["food-drinks"]}, "did you mean 'food-drink'"),
        ({"groups": []}, "null for all"),
        ({"withheld": 1.0}, "withheld=1.0"),
        ({"tags": -1}, "tags=-1"),
        ({"background": "no"}, "background='no'"),
    ],
)
def test_wrong_values_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        EmojiStyles(**given)


@RENDERER
def test_a_table_of_another_kind_is_refused(packages):
    (packages / "openmoji-17.0.0/data/openmoji.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"openmoji\.csv is not OpenMoji's table"):
        EmojiStyles(folder=str(packages)).pictures()


# --- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm that packs one small package; returns it and its archive."""
    content = tmp_path / "package"
    (content / "wanted").mkdir(parents=True)
    (content / "wanted/a.svg").write_text("a")
    (content / "other.txt").write_text("b")
    archive = tmp_path / "ready.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, "package")
    script = tmp_path / "bin/npm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{archive}" "$last/some-1.0.0.tgz"\n')
    script.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(script))
    return Package("@a/some", "1.0.0", hashlib.sha256(archive.read_bytes()).hexdigest(), ("wanted",))


def test_a_package_is_fetched_whole_and_its_wanted_parts_are_kept(npm, tmp_path):
    folder = fetch(npm, tmp_path / "cache")
    assert folder == tmp_path / "cache/a-some-1.0.0"
    assert [str(each.relative_to(folder)) for each in sorted(folder.rglob("*"))] == ["wanted", "wanted/a.svg"]
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["a-some-1.0.0"]


def test_an_archive_of_other_content_is_refused(npm, tmp_path):
    other = Package(npm.name, npm.version, "0" * 64, npm.parts)
    with pytest.raises(ConfigError, match="it is not used"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"npm is not installed.*images\.source\.folder=DIR"):
        EmojiStyles(["line"], folder=str(tmp_path))._package(emoji.OPENMOJI)
