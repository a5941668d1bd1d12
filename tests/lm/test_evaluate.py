"""Drawn sets and their colours against cases whose answers are known; `lm-evaluate` on a store of known drawings."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model, make_tokenizer, write_pictures

from lm.data import open_store, read_pairs
from lm.evaluate import evaluate, real_line, report
from lm.generate import generate
from lm.metrics import (
    Gallery,
    Originals,
    colouring,
    contrast,
    draw,
    drawing,
    saturation,
    spread,
    wavelet_distance,
    wavelets,
)
from lm.pipeline import Pipeline
from lm.sequence import Image
from lm.texts import NoTexts
from vq.data import ImageData, ImageFolder
from vq.drivers import Local
from vq.encode import encode
from vq.images import from_bytes, to_pixels
from vq.metrics import frechet_wavelet_distance, psnr
from vqlm.errors import ConfigError

GRID = (2, 2)


def flat(*colour):
    """A picture (1,3,4,4) of one colour, in [-1,1]."""
    return torch.tensor(colour, dtype=torch.float).reshape(1, 3, 1, 1).expand(1, 3, 4, 4).clone()


# --- colours ----------------------------------------------------------------------------------------------------------


def test_contrast_is_of_luminance_and_saturation_of_colours():
    red, grey = flat(1, -1, -1), flat(0.2, 0.2, 0.2)
    halves = flat(-1, -1, -1)
    halves[..., 2:] = 1
    two_colours = flat(1, -1, -1)
    two_colours[..., 2:] = torch.tensor([-1.0, 0.01874, -1.0])[
        :, None, None
    ]  # as light as red: 0.299 / 0.587
    x = torch.cat([red, grey, halves, two_colours])
    spread = (16 / 15) ** 0.5 / 2  # of eight zeros and eight ones, unbiased
    assert contrast(x).tolist() == pytest.approx([0, 0, spread, 0], abs=1e-4)
    assert saturation(x).tolist() == pytest.approx([1, 0, 0, 0.75469], abs=1e-4)


def test_colours_are_told_as_shares_of_the_captioned_pictures_own():
    half = torch.cat([flat(0, -1, -1), flat(-1, 0, 0)])  # half as far from black as red and cyan
    half[..., 0] = -1
    whole = torch.cat([flat(1, -1, -1), flat(0.3, 0.3, 0.3), flat(-1, 1, 1)])
    whole[..., 0] = -1
    gallery = Gallery({GRID: whole}, {GRID: ["a", "b", "c"]})
    found = colouring({GRID: half}, gallery, {GRID: [0, 2]})
    assert found == {"contrast": pytest.approx(0.5), "saturation": pytest.approx(0.5)}
    grey = Gallery({GRID: flat(0, 0, 0)}, {GRID: ["a"]})
    assert colouring({GRID: half[:1]}, grey, {GRID: [0]}) == {"contrast": None, "saturation": None}


# --- sets -------------------------------------------------------------------------------------------------------------


def test_the_wavelet_distance_is_of_the_shape_with_most_drawings():
    random = torch.Generator().manual_seed(0)
    square, wide = (torch.rand(n, 3, 16, 8 * w, generator=random) * 2 - 1 for n, w in ((9, 2), (7, 4)))
    sets = {GRID: wavelets(square), (2, 4): wavelets(wide)}
    found = wavelet_distance({GRID: square[:2], (2, 4): wide[:5]}, sets)
    assert found["fwd"] == pytest.approx(frechet_wavelet_distance(wide[:5], wide), rel=1e-6)
    assert found == {
        **found,
        "fwd_level": 2,
        "fwd_pictures": 5,
        "fwd_set": 7,
        "fwd_shape": [16, 32],
    }
    assert wavelet_distance({GRID: square}, sets)["fwd"] == pytest.approx(0, abs=1e-9)
    assert wavelet_distance({GRID: square[:1]}, sets) == {"fwd": None}  # one drawing has no covariance
    assert wavelet_distance({(1, 1): square}, sets) == {"fwd": None}
    assert Gallery({GRID: square[..., :15]}, {}).rebuilt_sets == {}  # an odd side


# --- a model on a store -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def road(pictures, tmp_path_factory):
    """A bundle's folder, its pipeline, and a store of the pictures."""
    folder = tmp_path_factory.mktemp("road")
    model, tokenizer = make_model()
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    pipe.save_pretrained(folder / "model")
    store = folder / "store"
    encode(
        str(folder / "model" / "vq"),
        images_of(pictures, size=None),
        str(store),
        16,
        64,
        "cpu",
        "auto",
        None,
        None,
        Local(),
    )
    return SimpleNamespace(bundle=folder / "model", store=store, pipe=pipe)


def images_of(folder, size: int | None = 64, holdout=0.2):
    return ImageData(ImageFolder(folder), size, holdout=holdout)


def read(road, split="train"):
    store = open_store(road.store, road.pipe.form)
    return store, read_pairs(store, split, road.pipe.encode_text)


def test_equal_drawings_count_once_and_decoding_is_part_of_the_time(road, monkeypatch):
    _, pairs = read(road)
    gallery = Gallery.of(road.pipe, [pairs])
    now, asked, decode = [10.0], [], road.pipe.decode

    def draw_codes(texts, n, sampling, seed, size):
        asked.append(size)
        now[0] += 2.0
        return [pairs.image(int(number > 1)) for number in range(len(texts))]

    def decode_slowly(images):
        now[0] += 1.0
        return decode(images)

    monkeypatch.setattr(road.pipe, "draw_codes", draw_codes)
    monkeypatch.setattr(road.pipe, "decode", decode_slowly)
    monkeypatch.setattr("lm.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    drawn = draw(road.pipe, pairs, [5, 2, 9, 7], 0)
    assert (drawn.distinct, drawn.seconds, drawn.pairs, asked) == (0.5, 3.0, {GRID: [5, 2, 9, 7]}, [(16, 16)])
    torch.testing.assert_close(drawn.pixels[GRID][1], decode([pairs.image(0)])[0])
    found = drawing(road.pipe, gallery, pairs, {}, 0, 6)[0]
    assert found["seconds_a_picture"] == 0.5 and "real" not in found


def test_the_pictures_of_a_store_are_found_again(road, pictures):
    store, pairs = read(road)
    given = ImageData(ImageFolder(pictures), 64, aspects=[0.5, 2.0], fit="pad")  # the store's own count
    originals = Originals(given, store)
    assert (given.size, given.aspects, given.fit, given.multiple) == (16, [1.0], "crop", 8)
    images = images_of(pictures, size=16)
    images.setup()
    own = [7, 0, 3]
    wanted = images.train.select([images.train.ids.index(pairs.ids[i]) for i in own])
    assert torch.equal(originals.read(road.pipe, pairs, own), wanted.x_NCHW)


def test_other_pictures_are_refused(road, pictures, tmp_path):
    store, pairs = read(road)
    everything = list(range(len(pairs)))
    names = [path.name for path in sorted(write_pictures(tmp_path / "mixed").glob("*.png"))]
    for one, other in zip(names, names[::-1], strict=True):  # each under another's name
        (tmp_path / "mixed" / one).write_bytes((pictures / other).read_bytes())
    mixed = Originals(images_of(tmp_path / "mixed"), store)
    with pytest.raises(ConfigError, match=r"has other pictures under its ids: .*% of the codes agree"):
        mixed.read(road.pipe, pairs, everything)
    few = write_pictures(tmp_path / "few")
    lines = (few / "metadata.jsonl").read_text().splitlines()
    (few / "metadata.jsonl").write_text("\n".join(line for line in lines if pairs.ids[3] not in line))
    (few / pairs.ids[3]).rename(tmp_path / "away.png")
    with pytest.raises(ConfigError, match=r"images=few lacks 1 pictures of it, such as '.*images=null"):
        Originals(images_of(few), store).read(road.pipe, pairs, everything)
    (few / "metadata.jsonl").write_text("\n".join(lines))
    (few / pairs.ids[3]).write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="has 1 of its pictures in another shape, or they cannot be read"):
        Originals(images_of(few), store).read(road.pipe, pairs, everything)
    wide = Originals(images_of(pictures), store)
    wide.images.aspects = [2.0]
    with pytest.raises(ConfigError, match="has 5 of its pictures in another shape"):
        wide.read(road.pipe, pairs, everything[:5])


def test_a_model_that_knows_every_code_stands_on_the_tokenizers_floor(road, pictures, monkeypatch):
    store, pairs = read(road)
    gallery = Gallery.of(road.pipe, [pairs], Originals(images_of(pictures), store))
    known = {text: pairs.image(i) for i, text in enumerate(pairs.texts)}
    monkeypatch.setattr(road.pipe, "draw_codes", lambda texts, *_: [known[text] for text in texts])
    found, drawn, chosen = drawing(road.pipe, gallery, pairs, {}, 0, 8)
    real = from_bytes(gallery.real[GRID])
    assert found["real"]["psnr"] == pytest.approx(psnr(torch.stack(drawn), real[chosen]), rel=1e-6)
    assert found["real"]["fwd"] == pytest.approx(frechet_wavelet_distance(torch.stack(drawn), real), rel=1e-6)
    assert {**found["real"], "above_floor": None, "floor": None} == {
        **found["real"]["floor"],
        "above_floor": None,
        "floor": None,
    }
    assert found["real"]["above_floor"] == 0 and found["saturation"] == pytest.approx(1)
    wrong = Image(torch.zeros(2, 2, 2, dtype=torch.int64))
    monkeypatch.setattr(road.pipe, "draw_codes", lambda texts, *_: [wrong] * len(texts))
    other = drawing(road.pipe, gallery, pairs, {}, 0, 8)[0]
    assert other["real"]["floor"] == found["real"]["floor"]  # of the same captions, whatever is drawn
    assert other["real"]["above_floor"] == pytest.approx(other["real"]["fwd"] - found["real"]["fwd"])
    assert abs(other["real"]["above_floor"]) > 1e-3 and other["distinct"] == 1 / 8


# --- the command ------------------------------------------------------------------------------------------------------

SAMPLING = ("guidance", "temperature", "top_k", "top_p", "min_p", "deeper", "parallel", "norm", "ramp")


def run(road, out, **changes):
    given = dict.fromkeys(("images", "base", *SAMPLING))
    given |= {
        "texts": NoTexts(),
        "train_captions": 3,
        "heldout_captions": 2,
        "heldout_texts": 5,
        "context": 64,
        "drawings": False,
    }
    given |= {
        "model": str(road.bundle),
        "store": str(road.store),
        "seed": 0,
        "out": str(out),
        "device": "cpu",
    }
    evaluate(**{**given, **changes})
    return json.loads((out / "metrics.json").read_text())


def test_sampling_is_chosen_by_the_names_of_lm_generate():
    here, there = (list(inspect.signature(each).parameters) for each in (evaluate, generate))
    assert [name for name in here if name in SAMPLING] == [name for name in there if name in SAMPLING]
    assert set(SAMPLING) <= set(here)


def test_a_bundle_is_measured_as_it_was_asked_to_draw(road, pictures, tmp_path, capsys):
    given = {
        "guidance": 3.0,
        "parallel": 0.0,
        "norm": 2.5,
        "ramp": 0.5,
        "min_p": 0.1,
        "deeper": 0.9,
        "top_k": 7,
    }
    found = run(road, tmp_path, images=images_of(pictures), **given)
    assert {name: found["sampling"][name] for name in given} == given
    assert found["sampling"]["temperature"] == road.pipe.sampling.temperature
    for split, count in (("train", 3), ("heldout", 2)):
        told = found[split]["drawing"]
        assert told["captions"] == told["fwd_pictures"] == told["real"]["fwd_pictures"] == count
        assert told["fwd_set"] == told["real"]["fwd_set"] == 48
        assert told["seconds_a_picture"] > 0 and 0 < told["distinct"] <= 1
    assert "of 2 drawings to 48 real pictures" in capsys.readouterr().out


def test_drawings_are_kept_as_a_folder_of_pictures(road, tmp_path):
    run(road, tmp_path, heldout_captions=0)
    assert not (tmp_path / "drawings").exists()
    run(road, tmp_path, drawings=True, train_captions=4)
    run(road, tmp_path, drawings=True)  # takes the place of the four
    for split, count in (("train", 3), ("heldout", 2)):
        _, pairs = read(road, split)
        chosen = spread(len(pairs), count)
        found = ImageFolder(tmp_path / "drawings" / split).pictures()
        assert [each.caption for each in found] == [pairs.texts[i] for i in chosen]
        drawn = draw(road.pipe, pairs, chosen, 0)
        expected = {
            pair: x
            for grid, own in drawn.pairs.items()
            for pair, x in zip(own, drawn.pixels[grid], strict=True)
        }
        for each, pair in zip(found, chosen, strict=True):
            torch.testing.assert_close(
                to_pixels(each.load()), expected[pair].clamp(-1, 1), atol=1.1 / 255, rtol=0
            )


def test_a_file_in_the_way_of_drawings_is_told_first(road, tmp_path):
    (tmp_path / "drawings").write_text("mine")
    with pytest.raises(ConfigError, match="drawings is in the way; name another out="):
        run(road, tmp_path, drawings=True, model="nowhere")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parallel": 2.0}, r"parallel=2.0: must lie in \[0, 1\]"),
        ({"norm": -1.0}, r"norm=-1.0: must lie in \[0, 10000\]"),
        ({"min_p": 1.5}, r"min_p=1.5: must lie in \[0, 1\]"),
        ({"ramp": -0.5}, r"ramp=-0.5: must lie in \[0, 1\]"),
        ({"deeper": 0.0}, r"deeper=0.0: must lie in \[0.01, 100\]"),
        ({"train_captions": -1}, "train_captions=-1"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(road, tmp_path, given, said):
    with pytest.raises(ConfigError, match=said):
        run(road, tmp_path, model="nowhere", **given)


def test_nothing_is_decoded_where_nothing_is_drawn(road, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(road.pipe, "decode", refuse)
    found = report(road.pipe, str(road.store), tmp_path, 0, 0, 0)
    assert set(found) == {"sampling", "compared"}


def test_the_floor_is_told_in_one_line():
    real = {"fwd": 2.5, "fwd_pictures": 64, "fwd_set": 3953, "floor": {"fwd": 0.25}}
    told = real_line("train", {"real": real})
    assert told == (
        "train: FWD of 64 drawings to 3,953 real pictures 2.500, of their reconstructions 0.250 "
        "(the image tokenizer's floor)"
    )
    assert real_line("train", {}) == real_line("train", {"real": {"fwd": None}}) == ""
