"""C.22 and C.23: a wrong configuration, and one that differs from that of the run that it would go on with."""

import importlib
import shutil
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import yaml

from lm.generate import main as lm_generate
from lm.train import main as lm_train
from vq.encode import main as vq_encode
from vq.store import CodeStore
from vq.train import main as vq_train
from vqlm.command import check_run_folder
from vqlm.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden/0.1.0"
COMMANDS = {"vq-train": vq_train, "vq-encode": vq_encode, "lm-train": lm_train, "lm-generate": lm_generate}

# Command, words, what the error must say. STORE, BUNDLE and TOKENIZER are folders that are there.
WRONG = [
    # a key that is none
    ("vq-train", "sed=1", "did you mean 'seed'?"),
    ("vq-train", "imges.size=32", "did you mean 'images.size'?"),
    ("vq-train", "images.sise=32", "did you mean 'images.size'?"),
    ("vq-train", "learner.optimizer.lrr=1", "did you mean 'learner.optimizer.lr'?"),
    ("vq-train", "holdout=0.1", "did you mean 'images.holdout'?"),
    ("vq-train", "+learner.bugdet=1", "did you mean 'budget'|learner.budget"),
    ("vq-train", "~learner.clip ~learner.budget", "budget"),
    ("lm-train", "store=STORE mixture.drop_conditon=0.1", "did you mean 'mixture.drop_condition'?"),
    ("lm-train", "stroe=STORE", "did you mean 'store'?"),
    ("lm-generate", "model=BUNDLE prompt=a temprature=1", "did you mean 'temperature'?"),
    # a choice that is none
    ("vq-train", "images=foldr", "did you mean 'folder'?"),
    ("vq-train", "quantizer=residul", "did you mean 'residual'?"),
    ("vq-train", "loss=[squared,wavlet]", "did you mean 'wavelet'?"),
    ("lm-train", "store=STORE head=layerd", "did you mean 'layered'?"),
    ("lm-train", "store=STORE layout=stakced", "did you mean 'stacked'?"),
    ("vq-train", "resume=atuo", "did you mean 'auto'?"),
    ("vq-train", "device=cdua", "did you mean 'cuda'|device=cdua"),
    # a value of another type
    ("vq-train", "learner.optimizer.lr=abc", "learner.optimizer.lr=abc"),
    ("vq-train", "batch_size=1.5", "batch_size=1.5: must be a whole number"),
    ("vq-train", "seed=null", "seed=null: must be a whole number"),
    ("vq-train", "learner.clip=true", "learner.clip=true: must be a number"),
    ("vq-train", "learner.optimizer.betas=[0.9]", "learner.optimizer.betas"),
    ("vq-train", "images.size=[32]", "images.size=[32]"),
    ("lm-train", "store=STORE row_ends=7", "row_ends=7"),
    ("lm-train", "store=STORE sampling.top_k=2.5", "top_k"),
    # a value out of range
    ("vq-train", "batch_size=0", "batch_size=0"),
    ("vq-train", "learner.clip=0", "clip=0"),
    ("vq-train", "learner.budget.minutes=-1", "minutes=-1"),
    ("vq-train", "learner.budget.cooldown=2", "cooldown=2"),
    ("vq-train", "learner.average=1.0", "average=1.0"),
    ("vq-train", "workers=-1", "workers=-1"),
    ("vq-train", "seed=-1", "seed=-1"),
    ("vq-train", "images.holdout=1.5", "holdout=1.5"),
    ("lm-train", "store=STORE mixture.drop_condition=2", "drop_condition=2"),
    ("lm-train", "store=STORE documents=0", "documents=0"),
    ("lm-generate", "model=BUNDLE prompt=a temperature=-1", "temperature=-1"),
    ("lm-generate", "model=BUNDLE prompt=a n=0", "n=0"),
    # values that contradict each other
    ("vq-train", "images.size=30", "multiple"),
    ("vq-train", "learner.budget.minutes=0", "at least one limit"),
    ("vq-train", "images=shapes adversary=patchgan vq_size=smoke images.size=8", "px"),
    ("lm-train", "store=STORE layout=delayed row_ends=true", "delayed"),
    ("lm-train", "store=STORE head=depth_transformer head.heads=3", "heads=3"),
    ("lm-train", "store=STORE devices=64", "devices=64"),
    ("lm-train", "store=STORE mixture.text=0.5", "texts"),
    # what is not there
    ("vq-train", "images=folder images.source.path=nowhere", "nowhere"),
    ("vq-encode", "images=shapes tokenizer=TOKENIZERR", "did you mean"),
    ("lm-train", "store=STOREE", "did you mean"),
    ("lm-generate", "model=BUNDLEE prompt=a", "did you mean"),
    ("lm-generate", "model=BUNDLE", "prompt"),
    ("vq-train", "precision=fp16", "bf16"),
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a store and a bundle. Whoever opens a picture, or reads codes, fails."""
    for name in ("store", "bundle"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    shutil.copytree(GOLDEN / "bundle/vq", tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)

    def read(*_, **__):
        raise RuntimeError("data was read")

    monkeypatch.setattr(PIL.Image, "open", read)
    monkeypatch.setattr(CodeStore, "codes_NhwQ", read)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capfd):
    """command, words → exit code, seconds, what it said."""

    def run(name, words):
        monkeypatch.setattr(sys, "argv", [name, *words, "out=run"])
        began, code = time.perf_counter(), 0
        try:
            COMMANDS[name]()
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
        return code, time.perf_counter() - began, capfd.readouterr().err

    return run


def test_a_wrong_configuration_is_found_before_data_is_read(count, figure, work, call):
    for late in ("vq.learner", "vq.encode", "lm.learner", "lm.pipeline", "lm.callbacks"):
        importlib.import_module(late)  # commands import these once a configuration asks for them
    places = {"STORE": work / "store", "BUNDLE": work / "bundle", "TOKENIZER": work / "tokenizer"}
    cases, seconds, missed = WRONG[:: count(6, 1)], [], []
    call("vq-train", ["sed=1"])  # imports
    for name, words, told in cases:
        for key, folder in places.items():
            words = words.replace(key, str(folder))
        code, took, said = call(name, words.split())
        seconds.append(took)
        found = any(part in said for part in told.split("|"))
        if code != 2 or not found or "Traceback" in said or Path("run").exists():
            missed.append((name, words, code, said[-300:]))
    assert not missed, "\n".join(map(str, missed))
    figure(
        "C.22",
        "typos, types, ranges, contradictions, absent files in a configuration",
        "signatures are the schema; exit 2 with the nearest valid name, before data is read",
        f"{len(cases)}/{len(cases)} kinds found, nothing left behind, at most "
        f"{max(seconds):.1f} s after the imports",
        {"hydra alone, lr=abc": hydra_alone()},
    )
    assert (
        sorted(seconds)[len(seconds) // 2] < 2
    )  # the median: other work on this machine is not the command's


def hydra_alone():
    """What plain hydra makes of a text where a number must stand."""
    import hydra

    from vqlm.command import CONF

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        lr = hydra.compose("vq_train", ["learner.optimizer.lr=abc"]).learner.optimizer.lr
    return f"accepted, as {type(lr).__name__}"


# --- C.23 -----------------------------------------------------------------------------------------------------

# Keys of vq-train: those that may change when a run goes on, and those that may not, with other values.
SAFE = {
    "device": "cuda",
    "precision": "bf16",
    "workers": 4,
    "checkpoint_minutes": 9.0,
    "watch": None,
    "out": "x",
}
UNSAFE = {
    "seed": 1,
    "batch_size": 32,
    "images.size": 64,
    "tokenizer.quantizer.codebook_size": 99,
    "tokenizer.encoder.channels": [8, 8],
    "learner.optimizer.lr": 0.5,
    "learner.budget.minutes": 1.0,
    "learner.average": 0.9,
    "learner.reset.window": 3,
    "images.holdout": 0.5,
}


def changed(config, key, value):
    """A copy with another value at a dotted key that is there."""
    made = yaml.safe_load(yaml.safe_dump(config))
    *parents, last = key.split(".")
    place = made
    for parent in parents:
        place = place[parent]
    assert last in place and place[last] != value, key
    place[last] = value
    return made


def test_a_run_is_not_gone_on_with_under_another_configuration(figure, tmp_path):
    import hydra
    from omegaconf import OmegaConf

    from vqlm.command import CONF

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("vq_train"), resolve=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    check_run_folder(str(run), config, vq_train.free)
    for key, value in SAFE.items():
        check_run_folder(str(run), changed(config, key, value), vq_train.free)
    for key, value in UNSAFE.items():
        with pytest.raises(ConfigError) as told:
            check_run_folder(str(run), changed(config, key, value), vq_train.free)
        assert f"{key}" in str(told.value) and "→" in str(told.value), key
    figure(
        "C.23",
        "the same run folder under another configuration",
        "the saved configuration is compared; each difference is shown as old → new",
        f"{len(UNSAFE)}/{len(UNSAFE)} changes of the result refused, {len(SAFE)}/{len(SAFE)} of the machine allowed",
    )
