# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training both models, and watching them
#
# The whole road in one notebook, from Python: drawn shapes → an image tokenizer → a store of codes → a language model
# that draws. Both models are tiny and learn for about half a minute each. The curves grow while you look, and every
# so often the models show what they can do by then.
#
# The commands `vq-train`, `vq-encode` and `lm-train` do the same with larger models, checkpoints and measurements
# ([`vq/train.py`](../vq/train.py), [`lm/train.py`](../lm/train.py)).

# %%
import functools
import io
import math
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import lightning as L
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from lm.data import read_pairs
from lm.decoding import Sampling
from lm.heads.layered import LayeredHead
from lm.learner import LMLearner
from lm.metrics import losses
from lm.mixture import DocumentBatches, Mixture
from lm.objectives.next_token import NextToken
from lm.pipeline import Pipeline, images_of, pictures_of
from lm.sequence import Stacked
from lm.source import Scratch
from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.batches import NoAugment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import ImageData, Picture, PictureSet
from vq.images import contact_sheet, from_bytes, to_image
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.metrics import CodeUse, psnr
from vq.pieces import StreamedPictures
from vq.quantizers.residual import ResidualQuantizer
from vq.shapes import Shapes
from vq.store import CodeStore, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.hardware import detect
from vqlm.training import Budget, fit

scratch = tempfile.TemporaryDirectory()  # removed with this notebook's kernel
hardware = detect("cpu", "fp32")  # so small that a GPU would not be faster

# %% [markdown]
# ## Pictures
#
# 2 sizes × 7 colours × 3 shapes × 2 places make 84 pictures of 32×32 pixels, each with a caption. About one caption in
# ten is *held out*: never trained on, so that we can tell learning from remembering. A source is anything that has a
# name and pictures ([`vq/data.py`](../vq/data.py)).


# %%
class FewShapes:
    """The drawn shapes without the sizes, shapes and places between."""

    name = "few shapes"

    def pictures(self, size: int = 64) -> list[Picture]:
        left_out = ("medium", "bar", "middle")
        return [
            each for each in Shapes().pictures(size) if not any(word in each.caption for word in left_out)
        ]


def quietly() -> redirect_stderr:
    """Without progress bars, which are made for terminals."""
    return redirect_stderr(io.StringIO())


images = ImageData(FewShapes(), size=32, holdout=0.1)
with quietly():
    images.setup()
print(images.report())


def pictures(x_BCHW: torch.Tensor) -> list[Image.Image]:
    return [to_image(x_CHW) for x_CHW in x_BCHW]


shown = images.train.select(range(0, 72, 9))
contact_sheet([pictures(from_bytes(shown.x_NCHW))], [shown.captions], tile=96)

# %% [markdown]
# ## What watches a run
#
# A callback that both trainings share. After every batch it takes numbers from the learner; every so often it asks
# the model to show pictures and held-out numbers (the dots), and draws everything again.

# %%
Numbers = dict[str, float]


class Live(L.Callback):
    """numbers: what to plot of a learner's log; look: held-out numbers and pictures of the model as it is now."""

    def __init__(
        self,
        label: str,
        numbers: Callable[[Numbers], Numbers],
        look: Callable[[], tuple[Numbers, list[Image.Image]]],
        every: int,
    ):
        self.label, self.numbers, self.look, self.every = label, numbers, look, every
        self.curves: list[tuple[int, Numbers]] = []
        self.dots: list[tuple[int, Numbers]] = []
        self.rows: list[list[Image.Image]] = []
        self.shown = [display(self.plot(), display_id=True), display(self.plot(), display_id=True)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        batch = pl_module.batches_seen
        self.curves.append((batch, self.numbers(pl_module.latest)))
        if batch % self.every == 0:
            heldout, row = self.look()
            self.dots.append((batch, heldout))
            self.rows.append(row)
            labels = [[f"batch {at}", *[""] * (len(row) - 1)] for at, _ in self.dots]
            self.shown[0].update(self.plot())
            self.shown[1].update(contact_sheet(self.rows, labels, tile=64).quantize(128))

    def plot(self) -> Image.Image:
        figure = Figure(figsize=(7, 2.8), layout="tight")
        axes = figure.subplots()
        for name in self.curves[0][1] if self.curves else ():
            at, values = [at for at, _ in self.curves], [each[name] for _, each in self.curves]
            (line,) = axes.plot(at, values, linewidth=1, label=name)
            at, values = [at for at, _ in self.dots], [each[name] for _, each in self.dots]
            axes.plot(at, values, "o", color=line.get_color(), label=f"{name}, held out")
        axes.set(xlabel="batch", ylabel=self.label)
        axes.grid(alpha=0.3)
        if self.curves:
            axes.legend(fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return Image.open(file)


def train(learner: L.LightningModule, batches: Callable[[int], object], name: str, live: Live) -> None:
    """The loop that the commands use, without its progress bar: the curves are one."""
    with quietly():
        fit(learner, batches, Path(scratch.name, name), hardware, name, callbacks=[live])


# %% [markdown]
# ## The image tokenizer
#
# An encoder makes 4×4 *latent* vectors of a picture, each for 8×8 pixels. The quantizer replaces each by the sum of
# three vectors, one from each of three *codebooks* of 64: their numbers are the codes. The decoder makes pixels of
# that ([`vq/tokenizer.py`](../vq/tokenizer.py)).

# %%
torch.manual_seed(0)
parts = {"channels": [32, 64], "latent_dim": 16, "blocks": 1, "patch": 4}
quantizer = ResidualQuantizer(dim=16, codebook_size=64, depth=3)
tokenizer = ImageTokenizer(ConvEncoder(**parts), quantizer, ConvDecoder(**parts), image_size=32)
count = sum(parameter.numel() for parameter in tokenizer.parameters())
print(f"{count:,} weights; 32x32x24 = 24,576 bits of a picture become 4x4x3x6 = 288")

# %% [markdown]
# It learns from two losses:
#
# $$\text{mean}\,(x - \hat x)^2 \;+\; \tfrac14\,\text{mean}\,(z - \mathrm{sg}[\hat z])^2$$
#
# The first makes the decoded picture $\hat x$ like the picture $x$. The second, the *commitment*, keeps the encoder's
# latent $z$ near the codes' vectors $\hat z$ (sg: taken as a constant). Codebooks move to the means of the latents
# that chose them, and codes that nobody chooses begin anew elsewhere ([`vq/codebook`](../vq/codebook)).

# %%
learner = TokenizerLearner(
    tokenizer,
    losses={"squared": Squared(1.0), "commitment": Codes("commitment", 0.25)},
    reset=CodebookReset(threshold=0.2),
    optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
    budget=Budget(batches=400, warmup=10, cooldown=0.7),
)


@torch.no_grad()
def reconstruct(some: PictureSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and what comes back from their codes."""
    tokenizer.eval()
    x_BCHW = from_bytes(some.x_NCHW)
    decoded_BCHW = tokenizer.decode(tokenizer.encode(x_BCHW))
    tokenizer.train()
    return x_BCHW, decoded_BCHW


def look_at_reconstructions() -> tuple[Numbers, list[Image.Image]]:
    x_BCHW, decoded_BCHW = reconstruct(images.heldout)
    return {"PSNR": psnr(decoded_BCHW, x_BCHW)}, pictures(decoded_BCHW[:8])


def to_psnr(latest: Numbers) -> Numbers:
    return {"PSNR": 10 * math.log10(4 / latest["squared"])}


live = Live("dB, higher is better", to_psnr, look_at_reconstructions, every=80)
train(learner, lambda n: PictureBatches(images.train_sets, 16, 0, NoAugment(), n), "tokenizer", live)

# %% [markdown]
# PSNR is the squared error on a logarithmic scale: $10 \log_{10}(4 / \text{mean}\,(x - \hat x)^2)$ dB for pixels in
# $[-1, 1]$. 3 dB more is half the error. Held-out pictures come out as well as the others: the tokenizer has learnt
# shapes and colours, not the pictures themselves.
#
# After training, codes that no picture uses are moved until each is used; below the held-out pictures and what their
# codes give back.

# %%
learner.finish(images.train_sets, 64)
x_BCHW, decoded_BCHW = reconstruct(images.heldout)
tokenizer.eval()
use = CodeUse(3, 64)
use.update(tokenizer.encode(from_bytes(images.train.x_NCHW)))
print("codes in use at each depth:", [f"{share:.0%}" for share in use.result()["used"]])
print(f"held-out PSNR {psnr(decoded_BCHW, x_BCHW):.1f} dB")
contact_sheet([pictures(x_BCHW[:8]), pictures(decoded_BCHW[:8])], tile=64)

# %% [markdown]
# ## The store
#
# Every picture is encoded once. From here on there are no pixels, only integers and captions: what the language model
# reads is small ([`vq/store`](../vq/store)).

# %%
folder = Path(scratch.name, "store")
write_store(folder, tokenizer, StreamedPictures(images), source={"pictures": "shapes"}, progress=False)
store = CodeStore.open(folder)
print(store.captions("train")[0])
print(store.codes_NhwQ("train")[0].tolist())

# %% [markdown]
# ## The language model
#
# Any causal language model; here a new Qwen3 of four layers. Its vocabulary holds pieces of words, a few marks, and
# the 3·64 codes. The three codes of a cell share one position (`Stacked`), and the head reads them off after one
# layer each (`LayeredHead`): a picture takes 16 positions.

# %%
size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 48}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
source = Scratch({"model_type": "qwen3", "tie_word_embeddings": True, **size, **heads}, text_vocabulary=320)
tokens = images_of(store)  # the image tokenizer that lies in the store
extended = source.build(store.captions("train"), pictures_of(store, tokens, row_ends=False), seed=0)
head = LayeredHead(width=3, hidden_size=96, trunk_layers=4)
sampling = Sampling(guidance=1.2, temperature=0.3)
pipe = Pipeline.assemble(extended, head, Stacked(), tokens, store.grids, sampling)
count = sum(parameter.numel() for parameter in pipe.model.parameters())
print(
    f"{count:,} weights; {pipe.model.form.vocabulary.size} ids, the codes from {extended.vocabulary.image_offset}"
)

# %% [markdown]
# It learns to predict what comes next. The loss of a token is $-\log_2 p$ *bits*, with $p$ the probability that the
# model gave to what truly followed, among the ids that may stand there. So a code costs at most about
# $\log_2 64 = 6$ bits, if the model knows nothing; 0 means that it is sure, and right.
#
# Two thirds of the documents are *caption, picture*, the others *picture, caption*; one in ten of the first kind has
# no caption, for guidance ([`lm/mixture.py`](../lm/mixture.py)).

# %%
pairs, heldout = (read_pairs(store, split, pipe.encode_text) for split in ("train", "heldout"))
learner = LMLearner(
    pipe.model,
    NextToken(text=1.0),
    optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05),
    budget=Budget(batches=240, warmup=20, cooldown=0.7),
)
prompts, unseen = pairs.texts[3::16], heldout.texts[:4]
mixture = Mixture(text_to_image=0.67, image_to_text=0.33)


def look_at_drawings() -> tuple[Numbers, list[Image.Image]]:
    pipe.model.eval()
    bits, drawn = losses(pipe.model, heldout), pipe.generate(prompts + unseen)
    pipe.model.train()
    return {"a code": bits["image_bits"], "a piece of text": bits["text_bits"]}, drawn


def to_bits(latest: Numbers) -> Numbers:
    return {"a code": latest["image_bits"], "a piece of text": latest["text_bits"]}


live = Live("bits, lower is better", to_bits, look_at_drawings, every=40)
train(learner, lambda n: DocumentBatches(pairs, pipe.model.form, mixture, 32, None, 0, n), "lm", live)
pipe.to(hardware.device)
print("captions trained on:", *prompts, "never seen:", *unseen, sep="\n    ")

# %% [markdown]
# In each row, first pictures of captions that it was trained on, then four of captions that it never saw. At first
# there is something coloured somewhere, then colours and places come, then shapes.
#
# ## What the numbers mean
#
# A code's bits fall from 6 to almost 0 on what was trained on, and *rise* on what was held out: with so few pictures
# the model ends by knowing them by heart, and is wrong with confidence about others. It still combines what it knows:
# the pictures that it never saw have most of their words right, seldom all. On a real set (`make demo`: 3,953
# pictures) the held-out curve is the one to watch; more pictures, not more batches, bring it down.
#
# Text bits of training stay above 0 for a good reason: before its picture, a caption can be any of them.

# %%
for name, some in (("trained on", pairs), ("held out", heldout)):
    bits = losses(pipe.model, some)
    whole = bits["image_bits_per_picture"]
    print(
        f"{name:10}  {bits['image_bits']:.2f} bits a code, {whole:.0f} a picture (knowing nothing: 288); "
        f"{bits['text_bits']:.2f} bits a piece of a caption, its picture given"
    )

# %% [markdown]
# ## Use it, keep it
#
# The same model describes pictures. Saved, it is one folder that `Pipeline.from_pretrained`, the commands and plain
# transformers load.

# %%
drawn = pipe.generate(prompts[:5], seed=1)
model = Path(scratch.name, "model")
with quietly():
    pipe.save_pretrained(model)
print(sorted(path.name for path in model.iterdir()))
contact_sheet([drawn], [[f"it sees {words!r}" for words in pipe.captions(drawn)]], tile=96)

# %% [markdown]
# ## What to try next
#
# - More of the same: `batches=1000` in both budgets. What do the held-out dots do?
# - `holdout=0.3` in `ImageData`: does it draw more of what it never saw, or less?
# - `depth=1` or `4` in `ResidualQuantizer`, and the `width` of the head with it: sharper pictures are harder to
#   predict.
# - `DepthTransformerHead` of [`lm/heads`](../lm/heads) in place of `LayeredHead`.
# - Your own pictures: `ImageData(ImageFolder("DIR"), size=64)`, both from `vq.data`. For more than a toy take the
#   commands: `vq-train images=folder images.source.path=DIR out=runs/vq`.
# - Then [generation](generation.ipynb), [interleaved documents and editing](interleaved.ipynb), and
#   [your own language model](own_llm.ipynb).
