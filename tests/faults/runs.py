"""Runs to disturb: learners with everything in them that a resumed run could forget, and their batches."""

import os
from dataclasses import replace

import torch
from tiny import make_model, make_tokenizer
from torch.utils.data import Dataset

from lm.data import Pairs
from lm.learner import LMLearner
from lm.mixture import DocumentBatches, Mixture
from lm.objectives.next_token import NextToken
from lm.objectives.soft_codes import SoftCodes
from vq.batches import Augment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import PictureSet
from vq.learner import TokenizerLearner
from vq.losses.adversarial import Adversary, PatchDiscriminator
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vqlm.hardware import Hardware
from vqlm.training import Budget

CPU = Hardware(torch.device("cpu"), "fp32")
COUNT = 24


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def tokenizer_run(batches, seed=0):
    """EMA codebooks, re-initialised codes, an adversary that starts in the middle, averaged weights."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed).train()
    torch.manual_seed(seed)
    adversary = Adversary(PatchDiscriminator(8, 2), adam, start=0.3, ramp=0.3, decay=0.5)
    return TokenizerLearner(
        tokenizer,
        {"squared": Squared(), "commitment": Codes("commitment", 0.25)},
        CodebookReset(window=2),
        adam,
        Budget(batches=batches, warmup=2),
        adversary=adversary,
        average=0.5,
    )


def pictures(total):
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=random)
    names = [f"picture {i}" for i in range(COUNT)]
    return PictureBatches(PictureSet(pixels, names, names, names), 4, 0, Augment(), total)


def lm_run(batches, seed=0):
    """Codes that are drawn while the model is taught, averaged weights, layers that run again."""
    soft = SoftCodes(2.0)
    soft.look_at(torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0)))
    model = make_model(seed=seed)[0].train()
    torch.manual_seed(seed)
    budget = Budget(batches=batches, warmup=2)
    return LMLearner(model, NextToken(soft=soft), adam, budget, average=0.5, recompute=True)


MIXTURE = Mixture(0.4, 0.2, 0.1, 0.1, 0.1, 0.1, noise=0.1)


def documents(total):
    """Six tasks, packed."""
    form, random = make_model()[0].form, torch.Generator().manual_seed(0)
    names, concepts = [str(i) for i in range(COUNT)], [str(i // 3) for i in range(COUNT)]
    codes = torch.randint(0, 16, (COUNT, 2, 2, 2), generator=random)
    pairs = Pairs([(i, i + 1) for i in range(COUNT)], codes, names, names, concepts)
    texts = [[i, i + 1, i + 2] for i in range(20)]
    return DocumentBatches(pairs, form, MIXTURE, 4, None, 0, total, texts)


RUNS = {"tokenizer": (tokenizer_run, pictures), "language model": (lm_run, documents)}


class Disturbed(Dataset):
    """A run's batches; at those numbered `at`, what `happen(batch)` makes of them."""

    def __init__(self, batches, at, happen):
        self.batches, self.at, self.happen = batches, at, happen

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, n):
        batch = self.batches[n]
        return self.happen(batch) if n in self.at else batch


def sending(number):
    """What sends this process a signal as a batch is read."""

    def send(batch):
        os.kill(os.getpid(), number)
        return batch

    return send


def spoilt_pixels(value):
    def spoil(batch):
        x_BCHW = batch.x_BCHW.clone()
        x_BCHW[1, 0, 0, 0] = value
        return replace(batch, x_BCHW=x_BCHW)

    return spoil


def state(learner):
    """Every tensor and counter that a run goes on with; time apart."""
    tensors, data = learner.training_state()
    counters = {name: value for name, value in data["counters"].items() if name != "seconds"}
    return tensors, counters


def difference(one, other):
    """The largest difference between the tensors of two states, of any kind."""
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    return max(
        float((one[0][name].double() - other[0][name].double()).abs().max()) if one[0][name].numel() else 0.0
        for name in one[0]
    )
