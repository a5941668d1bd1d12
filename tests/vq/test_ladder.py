"""vq-ladder: figures against hand cases and scipy, and the command on toy sets."""

import json

import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from vq import sensitivity as room
from vq.data import ImageData, ImageFolder, PictureSet
from vq.distortions import distort
from vq.features import load_features
from vq.images import to_image
from vq.ladder import check, ladder, one_a_concept
from vq.metrics import frechet_distance, frechet_wavelet_distance, psnr
from vq.sensitivity import (
    METRICS,
    RIVALS,
    Views,
    area_under_roc,
    band_sensitivity,
    bias,
    climb,
    flagged,
    fwd_against,
    monotone,
)
from vq.shapes import Shapes
from vqlm.batches import generator
from vqlm.errors import ConfigError

CPU = torch.device("cpu")


def pictures(count, side=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1) * 0.7


@pytest.fixture(scope="module")
def views():
    return Views(32, CPU, seed=0)


# --- figures


def test_area_under_roc():
    assert area_under_roc([1, 2], [3, 4]) == 1
    assert area_under_roc([3, 4], [1, 2]) == 0
    assert area_under_roc([1, 2, 2], [2, 3]) == pytest.approx((1 + 0.5 + 0.5 + 3) / 6)
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 9, (count,), generator=random).tolist() for count in (30, 21))
    assert area_under_roc(a, b) == pytest.approx(mannwhitneyu(b, a).statistic / (30 * 21))


def rungs(*sensitivities):
    """A made ladder: the first rung is harmless; each metric's sensitivity on the others."""
    return [
        {"strength": 0.0},
        *({"strength": 0.1 * n, "sensitivity": each} for n, each in enumerate(sensitivities, 1)),
    ]


def all_of(value):
    return dict.fromkeys(METRICS, float(value)) | {"psnr": 0.01, "ssim": 0.2}


def test_bands_are_compared_over_their_rungs():
    found = band_sensitivity({"low": rungs(all_of(1), all_of(3)), "high": rungs(all_of(2), all_of(8))})
    assert found["high_over_low"]["fwd"] == pytest.approx(10 / 4)
    assert found["high_over_low"]["psnr"] == pytest.approx(1)
    assert (found["low"]["fwd"], found["high"]["fwd"]) == (2, 5)
    fallen = band_sensitivity({"low": rungs(all_of(-1)), "high": rungs(all_of(2))})
    assert fallen["high_over_low"]["fwd"] == pytest.approx(2 / room.LEAST)
    other = {"low": rungs(all_of(1)), "high": rungs(all_of(1), all_of(2))}
    assert band_sensitivity(other) == band_sensitivity({}) == {"high_over_low": {}, "low": {}, "high": {}}


def test_bias_is_1_where_harm_is_seen_alike():
    here = {"noise": rungs(all_of(2), all_of(6)), "low": rungs(all_of(4)), "blur": rungs(all_of(9))}
    same = bias(here, here)
    assert same["ratio"]["fwd"] == same["off"]["fwd"] == same["spread"]["fwd"] == pytest.approx(1)
    half = {
        name: rungs(*(all_of(each["sensitivity"]["fwd"] / 2) for each in of[1:])) for name, of in here.items()
    }
    assert bias(half, here)["ratio"]["fwd"] == pytest.approx(0.5)
    assert bias(half, here)["off"]["fwd"] == bias(here, half)["off"]["fwd"] == pytest.approx(2)
    assert bias(half, here)["spread"]["fwd"] == pytest.approx(1)  # all kinds keep their proportions
    # blur is no harm that is the same everywhere: it moves the spread, and not the ratio
    blurred = {**here, "blur": rungs(all_of(90))}
    assert bias(blurred, here)["ratio"]["fwd"] == pytest.approx(1)
    assert bias(blurred, here)["spread"]["fwd"] == pytest.approx(
        10 ** (1 / 3**0.5)
    )  # deviation of (0, 0, ln 10)


def test_fwd_against_the_best():
    rival = RIVALS[0]
    base = dict.fromkeys(METRICS, 1.0)
    metrics = {
        "band_sensitivity": {
            "high_over_low": {**base, "fwd": 3, rival: 6},
            "low": {**base, rival: 0.1},
            "high": base,
        },
        "seconds": {**base, rival: 4.0, "fwd": 0.5},
        "monotone": {**base, "fwd": 0.5},
        "bias": {"off": {**base, "fwd": 3.0, rival: 2.0}},
        "roc": {"8": {**base, "fwd": 0.75}},
    }
    found = fwd_against(metrics, RIVALS)
    assert found["high_over_low"] == 3  # the one that sees no low noise has no say
    assert fwd_against(metrics, [rival])["high_over_low"] == 0.5
    assert (found["seconds"], found["bias"], found["monotone"], found["auc"]) == (0.5, 3, -0.5, {"8": -0.25})
    assert fwd_against({**metrics, "bias": {}, "roc": {}}, RIVALS)["bias"] is None


# --- climbing


def test_rungs_are_distances_to_pictures_left_alone(views):
    reference, own = pictures(6), pictures(6, seed=1)
    found = climb(views, reference, own, {"hue": [0.4], "shuffle": [], "blur": [0.5, 2]}, seed=3)
    assert list(found["ladder"]) == ["hue", "blur"]
    first, _, last = found["ladder"]["blur"]
    harmed = distort("blur", own, 2, generator(3, 2))
    net = load_features()
    net.side = 32
    assert first["fwd"] == pytest.approx(frechet_wavelet_distance(reference, own))
    assert last["fwd"] == pytest.approx(frechet_wavelet_distance(reference, harmed))
    expected = frechet_distance(net.pooled(reference), net.pooled(harmed))
    assert last["efficientnet_lite0_frechet"] == pytest.approx(expected, rel=1e-4)
    assert last["psnr"] == pytest.approx(psnr(own, harmed))
    deviation = found["floor"]["fwd"]["deviation"]
    assert last["sensitivity"]["fwd"] == pytest.approx((last["fwd"] - first["fwd"]) / deviation)
    assert found["monotone"]["psnr"] == 1
    assert set(found["seconds"]) == set(METRICS)


def test_the_floor_is_that_of_random_halves(views):
    a, b = views(pictures(5)), views(pictures(5, seed=1))
    floor = room.floor_of(a, b, seed=0)
    together = torch.cat([a["pixels"], b["pixels"]])
    values = []
    for number in range(room.FLOOR):
        order = torch.randperm(10, generator=generator(0, 1000 + number))
        values.append(frechet_wavelet_distance(together[order[:5]], together[order[5:]]))
    assert floor["fwd"]["mean"] == pytest.approx(sum(values) / len(values))
    assert floor["fwd"]["deviation"] == pytest.approx(float(torch.tensor(values).double().std()))


def test_the_untrained_network_is_a_function_of_the_seed():
    x = pictures(2)
    rows = [Views(32, CPU, seed)(x)["random"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.allclose(rows[0], rows[2])
    assert float(rows[0].abs().mean()) > 0.1  # nothing dies on the way


def test_made_sets_are_flagged_and_real_ones_are_not(views):
    reference, real = (views(pictures(12, seed=seed)) for seed in range(2))
    made = views(
        (pictures(12, seed=4) + 0.25 * torch.randn(12, 3, 16, 16, generator=generator(0, 0))).clamp(-1, 1)
    )
    areas, scores = flagged(reference, real, made, set_size=6, sets=8, seed=0)
    assert areas["fwd"] > 0.9 and areas["efficientnet_lite0_frechet"] > 0.9
    assert {name: area_under_roc(*each) for name, each in scores.items()} == areas
    alike, _ = flagged(reference, real, real, set_size=6, sets=12, seed=0)
    assert 0.2 < alike["fwd"] < 0.8


# --- pictures and settings


def test_one_picture_of_each_concept():
    concepts = [f"{n // 3}" for n in range(30)]
    data = PictureSet(
        torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 2, 2),
        concepts,
        concepts,
        concepts,
    )
    found = one_a_concept(data, 8, seed=0)
    assert len(found) == len(set(found.concepts)) == 8
    assert (
        found.concepts == one_a_concept(data, 8, seed=0).concepts != one_a_concept(data, 8, seed=1).concepts
    )
    assert len(one_a_concept(data, 99, 0, at_least=10)) == 10
    with pytest.raises(ConfigError, match="11 pictures of different concepts are needed and there are 10"):
        one_a_concept(data, 11, seed=0)


FINE = {
    "ladders": {"blur": [1.0]},
    "pictures": 8,
    "contrast": 0.7,
    "net_side": 32,
    "set_sizes": [2],
    "sets": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ladders": {"blur": [1.0, 1.0]}}, "must rise"),
        ({"ladders": {"blurr": [1.0]}}, "is no distortion"),
        ({"ladders": {"jpeg": [100.0]}}, "strength 100"),
        ({"pictures": 3}, "pictures=3"),
        ({"contrast": 0}, "contrast=0"),
        ({"net_side": 16}, "net_side=16"),
        ({"set_sizes": [1]}, "set_sizes"),
        ({"tokenizer": "a", "generated": "b"}, "give one of them"),
    ],
)
def test_refusals(change, message):
    check(**{**FINE, "tokenizer": None, "generated": None})
    with pytest.raises(ConfigError, match=message):
        check(**{"tokenizer": None, "generated": None, **FINE, **change})


# --- the command


def run(out, **changes):
    images = changes.pop("images", None) or ImageData(Shapes(), 16, holdout=0.3)
    usual = {"beside": None, "tokenizer": None, "generated": None, "sets": 3, "seed": 0, "device": "cpu"}
    usual |= {"ladders": {"noise": [0.05], "low": [0.05], "high": [0.05]}, "pictures": 8, "contrast": 0.75}
    out.mkdir()
    ladder(images=images, out=str(out), **{**usual, "net_side": 32, "set_sizes": [2, 6], **changes})
    return json.loads((out / "metrics.json").read_text())


def test_the_command(tmp_path, tiny_tokenizer, picture_folder, capsys):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    drawn = ImageData(ImageFolder(picture_folder), 16, holdout=0.0)
    first = run(tmp_path / "first", images=drawn)
    assert "bias" not in first and "roc" not in first
    found = run(
        tmp_path / "second",
        beside=str(tmp_path / "first/metrics.json"),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    assert found["beside"] == drawn.source.name and found["bias"]["off"]["fwd"] >= 1
    assert found["roc"].keys() == {"2", "6"} and 0 <= found["roc"]["6"]["fwd"] <= 1
    assert found["ladder"]["low"][1]["psnr"] == pytest.approx(found["ladder"]["high"][1]["psnr"], abs=0.1)
    assert found["fwd_against"]["all"]["auc"]["6"] <= 1
    for name in ("ladder.png", "roc.png"):
        assert Image.open(tmp_path / "second" / name).size[0] > 100
    told = capsys.readouterr().out
    assert "AUC, sets of 6" in told and "high 0.05" in told
    with pytest.raises(ConfigError, match="made with pictures=8, this is pictures=9"):
        run(tmp_path / "third", pictures=9, beside=str(tmp_path / "first/metrics.json"))


def test_a_folder_of_made_pictures(tmp_path):
    (tmp_path / "made").mkdir()
    for number, x_CHW in enumerate(torch.rand(7, 3, 20, 20, generator=generator(0, 0)) * 2 - 1):
        to_image(x_CHW).save(tmp_path / "made" / f"{number}.png")
    found = run(tmp_path / "out", ladders={}, generated=str(tmp_path / "made"), set_sizes=[6], sets=6)
    assert found["roc"]["6"]["efficientnet_lite0_frechet"] > 0.9  # noise is no drawing
    assert found["ladder"] == {}
    with pytest.raises(ConfigError, match="there are 7 made pictures"):
        run(tmp_path / "few", ladders={}, generated=str(tmp_path / "made"), set_sizes=[8])


def test_a_ladder_without_a_number_says_nothing_of_that_metric():
    """Not that the metric did not rise."""
    own = dict.fromkeys(METRICS, 0.0)
    more = dict.fromkeys(METRICS, 1.0)
    rungs = [own, {**more, "sensitivity": {"psnr": 5.0, "ssim": 0.1}}]
    blind = [own, {**more, "sensitivity": {"ssim": 0.0}}]
    found = monotone({"blur": rungs, "hue": blind})
    assert found["psnr"] == 1.0 and found["ssim"] == 0.5 and found["fwd"] == 1.0
    assert "psnr" not in monotone({"hue": blind})
