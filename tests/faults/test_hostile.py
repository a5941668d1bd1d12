"""C.25: models, checkpoints, stores and configurations that would run code, read elsewhere, or take all memory.

Every public way to open such a thing is given every kind that it could meet. What an attacker can seal anew is sealed
anew: a checksum is no protection from whoever writes it. The proof is that no canary sings.
"""

import contextlib
import io
import json
import pickle
import shutil
import sys
import tarfile
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count as numbers
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from faults import hostile_files
from faults.hostile_files import LIES, SUFFIXES, YAML_TAGS, Canaries, changed, code, long, nodes, pickles
from faults.runs import tokenizer_run
from faults.test_artefacts import stored
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import make_model, make_plain_llama, make_tokenizer, write_gguf
from transformers import AutoProcessor

from lm.bundle import read_about, write_about
from lm.evaluate import open_base
from lm.logits_processor import GrammarProcessor
from lm.pipeline import Pipeline, images_of
from lm.processor import VqlmProcessor
from lm.source import Gguf, HuggingFace, Pictures, load
from vq import emoji
from vq.archives import ParquetFiles, Tars
from vq.data import HubImages, ImageData, ImageFolder
from vq.importers import import_tokenizer
from vq.losses.perceptual import load_lpips
from vq.scorer import Aligner, Scorer
from vq.store import CodeStore
from vq.text import PretrainedText, WordEncoder
from vq.tokenizer import ImageTokenizer
from vq.train import main as vq_train
from vqlm.command import check, check_run_folder
from vqlm.errors import ConfigError
from vqlm.files import sealed, sha256
from vqlm.schema import build
from vqlm.training import Checkpoints

HAS_GGUF = find_spec("gguf") and find_spec("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


# --- doors ------------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """One sound thing of each kind; `new` copies it for an attack."""

    folder: Path
    learner: object

    def __post_init__(self):
        self.numbers = numbers()

    def new(self, name=""):
        target = self.folder / "attacks" / f"{next(self.numbers):05d}"
        target.parent.mkdir(exist_ok=True)
        if name:
            shutil.copytree(self.folder / name, target)
        else:
            target.mkdir()
        return target


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    images = make_tokenizer()
    images.save_pretrained(folder / "tokenizer")
    model, text = make_model()
    Pipeline(model, text, images).save_pretrained(folder / "bundle")
    model, text = make_model("linear", "flat")
    Pipeline(model, text, images).save_pretrained(folder / "plain")
    make_plain_llama(folder / "llama")
    stored(folder / "store", images)
    learner = tokenizer_run(4)
    Checkpoints(folder / "run").save(learner)
    Scorer(Aligner(4, WordEncoder(8, 64)), images.fingerprint).save_pretrained(folder / "scorer")
    save_file({"features.0.weight": torch.zeros(1)}, str(folder / "vgg.safetensors"))
    return Models(folder, learner)


def resealed_module(folder):
    """config.json of our own folders, as whoever changed the weights would write it."""
    told = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in told.items() if k not in ("seal", "sha256")}
    (folder / "config.json").write_text(
        json.dumps(sealed({**kept, "sha256": sha256(folder / "model.safetensors")}))
    )


def resealed_bundle(folder):
    write_about(folder, read_about(folder))


def resume(models, folder):
    """Going on with a run: what is no checkpoint is named and passed over."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Checkpoints(folder).resume(models.learner)
    assert found is None
    raise ConfigError(" ".join(str(each.message) for each in told))


def at_import(models, data, suffix):
    path = models.new() / f"vq{suffix}"
    path.write_bytes(data)
    return path.name, lambda: import_tokenizer("taming", str(path))


def at_import_folder(models, data, suffix):
    folder = models.new()
    name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / name).write_bytes(data)
    return name, lambda: import_tokenizer("llamagen", str(folder))


def at_import_shards(models, data, suffix):
    folder = models.new()
    (folder / f"part{suffix}").write_bytes(data)
    names = ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_in.weight")
    changed(folder / "model.bin.index.json", weight_map=dict.fromkeys(names, f"part{suffix}"))
    return "model.bin.index.json", lambda: import_tokenizer("taming", str(folder))


def at_tokenizer(models, data, suffix):
    folder = models.new("tokenizer")
    (folder / "model.safetensors").write_bytes(data)
    resealed_module(folder)
    return "model.safetensors", lambda: ImageTokenizer.from_pretrained(folder)


def at_scorer(models, data, suffix):
    folder = models.new("scorer")
    (folder / "model.safetensors").write_bytes(data)
    resealed_module(folder)
    return "model.safetensors", lambda: Scorer.from_pretrained(folder, make_tokenizer())


def in_bundle(name):
    def at_bundle(models, data, suffix):
        folder = models.new("bundle")
        (folder / name).write_bytes(data)
        resealed_bundle(folder)
        return folder.name, lambda: Pipeline.from_pretrained(folder, "cpu")

    return at_bundle


def at_bundle_without_safetensors(models, data, suffix):
    folder = models.new("bundle")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    resealed_bundle(folder)
    return folder.name, lambda: Pipeline.from_pretrained(folder, "cpu")


def at_store_tokenizer(models, data, suffix):
    folder = models.new("store")
    (folder / "tokenizer/model.safetensors").write_bytes(data)
    told = json.loads((folder / "manifest.json").read_text())
    told["files"]["tokenizer/model.safetensors"] = sha256(folder / "tokenizer/model.safetensors")
    changed(folder / "manifest.json", **told)
    return "model.safetensors", lambda: images_of(CodeStore.open(folder))


def at_store_shard(models, data, suffix):
    folder, name = models.new("store"), "shard-00000.parquet"
    (folder / name).write_bytes(data)
    told = json.loads((folder / "manifest.json").read_text())
    told["shards"][0].update(bytes=len(data), sha256=sha256(folder / name))
    changed(folder / "manifest.json", **told)
    return name, lambda: CodeStore.open(folder)


def at_checkpoint(models, data, suffix):
    folder = models.new("run")
    (at,) = folder.iterdir()
    (at / "state.safetensors").write_bytes(data)
    told = json.loads((at / "state.json").read_text())
    kept = {k: v for k, v in told.items() if k != "seal"}
    sums = {**kept, "sha256": sha256(at / "state.safetensors")}
    (at / "state.json").write_text(json.dumps(sealed(sums)))
    return at.name, lambda: resume(models, folder)


def llama(models, data, name):
    folder = models.new("llama")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    return folder


def built(source):
    return source.build([], Pictures(16, 2), 0)


def at_hugging_face(models, data, suffix):
    name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    folder = llama(models, data, name)
    return folder.name, lambda: built(HuggingFace(str(folder)))


def at_base(models, data, suffix):
    folder = llama(models, data, "pytorch_model.bin")
    return folder.name, lambda: open_base(str(folder), None, [], 0)


def at_gguf(models, data, suffix):
    path = models.new() / "m.gguf"
    path.write_bytes(data)
    return path.name, lambda: built(Gguf(str(path)))


def at_text_encoder(models, data, suffix):
    folder = llama(models, data, "pytorch_model.bin")
    return folder.name, lambda: PretrainedText(str(folder))


def at_lpips(models, data, suffix):
    path = models.new() / f"vgg{suffix}"
    path.write_bytes(data)
    return path.name, lambda: load_lpips("vgg", str(path))


DOORS = {
    "vq-import, a file": at_import,
    "vq-import, a folder": at_import_folder,
    "vq-import, shards": at_import_shards,
    "image tokenizer": at_tokenizer,
    "scorer": at_scorer,
    "bundle, model": in_bundle("model.safetensors"),
    "bundle, head": in_bundle("head.safetensors"),
    "bundle, tokenizer": in_bundle("vq/model.safetensors"),
    "bundle, pickle alone": at_bundle_without_safetensors,
    "store, tokenizer": at_store_tokenizer,
    "store, shard": at_store_shard,
    "resume": at_checkpoint,
    "lm=hf": at_hugging_face,
    "lm-evaluate, base": at_base,
    "lm=gguf": at_gguf,
    "text encoder": at_text_encoder,
    "LPIPS": at_lpips,
}


class Tally:
    """What became of each attack, by kind."""

    def __init__(self, canaries):
        self.canaries, self.refused, self.harmless, self.wrong = canaries, Counter(), Counter(), []

    def refuse(self, name, file, attempt, *given):
        """It must be a ConfigError that names the file."""
        if self._taken(name, file, attempt, *given):
            self.wrong.append((name, "was taken", file))
        self.listen(name)

    def ignore(self, name, attempt, *given):
        """What asks for code is passed over, the rest is loaded."""
        try:
            attempt(*given)
            self.harmless[name] += 1
        except BaseException as error:
            self.wrong.append((name, "was not loaded", repr(error)[:300]))
        self.listen(name)

    def either(self, name, file, attempt, *given):
        """Refused, or passed over: which of both depends on how far a library looks."""
        if self._taken(name, file, attempt, *given):
            self.harmless[name] += 1
        self.listen(name)

    def _taken(self, name, file, attempt, *given):
        """Whether there was no error; one that is no ConfigError, or does not name the file, is wrong."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                attempt(*given)
            return True
        except ConfigError as error:
            self.refused[name] += 1
            if file not in str(error):
                self.wrong.append((name, f"{file} is not named", str(error)[:300]))
        except BaseException as error:
            self.wrong.append((name, "not a ConfigError", repr(error)[:300]))
        return False

    def listen(self, name):
        if sung := self.canaries.sung():
            self.wrong.append((name, "EXECUTED", sung))
            self.canaries.clear()

    def told(self):
        refused, harmless = self.refused.total(), self.harmless.total()
        more = f", {harmless} loaded as if it were not there" if harmless else ""
        return f"0 executed of {refused + harmless}; {refused} refused, each with the file named{more}"

    def check(self):
        assert not self.wrong, "\n".join(map(str, self.wrong))


@pytest.fixture
def canaries(tmp_path):
    return Canaries(tmp_path / "canaries")


def executed(canaries, attempts):
    """How many of a library's calls run what they were given."""
    sung = 0
    for attempt in attempts:
        canaries.clear()
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            attempt()
        sung += bool(canaries.sung())
    canaries.clear()
    return f"{sung} executed of {len(attempts)}"


def test_pickles_under_every_name(count, figure, models, canaries, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made, tally, turn = pickles(canaries), Tally(canaries), 0
    for number, (door, at) in enumerate(DOORS.items()):
        for payload, data in made[number % count(7, 1) :: count(13, 1)]:
            suffix = SUFFIXES[turn % len(SUFFIXES)]
            turn += 1
            file, attempt = at(models, data, suffix)
            tally.refuse(f"{door}: {payload}{suffix}", file, attempt)
    tally.check()
    paths = [tmp_path / f"{n}.pt" for n in range(len(made))]
    for path, (_, data) in zip(paths, made, strict=True):
        path.write_bytes(data)
    pickled = [data for name, data in made if "pickle" in name]
    figure(
        "C.25",
        f"pickles that run code: {len(hostile_files.GADGETS)} calls in {len(hostile_files.FORMATS)} formats",
        "weights are safetensors, or read as weights only; names decide nothing",
        f"{tally.told()} ({len(DOORS)} ways to open them)",
        {
            "pickle": executed(canaries, [lambda data=data: pickle.loads(data) for data in pickled]),
            "torch.load, weights_only=False": executed(
                canaries, [lambda path=path: torch.load(path, weights_only=False) for path in paths]
            ),
            "numpy.load, allow_pickle": executed(
                canaries, [lambda path=path: np.load(path, allow_pickle=True)["weight"] for path in paths]
            ),
        },
    )


def test_safetensors_that_lie(count, figure, models, canaries, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tally = Tally(canaries)
    doors = {name: at for name, at in DOORS.items() if name not in ("lm=gguf", "store, shard")}
    lies = list(LIES.items())
    for number, (door, at) in enumerate(doors.items()):
        for lie, make in lies[number % count(5, 1) :: count(5, 1)]:
            if "101 MB" in lie and not count(0, 1):
                continue
            file, attempt = at(models, make(), ".safetensors")
            tally.refuse(f"{door}: {lie}", file, attempt)
    tally.check()
    figure(
        "C.25",
        f"safetensors that lie: {len(LIES)} kinds of headers, offsets and shapes",
        "the library checks headers and offsets; names and shapes are compared with the description",
        f"{tally.told()} ({len(doors)} ways to open them)",
    )


# --- folders of transformers' files -----------------------------------------------------------------------------------

AUTO = {
    "AutoConfig": "modeling_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"],
    "AutoProcessor": "modeling_evil.Evil",
}


def unknown_architecture(folder, canary):
    (folder / "modeling_evil.py").write_text(code(canary))
    changed(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=AUTO)


def known_architecture(folder, canary):
    (folder / "modeling_evil.py").write_text(code(canary))
    changed(folder / "config.json", auto_map=AUTO, trust_remote_code=True)


def text_tokenizer(folder, canary):
    (folder / "modeling_evil.py").write_text(code(canary))
    more = {"tokenizer_class": "EvilTokenizer", "trust_remote_code": True}
    changed(folder / "tokenizer_config.json", auto_map=AUTO, **more)


def processor(folder, canary):
    (folder / "modeling_evil.py").write_text(code(canary))
    for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        changed(folder / name, auto_map=AUTO, custom_generate="modeling_evil", trust_remote_code=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code(canary))


def template(number):
    def write(folder, canary):
        (folder / "chat_template.jinja").write_text(hostile_files.JINJA[number].format(canary))

    return write


def kernel(key):
    return lambda folder, canary: changed(folder / "config.json", **{key: "evil/kernel"})


def adapter(folder, canary):
    told = {"peft_type": "LORA", "base_model_name_or_path": "../elsewhere", "target_modules": ["q_proj"]}
    changed(folder / "adapter_config.json", **told, megatron_config={"a": 1}, megatron_core="hostile_module")
    trap = hostile_files.Trap(hostile_files.GADGETS["os.system"](canary))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(trap))


def shards_elsewhere(folder, canary):
    weights = folder.parent / "secret.safetensors"
    shutil.copy(folder / "model.safetensors", weights)
    with safe_open(str(weights), "pt") as file:
        names = list(file.keys())
    (folder / "model.safetensors").unlink()
    changed(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names, f"../{weights.name}"))


def quantized(folder, canary):
    changed(folder / "config.json", quantization_config={"quant_method": "evil", "modules": "hostile_module"})


REFUSED = {  # by every door that reads the language model; the file that is named
    "an architecture with code": (unknown_architecture, ""),
    "attention from the hub": (kernel("attn_implementation"), "config.json"),
    "attention from the hub, _internal": (kernel("_attn_implementation_internal"), "config.json"),
    "experts from the hub": (kernel("experts_implementation"), "config.json"),
    "an adapter": (adapter, "adapter_config.json"),
    "shards elsewhere": (shards_elsewhere, "model.safetensors.index.json"),
    "16 GB of tokenizer.json": (lambda folder, _: long(folder / "tokenizer.json"), "tokenizer.json"),
    "16 GB of config.json": (lambda folder, _: long(folder / "config.json"), "config.json"),
    "16 GB of an index": (lambda folder, _: long(folder / "x.index.json"), "x.index.json"),
    "tokenizer.json, nested": (
        lambda folder, _: (folder / "tokenizer.json").write_text("[" * 200_000),
        "",
    ),
    "config.json, nested": (lambda folder, _: (folder / "config.json").write_text("[" * 200_000), ""),
}
PASSED_OVER = {
    "a known architecture with code": known_architecture,
    "a text tokenizer with code": text_tokenizer,
    "a processor with code": processor,
    "an unknown quantization": quantized,
} | {f"chat template {n}": template(n) for n in range(len(hostile_files.JINJA))}
OPENED = {  # name → kind of folder, how it is opened, whether the language model is read
    "lm=hf": ("llama", lambda at: built(HuggingFace(str(at))), True),
    "lm-evaluate, base": ("llama", lambda at: open_base(str(at), None, [], 0), True),
    "text encoder": ("llama", lambda at: PretrainedText(str(at)), True),
    "bundle": ("bundle", lambda at: Pipeline.from_pretrained(at, "cpu"), True),
    "processor": ("plain", lambda at: talk(VqlmProcessor.from_pretrained(at)), False),
    "AutoProcessor": ("plain", lambda at: AutoProcessor.from_pretrained(at), False),
    "grammar": ("plain", lambda at: GrammarProcessor.from_pretrained(at), False),
}


def talk(processor):
    """A chat, in which a template would be rendered."""
    processor.apply_chat_template([{"role": "user", "content": "a red circle"}])


def attacked(models, kind, write, canary):
    folder = models.new(kind)
    write(folder, canary)
    if kind != "llama":
        with contextlib.suppress(ConfigError):
            write_about(folder, read_about(folder))
    return folder


def by_transformers(models, canaries, write, **options):
    """Plain transformers on the same folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = attacked(models, "llama", write, canaries.new())

    def attempt():
        with contextlib.suppress(Exception):
            AutoTokenizer.from_pretrained(folder, **options)
        AutoModelForCausalLM.from_pretrained(folder, **options)

    return attempt


def thinned(attacks, start, step):
    """Those with code always, of the others each `step`-th."""
    code = [each for each in attacks.items() if "code" in each[0]]
    others = [each for each in attacks.items() if "code" not in each[0]]
    return code + others[start % step :: step]


def test_model_folders_that_ask_for_more(count, figure, models, canaries, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks whether to run code is told to
    (tmp_path / "hostile_module.py").write_text(code(canaries.new()))
    monkeypatch.syspath_prepend(str(tmp_path))
    tally, step = Tally(canaries), count(3, 1)
    for number, (door, (kind, attempt, whole)) in enumerate(OPENED.items()):
        for name, (write, file) in thinned(REFUSED, number, step):
            if door == "AutoProcessor" and "16 GB" in name:
                continue  # transformers reads them before it asks us
            folder = attacked(models, kind, write, canaries.new())
            if whole:
                tally.refuse(f"{door}: {name}", file or folder.name, attempt, folder)
            else:
                tally.either(f"{door}: {name}", folder.name, attempt, folder)
        for name, write in thinned(PASSED_OVER, number, step):
            folder = attacked(models, kind, write, canaries.new())
            tally.either(f"{door}: {name}", folder.name, attempt, folder)
    for write in (text_tokenizer, unknown_architecture, adapter) if HAS_GGUF else ():
        folder = models.new()  # a sound file, and what lies beside it
        lm, tokenizer = load(str(models.folder / "llama"))
        write_gguf(folder / "m.gguf", lm, tokenizer)
        write(folder, canaries.new())
        tally.either("lm=gguf", "m.gguf", built, Gguf(str(folder / "m.gguf")))
    tally.check()
    codes = (unknown_architecture, known_architecture, text_tokenizer)
    trusting = [by_transformers(models, canaries, write, trust_remote_code=True) for write in codes]
    asking = [by_transformers(models, canaries, write) for write in codes]
    figure(
        "C.25",
        f"model folders that ask for code, kernels, adapters, files elsewhere, or are endless: "
        f"{len(REFUSED) + len(PASSED_OVER)} kinds",
        "no code beside a model is run or asked about; what leads out of the folder or has no end is refused",
        f"{tally.told()} ({len(OPENED) + 1} ways to open them)",
        {
            "transformers, trust_remote_code=True": executed(canaries, trusting),
            "transformers, told y at its question": executed(canaries, asking),
        },
    )


# --- configurations ---------------------------------------------------------------------------------------------------


def function(images: Any) -> None: ...


def called(main, words, monkeypatch):
    """A command: exit code 2 is a ConfigError that was told."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            main()
    except SystemExit as stop:
        assert stop.code == 2, told.getvalue()[-300:]
        raise ConfigError(told.getvalue()) from None


def in_tokenizer(models, node):
    """In place of the model, of a part of it, and as the type of a part: config.json."""
    for place in ("model", "encoder", "type"):
        folder = models.new("tokenizer")
        told = json.loads((folder / "config.json").read_text())
        if place == "model":
            told["model"] = node
        elif place == "encoder":
            told["model"]["encoder"] = node
        else:
            told["model"]["encoder"]["type"] = node["_target_"]
        kept = {k: v for k, v in told.items() if k != "seal"}
        (folder / "config.json").write_text(json.dumps(sealed(kept)))
        yield folder


def configured(target, node, models, monkeypatch, commands):
    """(door, what the error names, attempt) for each place where a node could be read back."""
    yield "check", "_target_", lambda: check({"images": node}, function)
    yield "build", "_target_", lambda: build({"images": [node]})
    for folder in in_tokenizer(models, node):
        yield "image tokenizer", "config.json", lambda at=folder: ImageTokenizer.from_pretrained(at)
    for place in ("head", "sampling", "vocabulary"):
        folder = models.new("bundle")
        changed(folder / "multimodal.json", **{place: node})
        resealed_bundle(folder)
        name = "multimodal.json"
        yield f"bundle, {place}", name, lambda at=folder: Pipeline.from_pretrained(at, "cpu")
    folder = models.new("scorer")
    told = json.loads((folder / "config.json").read_text())
    told["model"]["judge"] = node
    (folder / "config.json").write_text(json.dumps(told))
    yield "scorer", "config.json", lambda: Scorer.from_pretrained(folder, make_tokenizer())
    run = models.new()
    (run / "config.yaml").write_text(yaml.safe_dump({"images": node, "resume": "auto", "out": "x"}))
    given = {"images": {}, "resume": "auto", "out": str(run)}
    yield "run folder", run.name, lambda: check_run_folder(str(run), given)
    if commands:
        group = models.new()
        (group / "images").mkdir()
        (group / "images/evil.yaml").write_text(yaml.safe_dump(node))
        words = ["images=evil", f"out={group / 'run'}"]
        at = ["--config-dir", str(group)]
        yield "--config-dir", target, lambda: called(vq_train, [*at, *words], monkeypatch)
        words = [f"images.source._target_={target}", f"out={group / 'run'}"]
        yield "command line", target, lambda: called(vq_train, words, monkeypatch)


def instantiated(canaries, folder):
    """What hydra makes of those nodes; two are left out, which compile and start processes."""
    import hydra

    made = nodes(canaries, folder)[:12]
    left_out = ("torch.utils.cpp_extension.load", "torch.distributed.run.main")
    return [
        lambda node=node: hydra.utils.instantiate(node) for target, node in made if target not in left_out
    ]


def test_configurations_that_name_code(count, figure, models, canaries, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_module.py").write_text(code(canaries.new()) + "def make(*_, **__): return 0\n")
    tally, places = Tally(canaries), set()
    for number, (target, node) in enumerate(nodes(canaries, tmp_path / "nodes")[:: count(7, 1)]):
        commands = number < count(1, 100)
        for door, file, attempt in configured(target, node, models, monkeypatch, commands):
            tally.refuse(f"{door}: {target}", file, attempt)
            places.add(door)
    for tag in YAML_TAGS:
        run = models.new()
        (run / "config.yaml").write_text(f"images: {tag.format(canaries.new())}\nout: x\n")
        tally.refuse(f"run folder: {tag}", "config.yaml", check_run_folder, str(run), {"out": ""})
        (run / "images").mkdir()
        shutil.copy(run / "config.yaml", run / "images/evil.yaml")
        words = ["--config-dir", str(run), "images=evil", f"out={run / 'run'}"]
        if count(0, 1):
            tally.refuse(f"--config-dir: {tag}", "python/", called, vq_train, words, monkeypatch)
    instantiator = {"_instantiator": "hostile_module.make", "_class_path": "hostile_module.make"}
    lightning = models.new() / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "hyper_parameters": instantiator}, lightning)
    tally.refuse("_instantiator: vq-import", "last.ckpt", lambda: import_tokenizer("taming", str(lightning)))
    for name in ("hyper_parameters", "_instantiator", "_target_"):
        folder = models.new("run")
        (at,) = folder.iterdir()
        told = {**json.loads((at / "state.json").read_text()), name: instantiator}
        kept = {k: v for k, v in told.items() if k != "seal"}
        (at / "state.json").write_text(json.dumps(sealed(kept)))
        tally.ignore(f"{name}: resume", Checkpoints(folder).resume, models.learner)
    tally.check()
    attempts = instantiated(canaries, tmp_path / "others")
    tags = [lambda tag=tag: yaml.unsafe_load(tag.format(canaries.new())) for tag in YAML_TAGS]
    figure(
        "C.25",
        "configurations that name code: 12 calls that hydra allows, 4 that it does not, YAML tags, _instantiator",
        "classes of this project and of torch.nn and torch.optim alone can be named; a saved model names declared ones",
        f"{tally.told()} ({len(places) + 3} places where they are read)",
        {
            "hydra.utils.instantiate": executed(canaries, attempts),
            "yaml.unsafe_load": executed(canaries, tags),
        },
    )


# --- archives and names -----------------------------------------------------------------------------------------------


def slips(out):
    """Members of a tar that lead out of the folder it is unpacked in: name → members (TarInfo, bytes)."""

    def file(name):
        member = tarfile.TarInfo(name)
        member.size = 1
        return member, b"x"

    def link(name, to, kind=tarfile.SYMTYPE):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, to
        return member, b""

    up = "../" * 12
    return {
        "../": [file(f"package/wanted/{up}{out('a')}")],
        "through a link": [
            link("package/wanted/l", str(out("").parent)),
            file(f"package/wanted/l/{out('b').name}"),
        ],
        "through a relative link": [
            link("package/wanted/l", f"{up}{out('').parent}"),
            file(f"package/wanted/l/{out('c').name}"),
        ],
        "a hard link": [link("package/wanted/l", f"{up}etc/hostname", tarfile.LNKTYPE)],
        "a device": [link("package/wanted/d", "", tarfile.CHRTYPE)],
        "an absolute name": [file(str(out("d")))],
    }


def packed(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def unpacked_by_fetch(archive, folder, monkeypatch):
    """What `vq.emoji` does with a package of npm, were its content the one that is expected."""
    script = folder / "npm"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{archive}" "$last/some-1.0.0.tgz"\n')
    script.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(script))
    package = emoji.Package("@a/some", "1.0.0", sha256(archive), ("wanted",))
    return lambda: emoji.fetch(package, folder / "cache")


def extension_pickle(path, trap):
    """Parquet whose column says that it is a pickled Python type (CVE-2023-47248)."""
    told = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(trap, 0),
    }
    column = pa.field("image", pa.binary(), metadata=told)
    table = pa.Table.from_arrays([pa.array([b"x"], pa.binary())], schema=pa.schema([column]))
    pq.write_table(table, path)
    return path


def lead_out(models, tmp_path):
    """(door, file that is named, attempt): names in files of ours that lead elsewhere."""
    for name in ("../secret.png", "/etc/hostname", "a/../../secret.png"):
        folder = models.new()
        row = json.dumps({"file_name": name, "text": ""})
        (folder / "metadata.jsonl").write_text(row + "\n")
        yield "metadata.jsonl", "metadata.jsonl", lambda at=folder: ImageFolder(at).pictures()
    for name in ("../secret.json", "/etc/hostname", "tokenizer/../../secret"):
        folder = models.new("store")
        told = json.loads((folder / "manifest.json").read_text())
        changed(folder / "manifest.json", files={**told["files"], name: "0" * 64})
        yield "manifest.json, files", "manifest.json", lambda at=folder: CodeStore.open(at)
        folder = models.new("store")
        told["shards"][0]["name"] = name
        changed(folder / "manifest.json", **told)
        yield "manifest.json, shards", "manifest.json", lambda at=folder: CodeStore.open(at)
    for name in ("../secret.bin", "/etc/hostname"):
        folder = models.new()
        names = ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_in.weight")
        changed(folder / "x.bin.index.json", weight_map=dict.fromkeys(names, name))
        yield "an index of shards", "x.bin.index.json", lambda at=folder: import_tokenizer("taming", str(at))
    for kind, open_it in (
        ("tokenizer", ImageTokenizer.from_pretrained),
        ("bundle", lambda at: Pipeline.from_pretrained(at, "cpu")),
        ("scorer", lambda at: Scorer.from_pretrained(at, make_tokenizer())),
        ("store", CodeStore.open),
    ):
        file = {"bundle": "multimodal.json", "store": "manifest.json"}.get(kind, "config.json")
        for data in ("[" * 200_000, "null", "[1]", '"x"', "\ud800"):
            folder = models.new(kind)
            (folder / file).write_bytes(data.encode("utf-8", "surrogatepass"))
            yield f"{file}: {data[:4]}", file, lambda at=folder, o=open_it: o(at)
        if kind != "store":
            folder = models.new(kind)
            long(folder / file)
            yield f"{file}: 16 GB", file, lambda at=folder, o=open_it: o(at)


def test_archives_and_names_that_lead_out(count, figure, models, canaries, monkeypatch, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    tally = Tally(canaries)
    kinds = slips(lambda name: Path(canaries.folder, name or "x"))
    for number, (name, members) in enumerate(kinds.items()):
        folder = tmp_path / f"npm-{number}"
        folder.mkdir()
        archive = packed(folder / "ready.tgz", members)
        tally.either(f"npm: {name}", "@a/some", unpacked_by_fetch(archive, folder, monkeypatch))
        tar = packed(folder / "x.tar", members)
        tally.ignore(f"tars: {name}", lambda at=tar: list(Tars(str(at)).read("x.tar")))
    trap = hostile_files.Trap(hostile_files.GADGETS["os.system"](canaries.new()))
    column = extension_pickle(tmp_path / "pictures.parquet", trap)
    source = ParquetFiles(str(column), text_column=None)
    tally.ignore("Parquet: a pickled type", lambda: list(source.read("pictures.parquet")))
    tally.either("store: a pickled type", *at_store_shard(models, column.read_bytes(), ""))
    objects = packed_objects(tmp_path, trap)
    hub = HubImages(str(objects), "npz", None)
    tally.either("datasets: a tar of pickled arrays", "hub", ImageData(hub, 16).setup)
    for door, file, attempt in lead_out(models, tmp_path):
        tally.refuse(door, file, attempt)
    tally.check()

    def unpack(members, number):
        archive = packed(tmp_path / f"{number}.tgz", members)
        return lambda: tarfile.open(archive).extractall(tmp_path / f"u{number}", filter="fully_trusted")

    figure(
        "C.25",
        f"archives and names that lead out of their folder ({len(kinds)} kinds of tars), JSON nested or without end",
        "members of tars are read and not unpacked, or unpacked by Python's data filter; names are compared with the "
        "folder; JSON is read up to 128 MB",
        tally.told().replace("executed", "executed or written outside"),
        {
            "tarfile, fully_trusted": executed(
                canaries, [unpack(members, n) for n, members in enumerate(kinds.values())]
            ).replace("executed", "written outside")
        },
    )


def packed_objects(folder, trap):
    """A folder with a tar in the manner of webdataset, of arrays of objects."""
    (folder / "hub").mkdir()
    member, data = tarfile.TarInfo("0.npz"), hostile_files.objects(trap)
    member.size = len(data)
    packed(folder / "hub/train.tar", [(member, data)])
    return folder / "hub"
