"""The watch: what it measures, that it changes nothing, that it sounds, and what a resumed run keeps."""

import json

import pytest
import torch
from tiny import Signalled, make_tokenizer
from torch import nn

from vq.batches import NoAugment, PictureBatches
from vq.callbacks import NoWatch, Watch, measure, spread
from vq.codebook import CodebookReset
from vq.data import PictureSet
from vq.images import from_bytes
from vq.learner import TokenizerLearner
from vq.losses.adversarial import Adversary, NoAdversary, PatchDiscriminator
from vq.losses.reconstruction import Squared
from vq.metrics import psnr
from vq.tokenizer import ImageTokenizer
from vqlm.errors import Interrupted
from vqlm.hardware import Hardware
from vqlm.training import Budget, fit, read_log

CPU = Hardware(torch.device("cpu"), "fp32")


def picture_set(count, height=16, width=16, seed=0):
    """Flat colours with one bright corner: a tiny tokenizer learns them within some steps."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, 1, 1), generator=random).expand(count, 3, height, width).clone()
    x[:, :, : height // 2, : width // 2] //= 2
    names = [f"picture {seed}.{n}" for n in range(count)]
    return PictureSet(x.to(torch.uint8), names, names, names)


class Images:
    """Stands in for `ImageData`."""

    def __init__(self, train, heldout):
        self.train_sets, self.heldout_sets = train, heldout


TRAIN = picture_set(24)
IMAGES = Images([TRAIN], [picture_set(6, seed=1), picture_set(5, 8, 24, seed=2)])


def pictures(total):
    return PictureBatches(TRAIN, 8, 0, NoAugment(), total)


def learner_of(batches=20, against=None, lr=3e-3, **options):
    torch.manual_seed(0)

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=lr)

    return TokenizerLearner(
        make_tokenizer().train(),
        {"squared": Squared()},
        CodebookReset(window=5),
        adam,
        Budget(batches=batches, warmup=0, cooldown=0.0),
        adversary=against or NoAdversary(),
        **options,
    )


def watched(learner, out, images=IMAGES, batches=pictures, **options):
    watch = Watch(**{"every": 4, "pictures": 8, **options})
    watch.look_at(images, out)  # type: ignore[arg-type]
    fit(learner, batches, out, CPU, "test", callbacks=[watch])
    return watch


def state(learner):
    return {k: v.clone() for k, v in learner.training_state()[0].items()}


# --- what is measured -----------------------------------------------------------------------------------------


def test_pictures_are_spread_over_all_sets():
    found = spread([picture_set(6), picture_set(0), picture_set(4, seed=1)], 4)
    assert [each.ids for each in found] == [["picture 0.0", "picture 0.3"], ["picture 1.0", "picture 1.3"]]
    assert [each.ids for each in spread([picture_set(3)], 8)] == [
        ["picture 0.0", "picture 0.1", "picture 0.2"]
    ]


def test_psnr_is_that_of_codes_decoded():
    tokenizer = make_tokenizer().train()
    sets = [picture_set(5), picture_set(3, 8, 24, seed=1)]
    level, used = measure(tokenizer, sets)
    codes = [tokenizer.encode(from_bytes(each.x_NCHW)) for each in sets]
    pairs = zip(sets, codes, strict=True)
    levels = [psnr(from_bytes(each.x_NCHW), tokenizer.decode(code)) for each, code in pairs]
    assert level == pytest.approx((5 * levels[0] + 3 * levels[1]) / 8, abs=1e-5)
    rows = torch.cat([each.reshape(-1, 2) for each in codes])
    assert used == [len(rows[:, depth].unique()) for depth in range(2)]


def test_what_is_not_finite_has_the_worst_psnr():
    tokenizer = make_tokenizer()
    tokenizer.decoder.last_weight.data.fill_(float("nan"))
    assert measure(tokenizer, [picture_set(3)])[0] == 0
    assert measure(Perfect(), [picture_set(3)])[0] == pytest.approx(100)


class Perfect(ImageTokenizer):
    def __init__(self):
        tiny = make_tokenizer()
        super().__init__(tiny.encoder, tiny.quantizer, tiny.decoder, 16)

    def forward(self, x_BCHW):
        made = super().forward(x_BCHW)
        made.x_BCHW = x_BCHW
        return made


def test_a_warm_up_without_codes_is_not_measured(tmp_path):
    """PSNR past the quantizer is of another kind: kept as the best it would hold codes that were never trained."""
    learner = learner_of(8)
    learner.continuous = 0.6
    watched(learner, tmp_path)
    assert [entry["batch"] for entry in read_log(tmp_path / "watch.jsonl")] == [8]


def test_a_final_tokenizer_that_is_better_becomes_the_best(tmp_path):
    watch = watched(learner_of(4), tmp_path)
    record = tmp_path / "best" / "watch.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "psnr": 1.0}))
    final = make_tokenizer(seed=3)
    found = watch.conclude(final)["watch"]
    assert found["best"] == found["final"] > 1
    assert ImageTokenizer.from_pretrained(tmp_path / "best").fingerprint == final.fingerprint


# --- nothing is changed ---------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers in evaluation too, as a quantizer that samples would."""

    def forward(self, x):
        return x + 0.0 * torch.rand_like(x)


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("average", [None, 0.9])
def test_a_watched_run_is_the_unwatched_one_to_the_bit(average, tmp_path):
    def learner():
        made = learner_of(
            8, Adversary(PatchDiscriminator(8, 2), torch.optim.AdamW, start=0.3), average=average
        )
        made.model.encoder.layers.append(Noisy())
        made.model.encoder.layers[-1].eval()  # a part that stays in evaluation
        return made

    torch.manual_seed(1)
    alone = learner()
    fit(alone, pictures, tmp_path / "alone", CPU, "test", callbacks=[NoWatch()])
    torch.manual_seed(1)
    seen = learner()
    watched(seen, tmp_path / "seen", every=1)
    assert len(read_log(tmp_path / "seen" / "watch.jsonl")) == 8
    expected, found = state(alone), state(seen)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    flags = [[module.training for module in each.modules()] for each in (alone, seen)]
    assert flags[0] == flags[1]


def test_flags_and_random_numbers_are_put_back():
    tokenizer = make_tokenizer().train()
    tokenizer.encoder.layers[0].eval()
    tokenizer.encoder.layers.append(Noisy())
    flags = [module.training for module in tokenizer.modules()]
    before = torch.get_rng_state()
    measure(tokenizer, [TRAIN])
    assert [module.training for module in tokenizer.modules()] == flags
    assert torch.equal(torch.get_rng_state(), before)


# --- the best, and the alarm ----------------------------------------------------------------------------------


def test_the_best_tokenizer_is_kept_and_loads(tmp_path):
    learner = learner_of(20)
    watch = watched(learner, tmp_path)
    entries = read_log(tmp_path / "watch.jsonl")
    assert [entry["batch"] for entry in entries] == [4, 8, 12, 16, 20]
    assert entries == watch.entries
    assert entries[-1]["psnr"] > entries[0]["psnr"] + 1  # it learned
    best = max(entries, key=lambda entry: entry["psnr"])
    assert watch.best == best
    kept = ImageTokenizer.from_pretrained(tmp_path / "best")
    assert measure(kept, watch.sets)[0] == pytest.approx(best["psnr"], abs=1e-9)
    found = watch.conclude(kept)["watch"]
    assert found["best"] == best["psnr"] == pytest.approx(found["final"])
    assert (found["best_batch"], found["alarms"], found["worse"]) == (best["batch"], [], False)
    assert (found["split"], found["pictures"]) == ("heldout", 8)
    assert watch.verdict() == ""


def test_an_averaged_tokenizer_is_measured_where_an_average_is_taken(tmp_path):
    learner = learner_of(4, average=0.999)
    watch = watched(learner, tmp_path)
    level = measure(learner.result, watch.sets)[0]  # type: ignore[arg-type]
    assert watch.entries[-1]["psnr"] == level != measure(learner.model, watch.sets)[0]


def spoiled(batches):
    """A generator that a huge weight of the adversary destroys in the second half of its run."""
    torch.manual_seed(0)
    against = Adversary(
        PatchDiscriminator(8, 2), torch.optim.AdamW, weight=1e6, start=0.5, ramp=0.0, lowest=1.0, highest=1.0
    )
    return learner_of(batches, against, lr=1e-2)


def test_a_ruined_run_says_so_once_for_each_fall_and_leaves_the_best(tmp_path, capsys):
    learner = spoiled(36)
    watch = watched(learner, tmp_path)
    printed = capsys.readouterr().err
    entries = read_log(tmp_path / "watch.jsonl")
    falls = [entry["batch"] for entry in entries if entry["alarm"]]
    below = [
        entry["psnr"] < watch.best["psnr"] - 1 for entry in entries if entry["batch"] > watch.best["batch"]
    ]
    assert watch.best["batch"] < falls[0] and falls[0] > 18
    assert len(falls) == sum(b and not a for a, b in zip([False, *below], below, strict=False)) < sum(below)
    assert printed.count("watch: held-out PSNR fell to") == len(falls)
    assert f"at batch {watch.best['batch']}, kept in {tmp_path / 'best'}" in printed

    final = learner.result
    kept = ImageTokenizer.from_pretrained(tmp_path / "best")
    levels = [measure(each, IMAGES.heldout_sets)[0] for each in (kept, final)]  # type: ignore[arg-type]
    assert levels[0] > levels[1] + 1
    found = watch.conclude(final)["watch"]  # type: ignore[arg-type]
    assert found["worse"] and found["alarms"] == falls
    assert "the final tokenizer is worse" in watch.verdict() and str(tmp_path / "best") in watch.verdict()
    json.dumps(found, allow_nan=False)


def test_where_nothing_is_held_out_training_pictures_are_watched_and_it_is_said(tmp_path, capsys):
    watch = watched(learner_of(4), tmp_path, Images([TRAIN], [picture_set(0)]))
    assert "training pictures" in capsys.readouterr().out
    assert watch.conclude(make_tokenizer())["watch"]["split"] == "train"
    assert len(watch.entries) == 1


# --- resumed --------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_best_and_alarms_without_duplicates(tmp_path):
    watched(spoiled(36), tmp_path / "whole")
    with pytest.raises(Interrupted):
        watched(spoiled(36), tmp_path / "parts", batches=lambda total: Signalled(pictures(total), 29))
    log = tmp_path / "parts" / "watch.jsonl"
    assert any(entry["alarm"] for entry in read_log(log))
    later = {"batch": 32, "samples": 1, "psnr": 99.0, "codes_in_use": None, "alarm": True}
    with log.open("a") as file:  # what a kill leaves: a batch measured after the checkpoint, and half a line
        file.write(json.dumps(later) + '\n{"batch": 36, "sam')
    watch = watched(spoiled(36), tmp_path / "parts")
    assert read_log(log) == read_log(tmp_path / "whole" / "watch.jsonl")
    for name in ("model.safetensors", "config.json", "watch.json"):
        whole, parts = (tmp_path / each / "best" / name for each in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    before = watch.conclude(make_tokenizer())
    again = Watch(every=4, pictures=8)
    again.look_at(IMAGES, tmp_path / "parts")  # type: ignore[arg-type]
    assert again.conclude(make_tokenizer()) == before  # of a run that had been finished before


def test_a_line_cut_short_is_forgotten(tmp_path):
    (tmp_path / "watch.jsonl").write_text('{"batch": 0, "psnr": 1.0, "alarm": false}\n{"batch": 4, "ps')
    watched(learner_of(8), tmp_path)
    assert [entry["batch"] for entry in read_log(tmp_path / "watch.jsonl")] == [0, 4, 8]


@pytest.mark.parametrize("options", [{"every": 0}, {"pictures": 0}, {"tolerance": 0.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="watch=none"):
        Watch(**options)
