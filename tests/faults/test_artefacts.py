"""C.19 and C.24: parts that do not belong together are refused, what an older version wrote is opened.

tests/golden/VERSION/ holds what that version wrote, and in expected.json what it read in it.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from faults.runs import pictures
from faults.test_saving import Noise
from tiny import make_model, make_tokenizer
from vector_quantize_pytorch import ResidualVQ

from lm.bundle import read_about
from lm.data import open_store
from lm.pipeline import Pipeline
from vq.codebook import CodebookReset
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.quantizers.residual import ResidualQuantizer
from vq.store import CodeStore, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.checkpoint import load_module
from vqlm.errors import ConfigError
from vqlm.training import Budget, Checkpoints

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if path.is_dir())


# --- C.19 -----------------------------------------------------------------------------------------------------


def tokenizer(size=16, depth=2, seed=0, image_size=16):
    tiny = make_tokenizer(seed)
    torch.manual_seed(seed)
    return ImageTokenizer(tiny.encoder, ResidualQuantizer(4, size, depth), tiny.decoder, image_size).eval()


def stored(folder, images):
    options = {"source": {"name": "noise"}, "shard_size": 5, "batch_size": 4, "progress": False}
    write_store(folder, images, Noise(), **options)
    return folder


class Pairing:
    """A bundle, its store, and strangers to put in place of their parts."""

    def __init__(self, folder):
        self.folder, self.images = folder, make_tokenizer()
        model, text = make_model()
        Pipeline(model, text, self.images).save_pretrained(folder / "bundle")

    def with_tokenizer(self, images):
        images.save_pretrained(self.folder / "bundle/vq")
        Pipeline.from_pretrained(self.folder / "bundle", device="cpu")

    def with_part(self, name, **form):
        """A file of another model, whose own files are whole."""
        model, text = make_model(**form)
        Pipeline(model, text, self.images).save_pretrained(self.folder / "other")
        shutil.copy(self.folder / "other" / name, self.folder / "bundle" / name)
        Pipeline.from_pretrained(self.folder / "bundle", device="cpu")

    def with_about(self, **changes):
        """multimodal.json as someone would write it by hand: without seal."""
        path = self.folder / "bundle/multimodal.json"
        told = {k: v for k, v in read_about(path.parent).items() if k not in ("seal", "files")}
        path.write_text(json.dumps({**told, **changes}))
        Pipeline.from_pretrained(self.folder / "bundle", device="cpu")

    def with_store(self, images):
        """What lm-evaluate does with a store that it is given."""
        pipe = Pipeline.from_pretrained(self.folder / "bundle", device="cpu")
        store = open_store(stored(self.folder / "store", images), pipe.model.form)
        store.check(pipe.images)

    def go_on_with(self, images):
        """vq-encode into a store that another tokenizer began."""
        stored(self.folder / "store", self.images)
        stored(self.folder / "store", images)

    def resume_on(self, identity):
        """lm-train in the folder of a run on another store."""
        learner = older_learner()
        Checkpoints(self.folder / "run", {"store": "0123"}).save(learner)
        Checkpoints(self.folder / "run", identity).resume(learner)


OTHER = {"seed": 3}
PAIRS = {
    "tokenizer with other weights": (lambda p: p.with_tokenizer(make_tokenizer(3)), "fingerprints"),
    "tokenizer with another K": (lambda p: p.with_tokenizer(tokenizer(32)), "fingerprints"),
    "tokenizer with another depth": (lambda p: p.with_tokenizer(tokenizer(16, 3)), "fingerprints"),
    "store of a tokenizer with other weights": (lambda p: p.with_store(make_tokenizer(3)), "fingerprints"),
    "store of another K": (lambda p: p.with_store(tokenizer(32)), "codebook_size 32.*16"),
    "store of another depth": (lambda p: p.with_store(tokenizer(16, 3)), "depth 3.*2"),
    "store begun by another tokenizer": (lambda p: p.go_on_with(make_tokenizer(3)), "fingerprint"),
    "head of another depth": (lambda p: p.with_part("head.safetensors", depth=3), "head.safetensors"),
    "weights of another language model": (lambda p: p.with_part("model.safetensors", **OTHER), "SHA-256"),
    "weights with fewer rows": (lambda p: p.with_part("model.safetensors", depth=1), "model"),
    "text tokenizer of another model": (
        lambda p: p.with_part("tokenizer.json", row_ends=True),
        "ids|SHA-256",
    ),
    "description of another layout": (lambda p: p.with_about(layout="flat"), "damaged|fit"),
    "description of other grids": (lambda p: p.with_about(grids=[[2, 2], [1, 4]]), "damaged"),
    "description with another fingerprint": (lambda p: p.with_about(fingerprint="0" * 16), "fingerprints"),
    "run on another store": (lambda p: p.resume_on({"store": "4567"}), "0123.*4567"),
}


def library_reads(tmp_path):
    """vector-quantize-pytorch: codes of one codebook decoded by another of the same size. Does anything say so?"""
    torch.manual_seed(0)
    one, other = (ResidualVQ(dim=4, codebook_size=16, num_quantizers=2) for _ in range(2))
    codes = one(torch.randn(1, 8, 4))[1]
    return "decoded silently" if other.get_output_from_indices(codes).shape == (1, 8, 4) else "refused"


def test_what_does_not_belong_together_is_refused(figure, tmp_path):
    for name, (join, told) in PAIRS.items():
        pairing = Pairing(tmp_path / name)
        with pytest.raises(ConfigError) as error:
            join(pairing)
        said = str(error.value)
        if told == "fingerprints":
            digits = [word.strip(",;.()'\"") for word in said.split()]
            found = {word for word in digits if len(word) == 16 and set(word) <= set("0123456789abcdef")}
            assert len(found) == 2, (name, said)
        else:
            assert re.search(told, said, re.DOTALL), (name, said)
    figure(
        "C.19",
        "parts of different models put together",
        "fingerprints, shapes and sums are compared at loading; the error tells both",
        f"{len(PAIRS)}/{len(PAIRS)} kinds refused",
        {"vector-quantize-pytorch, codes of other weights": library_reads(tmp_path)},
    )


# --- C.24 -----------------------------------------------------------------------------------------------------


def older_learner():
    return TokenizerLearner(
        load_module(GOLDEN[0] / "bundle/vq", ImageTokenizer).train(),
        {"squared": Squared(), "commitment": Codes("commitment", 0.25)},
        CodebookReset(window=2),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        Budget(batches=8, warmup=2),
    )


def opened(folder, scratch):
    """Everything that a version wrote, read as it read it."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    pipe = Pipeline.from_pretrained(folder / "bundle", device="cpu")
    assert pipe.images.fingerprint == expected["fingerprint"]
    x_BCHW = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    assert pipe.images.encode(x_BCHW).tolist() == expected["codes"]
    greedy = pipe.sampling_with(temperature=0.0, guidance=1.0)
    drawn = pipe.draw_codes("a red circle", 2, greedy, 0)
    assert [each.codes_hwQ.tolist() for each in drawn] == expected["drawn"]
    store = CodeStore.open(folder / "store", verify=True)
    rows = [[row.id, row.caption, row.codes_hwQ.tolist()] for row in store]
    assert rows == expected["store"]
    store.check(pipe.images)
    shutil.copytree(folder / "checkpoints", scratch)
    learner = older_learner()
    assert Checkpoints(scratch, {"data": "made"}).resume(learner)
    for name in ("batches_seen", "samples_seen"):
        assert getattr(learner, name) == expected[name]
    book = learner.model.quantizer.codebook(0).double()
    assert float(book.sum()) == pytest.approx(expected["codebook_sum"])
    learner.manual_backward = lambda loss: loss.backward()
    learner.training_step(pictures(1)[0], 0)  # it goes on
    assert learner.batches_seen == expected["batches_seen"] + 1


def test_what_older_versions_wrote_is_opened(figure, tmp_path):
    for folder in GOLDEN:
        opened(folder, tmp_path / folder.name)
    path = tmp_path / "bundle"
    shutil.copytree(GOLDEN[0] / "bundle", path)
    told = read_about(path)
    (path / "multimodal.json").write_text(json.dumps({**told, "format": 99}))
    with pytest.raises(ConfigError, match=r"format 99.*this version of vqlm reads"):
        Pipeline.from_pretrained(path)
    figure(
        "C.24",
        "tokenizers, stores, bundles and checkpoints of older versions",
        "formats are numbered; each is read as its version read it, or the error says which is read",
        f"{len(GOLDEN)}/{len(GOLDEN)} versions opened ({', '.join(folder.name for folder in GOLDEN)})",
    )
