"""The whole road through the commands, as a user types them: own pictures in, own drawings out; and wrong turns."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from tiny import make_plain_llama

from lm import Pipeline
from vq import ImageTokenizer
from vq.store import CodeStore
from vqlm.training import Checkpoints, read_log

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["vq_size=smoke", "learner.budget.batches=12", "device=cpu"]


def run(module, *arguments, cwd, code=0):
    """A command in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=250,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def call(module, *arguments, cwd, code=0):
    """The same in this process: no seconds of imports, but what other tests have imported is there already."""
    said, ended = io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            import_module(module).main()
        except SystemExit as stop:
            ended = stop.code
    assert ended == code, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def road(tmp_path_factory, picture_folder):
    """A working folder in which the four commands have run over a folder with two unusable files."""
    cwd = tmp_path_factory.mktemp("road")
    folder = cwd / "mine"
    folder.mkdir()
    for file in picture_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_bytes(b"<html>not a picture</html>")
    with (folder / "metadata.jsonl").open("a") as metadata:
        for name in ("empty.png", "page.png"):
            metadata.write(json.dumps({"file_name": name, "text": "nothing"}) + "\n")
    images = ["images=folder", "images.source.path=mine", "images.size=16", "images.holdout=0.2"]
    run("vq.train", *images, *SMALL, "out=vq", cwd=cwd)
    run("vq.encode", *images[:2], images[3], "tokenizer=vq/tokenizer", "out=store", "shard_size=20", cwd=cwd)
    run(
        "lm.train",
        "store=store",
        "lm_size=smoke",
        "learner.budget.batches=12",
        "device=cpu",
        "out=lm",
        cwd=cwd,
    )
    run("lm.generate", "model=lm/model", "prompt=a red circle", "n=3", "out=drawn", cwd=cwd)
    return cwd


def test_each_command_leaves_what_it_promises(road):
    for name in (
        "vq/tokenizer/config.json",
        "vq/tokenizer/README.md",
        "vq/metrics.json",
        "vq/reconstructions.png",
        "vq/code_use.png",
        "vq/config.yaml",
        "vq/log.jsonl",
        "store/manifest.json",
        "store/rejects.jsonl",
        "store/shard-00000.parquet",
        "lm/model/multimodal.json",
        "lm/metrics.json",
        "lm/samples.png",
    ):
        assert (road / name).is_file(), name
    assert Checkpoints(road / "vq/checkpoints").all()
    assert len(list((road / "drawn").glob("a-red-circle-0-00?.png"))) == 3
    for picture in [p for folder in ("vq", "lm", "drawn") for p in (road / folder).glob("*.png")]:
        with Image.open(picture) as opened:
            opened.load()


def test_the_store_holds_the_codes_of_the_pictures(road):
    tokenizer = ImageTokenizer.from_pretrained(road / "vq/tokenizer")
    store = CodeStore.open(road / "store")
    assert len(store) == 48
    assert store.tokenizer_fingerprint == tokenizer.fingerprint
    from vq.images import open_image, to_pixels

    row = store[5]
    expected = tokenizer.encode(to_pixels(open_image(road / "mine" / row.id), 16)[None])[0]
    assert torch.equal(row.codes_hwQ, expected)
    reasons = [json.loads(line)["reason"] for line in (road / "store/rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 2


def test_concepts_are_on_one_side_of_the_split(road):
    store = CodeStore.open(road / "store")
    sides = {split: set(store.concepts(split)) for split in ("train", "heldout")}
    assert sides["train"] and sides["heldout"]
    assert not sides["train"] & sides["heldout"]


def test_metrics_hold_the_numbers_that_were_promised(road):
    vq, lm = (json.loads((road / run_ / "metrics.json").read_text()) for run_ in ("vq", "lm"))
    for split in ("train", "heldout"):
        assert {"psnr", "ssim", "fwd", "codes_used", "perplexity"} <= vq[split].keys()
        assert len(vq[split]["codes_used"]) == 2
        assert {"image_loss", "image_bits", "text_loss", "text_bits", "drawing", "captioning"} <= lm[
            split
        ].keys()
    assert vq["run"]["batches"] == lm["run"]["batches"] == 12


def test_the_bundle_draws_and_reads_its_own_tokenizer(road):
    pipe = Pipeline.from_pretrained(road / "lm/model")
    assert pipe.images.fingerprint == CodeStore.open(road / "store").tokenizer_fingerprint
    assert pipe.generate("a red circle")[0].size == (16, 16)


def test_running_again_repeats_nothing(road):
    before = {p: p.stat().st_mtime_ns for p in (road / "store").glob("*.parquet")}
    said = call(
        "vq.encode",
        "images=folder",
        "images.source.path=mine",
        "images.holdout=0.2",
        "tokenizer=vq/tokenizer",
        "out=store",
        "shard_size=20",
        cwd=road,
    )
    assert "0 shards encoded" in said
    assert before == {p: p.stat().st_mtime_ns for p in (road / "store").glob("*.parquet")}


def terminated(cwd, done):
    """Start a long training run, send SIGTERM once it is past batch `done`; its exit code and what it said."""
    words = [
        "images=folder",
        "images.source.path=mine",
        "images.size=16",
        *SMALL,
        "learner.budget.batches=100000",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vq.train", *words, "out=killed"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = cwd / "killed/log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and any(entry["batch"] > done for entry in read_log(log)):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_a_terminated_run_exits_143_and_goes_on(road):
    code, _ = terminated(road, 0)
    (saved,) = Checkpoints(road / "killed/checkpoints").all()
    done = int(saved.name.removeprefix("batch-"))
    assert (code, done > 0) == (143, True)
    code, said = terminated(road, done)
    assert code == 143
    assert f"going on from killed/checkpoints/{saved.name}" in said


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("vq.train", ["imges.size=32"], "images"),
        ("vq.train", ["images=foldr"], "folder"),
        ("vq.train", ["images=folder", "images.source.path=nowhere"], "nowhere"),
        ("vq.train", ["images.size=30"], "multiple"),
        ("vq.train", ["images=shapes", "batch_size=0"], "batch_size"),
        ("vq.train", ["images=shapes", "learner.clip=0"], "clip"),
        ("vq.train", ["images=shapes", "workers=-1"], "workers"),
        ("lm.train", ["store=store", "head=depth_transformer", "head.heads=3"], "heads=3"),
        ("vq.train", ["learner.optimizer.lr=abc"], "lr"),
        ("vq.encode", ["images=shapes", "tokenizer=vq/tokeniser"], "tokenizer"),
        ("lm.train", ["store=stoer"], "store"),
        ("lm.train", ["store=store", "head=layerd"], "layered"),
        ("lm.train", ["store=store", "mixture.drop_condition=2"], "drop_condition"),
        ("lm.generate", ["model=lm/model", "prompt=a", "temperature=-1"], "temperature"),
        ("lm.generate", ["model=lm/model"], "prompt"),
    ],
)
def test_wrong_configuration_exits_2_says_what_and_leaves_nothing(road, module, arguments, said):
    target = road / "wrong"
    output = call(module, *arguments, f"out={target}", cwd=road, code=2)
    assert said in output
    assert "Traceback" not in output
    assert "reading pictures" not in output
    assert not target.exists()


def test_a_process_with_a_wrong_configuration_ends_with_2(road):
    assert "did you mean 'images.size'?" in run("vq.train", "imges.size=32", "out=wrong", cwd=road, code=2)


@pytest.mark.parametrize("choice", [["layout=flat", "head=linear"], ["head=depth_transformer"], ["lm=hf"]])
def test_every_layout_head_and_source_of_models_trains_and_draws(road, choice, tmp_path):
    if choice == ["lm=hf"]:
        make_plain_llama(tmp_path / "llama")
        choice = [*choice, f"lm.name={tmp_path / 'llama'}"]
    size = ["lm_size=smoke", "learner.budget.batches=3", "device=cpu"]
    call("lm.train", "store=store", *size, *choice, f"out={tmp_path}/run", cwd=road)
    assert (
        len(Pipeline.from_pretrained(tmp_path / "run/model").generate('a red circle, (not) "green"', n=2))
        == 2
    )


def test_a_store_made_anew_under_the_same_name_is_not_gone_on_with(road):
    images = ["images=folder", "images.source.path=mine", "images.holdout=0.2"]
    words = ["store=again", "lm_size=smoke", "learner.budget.batches=3", "device=cpu", "out=bound"]
    call("vq.encode", *images, "tokenizer=vq/tokenizer", "out=again", cwd=road)
    call("lm.train", *words, cwd=road)
    shutil.rmtree(road / "again")
    call("vq.encode", *images[:2], "images.holdout=0.4", "tokenizer=vq/tokenizer", "out=again", cwd=road)
    assert "was trained with store" in call("lm.train", *words, cwd=road, code=2)


def test_prompts_are_taken_as_they_are_typed(road):
    for prompt in ("7", "a, b (c) = {d}", 'it\'s "so" \\', "${x}", "日本語"):
        call("lm.generate", "model=lm/model", f"prompt={prompt}", "n=1", "out=typed", cwd=road)


def test_another_tokenizers_store_is_refused_with_both_fingerprints(road):
    images = ["images=folder", "images.source.path=mine", "images.size=16"]
    call("vq.train", *images, *SMALL, "seed=5", "out=vq2", cwd=road)
    first, second = (
        ImageTokenizer.from_pretrained(road / d / "tokenizer").fingerprint for d in ("vq", "vq2")
    )
    call("vq.encode", *images, "tokenizer=vq2/tokenizer", "out=store2", cwd=road)
    output = call("lm.evaluate", "model=lm/model", "store=store2", "out=wrong2", cwd=road, code=2)
    assert first in output
    assert second in output


def test_the_main_job_at_toy_size_leaves_everything_in_one_place(tmp_path):
    said = run("vqlm.demo", "size=smoke", "out=demo", cwd=tmp_path)
    demo = tmp_path / "demo"
    for name in ("samples.png", "reconstructions.png", "code_use.png", "losses.png"):
        with Image.open(demo / name) as picture:
            picture.load()
    metrics = json.loads((demo / "metrics.json").read_text())
    assert {"tokenizer", "language_model", "minutes"} <= metrics.keys()
    assert metrics["tokenizer"]["train"]["codes_dead"] == [0, 0]
    assert len(CodeStore.open(demo / "store")) == 252
    assert (
        ImageTokenizer.from_pretrained(demo / "tokenizer").fingerprint == metrics["tokenizer"]["fingerprint"]
    )
    assert len(Pipeline.from_pretrained(demo / "model").generate("a red circle", n=2)) == 2
    after = said[said.index("Try next") :]
    assert [command in after for command in ("lm-generate", "vq-train", "lm-train")] == [True] * 3
