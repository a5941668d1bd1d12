"""What the learner of tokenizers owes its parts: schedules, optimizers, the model that is kept, shapes."""

import pytest
import torch
from tiny import make_tokenizer

from vq.batches import NoAugment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import PictureSet
from vq.images import from_bytes
from vq.learner import TokenizerLearner
from vq.losses.adversarial import Adversary, PatchDiscriminator
from vq.losses.codes import Codes
from vq.losses.reconstruction import Laplacian, Squared, Wavelet
from vq.quantizers.residual import GradientQuantizer
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.hardware import Hardware
from vqlm.training import Budget, fit

CPU = Hardware(torch.device("cpu"), "fp32")
NAMES = [f"picture {i}" for i in range(12)]
PIXELS = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SET = PictureSet(PIXELS, NAMES, NAMES, NAMES)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def gradient_tokenizer():
    tiny = make_tokenizer()
    return ImageTokenizer(tiny.encoder, GradientQuantizer(4, 16), tiny.decoder, 16).train()


def learner(tokenizer=None, losses=None, reset=None, batches=4, **options):
    losses = losses or {"squared": Squared(), "commitment": Codes("commitment", 0.25)}
    return TokenizerLearner(
        tokenizer or make_tokenizer().train(),
        losses,
        reset or CodebookReset(window=1, stop=1.0),
        adam,
        Budget(batches=batches, warmup=0),
        **options,
    )


def run(trained, folder):
    fit(trained, lambda total: PictureBatches([SET], 4, 0, NoAugment(), total), folder, CPU, "test")
    return trained


def test_schedules_are_told_the_share_of_the_run(tmp_path):
    trained = learner(batches=4, continuous=0.3)
    told = []
    trained.model.quantizer.anneal = told.append
    run(trained, tmp_path)
    assert told == [0.5, 0.75]  # not before the codes are put in


def test_codes_settle_on_the_latents_that_pictures_are_encoded_to(tmp_path):
    """To the bit: in the memory layout of training they differ by 1e-6, and two codes of 65,536 fell out of use."""
    told = []

    class Told(CodebookReset):
        def finish(self, quantizer, latents):
            told.extend(latents)
            return super().finish(quantizer, latents)

    trained = run(learner(reset=Told(window=1, stop=1.0)), tmp_path / "run")
    trained.finish([SET], 6)
    trained.result.save_pretrained(tmp_path / "tokenizer")
    saved = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    latents = [saved.encoder(from_bytes(x)) for x in PIXELS.split(6)]
    assert all(torch.equal(a, b) for a, b in zip(told, latents, strict=True)) and told[0].is_contiguous()


class Watched(CodebookReset):
    """Remembers what it was given, and replaces every code after the last batch."""

    def observe(self, quantizer, z_BDhw, codes_BhwQ, progress, optimizer=None):
        self.optimizer = optimizer
        replaced = super().observe(quantizer, z_BDhw, codes_BhwQ, progress, optimizer)
        if progress < 0.75:
            return replaced
        quantizer.replace_codes(0, torch.arange(16), torch.full((16, 4), 5.0))
        return [16]

    def finish(self, quantizer, latents):
        self.finished = quantizer
        return [0]


def test_resets_meet_the_optimizer_and_the_kept_model(tmp_path):
    losses = {"squared": Squared(), "codebook": Codes("codebook")}
    trained = run(learner(gradient_tokenizer(), losses, Watched(), average=0.9), tmp_path)
    assert trained.reset.optimizer is trained.optimizer
    # an average of a code and of what replaced it would be neither
    assert torch.equal(trained.result.quantizer.codebook(0), torch.full((16, 4), 5.0))
    assert not torch.equal(trained.result.decoder.last_weight, trained.model.decoder.last_weight)
    assert trained.finish([SET], 4) == [0]
    assert trained.reset.finished is trained.result.quantizer


@pytest.mark.parametrize("loss", [Wavelet(levels=3), Laplacian(levels=3)])
def test_losses_are_asked_about_every_shape(loss):
    trained = learner(losses={"loss": loss})
    trained.check([(16, 16), (32, 24)])
    with pytest.raises(ConfigError, match="levels="):
        trained.check([(16, 16), (12, 4)])


def test_the_adversary_is_asked_about_every_shape():
    trained = learner(adversary=Adversary(PatchDiscriminator(8, 2), torch.optim.AdamW))
    trained.check([(16, 16)])
    with pytest.raises(ConfigError, match="sides of at least"):
        trained.check([(16, 16), (32, 8)])
