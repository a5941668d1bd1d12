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
# # Your own language model
#
# Any causal language model of Hugging Face can learn to read and draw pictures: Llama, Qwen, Gemma, GPT-2 and others.
# Here you see what is added to it, what stays as it was, how to train as much or as little of it as you like, and what
# it forgets of its text meanwhile.
#
# The model is a tiny Llama that first learns some English from Python's own manual, so that nothing is downloaded.
# With a real one it is one command, at the end of this page.

# %%
import functools
import io
import os
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig

from lm.architecture import check_logits
from lm.data import Encoded, read_pairs
from lm.decoding import Sampling
from lm.heads.layered import LayeredHead
from lm.learner import LMLearner
from lm.metrics import PlainText, losses, text_loss
from lm.mixture import DocumentBatches, Mixture
from lm.objectives.next_token import NextToken
from lm.pipeline import Pipeline, images_of, pictures_of
from lm.sequence import Stacked
from lm.source import HuggingFace
from lm.texts import TextFiles
from lm.tune import Full, LoRA, NewRowsOnly, Tune
from lm.vocab import train_text_tokenizer
from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.batches import NoAugment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import ImageData, Picture
from vq.images import contact_sheet
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.pieces import StreamedPictures
from vq.quantizers.residual import ResidualQuantizer
from vq.shapes import Shapes
from vq.store import CodeStore, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.hardware import detect
from vqlm.training import Budget, fit

# A folder that vq-train left, such as "runs/mine/tokenizer". None: a toy is trained.
TOKENIZER = os.environ.get("VQLM_TOKENIZER")

scratch = tempfile.TemporaryDirectory()  # removed with this notebook's kernel
hardware = detect("cpu", "fp32")  # so small that a GPU would not be faster


def quietly() -> redirect_stderr:
    """Without progress bars, which are made for terminals."""
    return redirect_stderr(io.StringIO())


# %% [markdown]
# ## A language model that knows some text
#
# Texts first: paragraphs of the manual, a line each. `TextFiles` (`texts=file` of `lm-train`) repairs them, and holds
# out some by their hash, to measure on.

# %%
paragraphs = [" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")]
file = Path(scratch.name, "manual.txt")
file.write_text("\n".join(part for part in paragraphs if len(part) > 60), encoding="utf-8")
texts = TextFiles(str(file), holdout=0.1)
print(texts.report())
print(texts.train()[0][:100], "…")

# %% [markdown]
# A Llama of four layers, and 200 steps of ordinary training. It is saved as any Hugging Face model is: this folder
# stands for yours.

# %%
words = train_text_tokenizer(texts.train(), 512)
words.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=words.bos_token_id,
    eos_token_id=words.eos_token_id,
)
torch.manual_seed(0)
base = AutoModelForCausalLM.from_config(config)
ids_N = torch.tensor([i for text in texts.train() for i in (words.bos_token_id, *words(text)["input_ids"])])
optimizer = torch.optim.AdamW(base.parameters(), lr=4e-3, weight_decay=0.01)
for step in range(STEPS := 200):
    optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20, 2 * (1 - step / STEPS))
    starts = torch.randint(len(ids_N) - 64, (16, 1))
    ids_BT = ids_N[starts + torch.arange(64)]
    loss = base(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
base.eval()

mine = Path(scratch.name, "my-llama")
with quietly():
    base.save_pretrained(mine)
    words.save_pretrained(mine)
start = words("This function returns", return_tensors="pt").input_ids
with quietly():
    said = base.generate(start, max_new_tokens=24, do_sample=False, pad_token_id=words.eos_token_id)
print(f"{base.num_parameters():,} weights, perplexity {loss.exp():.0f} at the end; in its own words:")
print(words.decode(said[0], skip_special_tokens=True).strip(), "…")

# %% [markdown]
# ## Pictures
#
# A store of codes as in the notebook on [training](training.ipynb): 42 drawn shapes, 4×4 cells of three codes of 64.


# %%
class FewShapes:
    """Large shapes, left and right."""

    name = "few shapes"

    def pictures(self, size: int = 64) -> list[Picture]:
        left_out = ("small", "medium", "bar", "middle")
        return [
            each for each in Shapes().pictures(size) if not any(word in each.caption for word in left_out)
        ]


def make_tokenizer(images: ImageData) -> ImageTokenizer:
    torch.manual_seed(0)
    parts = {"channels": [32, 64], "latent_dim": 16, "blocks": 1, "patch": 4}
    quantizer = ResidualQuantizer(dim=16, codebook_size=64, depth=3)
    learner = TokenizerLearner(
        ImageTokenizer(ConvEncoder(**parts), quantizer, ConvDecoder(**parts), image_size=32),
        losses={"squared": Squared(1.0), "commitment": Codes("commitment", 0.25)},
        reset=CodebookReset(threshold=0.2),
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
        budget=Budget(batches=250, warmup=10, cooldown=0.7),
    )
    images.setup()
    out = Path(scratch.name, "tokenizer")
    fit(
        learner,
        lambda n: PictureBatches(images.train_sets, 16, 0, NoAugment(), n),
        out,
        hardware,
        "tokenizer",
    )
    learner.finish(images.train_sets, 64)
    return learner.result.eval()


given = ImageTokenizer.from_pretrained(TOKENIZER) if TOKENIZER else None
images = ImageData(FewShapes(), size=given.image_size if given else 32, holdout=0.0)
folder = Path(scratch.name, "store")
with quietly():
    tokenizer = given or make_tokenizer(images)
    write_store(folder, tokenizer, StreamedPictures(images), source={"pictures": "few shapes"})
store = CodeStore.open(folder)
shown = Pipeline.show(tokenizer.decode(store.codes_NhwQ("train")[::5]))
contact_sheet([shown], [store.captions("train")[::5]], tile=96)

# %% [markdown]
# ## What is added
#
# `HuggingFace(folder)` loads the model and lets it grow: two marks for the beginning and the end of a picture, and one
# id for each code of each depth ([`lm/source.py`](../lm/source.py)). Ids that were there keep their rows, bit for
# bit. New rows are drawn as spread out, and as long, as the old ones ([`lm/rows.py`](../lm/rows.py)).

# %%
tokens = images_of(store)
added = pictures_of(store, tokens, row_ends=False)


def grown():
    """Your model with rows for pictures; a new one each time."""
    with quietly():
        return HuggingFace(str(mine)).build(store.captions("train"), added, seed=0)


extended = grown()
old, new = base.get_input_embeddings().weight, extended.lm.get_input_embeddings().weight
assert torch.equal(old, new[: len(old)])
print(f"{len(old)} rows became {len(new)}; the first {len(old)} are the same to the bit")
for i in range(extended.first_new_row, extended.vocabulary.image_offset + 2):
    print(f"{i:6}  {extended.tokenizer.convert_ids_to_tokens(i)}")
lengths = {"old": old.norm(dim=1), "new": new[extended.first_new_row :].norm(dim=1)}
print({name: f"rows of length {each.mean():.2f} ± {each.std():.2f}" for name, each in lengths.items()})

# %% [markdown]
# What a user types stays text. The name of an image token in a prompt is spelt out; it never becomes one.

# %%
ids = Pipeline.assemble(
    extended, LayeredHead(store.depth, 64, 4), Stacked(), tokens, store.grids, Sampling()
).encode_text("<|image_5|>")
print([extended.tokenizer.decode([i]) for i in ids], max(ids) < extended.vocabulary.image_offset)

# %% [markdown]
# ## The guard
#
# Your model's trunk is run on rows of our own making, several documents in one row under a mask, and scores are taken
# from slices of its output matrix. That is right for an architecture whose logits are *output rows · trunk(input
# rows)*. `check_logits` does not believe it: it packs two texts into a row, runs both ways, and compares logits
# ([`lm/architecture.py`](../lm/architecture.py)). It is part of loading. BLOOM, which tells positions by distances that
# it derives from the mask, is refused:

# %%
check_logits(base)
print("Llama: equal logits, taken")
try:
    check_logits(
        AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2))
    )
except ConfigError as error:
    print("BLOOM:", error)

# %% [markdown]
# ## As much or as little as you like
#
# Four ways to teach it pictures ([`lm/tune.py`](../lm/tune.py)), 100 batches each:
#
# - every weight, on pictures alone;
# - every weight, a third of the documents plain text of the manual;
# - *LoRA*: each matrix $W$ of the trunk gains a product of low rank, $W + \frac{\alpha}{r} B A$; only $A$, $B$, the new
#   rows and the head learn. Afterwards the product is added to $W$ and the model is a plain one again;
# - the new rows and the head alone. The trunk does not move.
#
# What is kept is measured on held-out text, over the ids that the base model had, so that numbers before and after
# compare: perplexity $= 2^{\text{bits per token}}$ ([`lm/metrics.py`](../lm/metrics.py)).


# %%
def teach(name: str, tune: Tune, text: float) -> tuple[Pipeline, dict[str, float]]:
    """A model taught in one of the ways, and its numbers."""
    extended = grown()
    head = LayeredHead(store.depth, 64, 4)
    pipe = Pipeline.assemble(extended, head, Stacked(), tokens, store.grids, Sampling(1.0, 0.3))
    pairs = read_pairs(store, "train", pipe.encode_text)
    corpus = Encoded(texts.train(), pipe.encode_text)
    mixture = Mixture(text_to_image=0.5, image_to_text=0.15, text=text, longest_text=64)
    plain = PlainText.of(pipe, texts.heldout()[:60])
    before = text_loss(base, plain, context=256)
    tune.prepare(pipe.model, extended.first_new_row)
    learner = LMLearner(
        pipe.model,
        NextToken(text=0.5),
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        budget=Budget(batches=100, warmup=10, cooldown=0.7),
    )
    moved = sum(p.numel() for p in pipe.model.parameters() if p.requires_grad)
    with quietly():
        out = Path(scratch.name, name)
        form = pipe.model.form
        fit(
            learner,
            lambda n: DocumentBatches(pairs, form, mixture, 16, None, 0, n, corpus),
            out,
            hardware,
            name,
        )
    tune.finish(pipe.model)
    pipe.to(hardware.device)
    after = text_loss(pipe.model.lm, plain, context=256)
    numbers = {"moved": moved, "before": before["perplexity"], "after": after["perplexity"]}
    return pipe, {**numbers, "bits": losses(pipe.model, pairs)["image_bits"]}


ways = {
    "every weight": (Full(), 0.0),
    "every weight, and text": (Full(), 0.35),
    "LoRA": (LoRA(rank=16), 0.0),
    "new rows and head": (NewRowsOnly(), 0.0),
}
taught = {name: teach(name, *way) for name, way in ways.items()}
print(f"{'':24}{'weights moved':>14}{'perplexity before':>20}{'after':>8}{'bits a code':>14}")
for name, (_, n) in taught.items():
    print(f"{name:24}{n['moved']:>14,}{n['before']:>20.1f}{n['after']:>8.1f}{n['bits']:>14.2f}")

# %%
figure = Figure(figsize=(7, 2.6), layout="tight")
left, right = figure.subplots(1, 2, sharey=True)
names = list(taught)
left.barh(names, [n["after"] / n["before"] for _, n in taught.values()], color="#2171b5")
left.axvline(1, color="black", linewidth=1)
left.set(xlabel="perplexity of text, after / before")
right.barh(names, [n["bits"] for _, n in taught.values()], color="#e6550d")
right.set(xlabel="bits a code")
left.invert_yaxis()
picture = io.BytesIO()
figure.savefig(picture, format="png", dpi=100)
Image.open(picture)

# %% [markdown]
# And what they draw. Where the trunk stays, text stays to the bit, and a tiny trunk that has only ever read a manual
# has little to draw with; that is different in a large one. Training every weight learns pictures best and forgets
# text at once, unless text stays in the mixture.

# %%
prompts = ["a large red circle, left", "a large blue square, right", "a large green triangle, left"]
prompts += ["a large black circle, right", "a large yellow square, left", "a large purple triangle, right"]
rows = [pipe.generate(prompts, seed=0) for pipe, _ in taught.values()]
labels = [[name, *[""] * 5] for name in taught]
contact_sheet(rows, labels, tile=96)

# %% [markdown]
# ## It stays a Hugging Face model
#
# The saved folder loads in plain transformers, with nothing of this package. Where the new rows and the head alone
# were trained, it says to the letter what it said before, if it is to use its own ids; which ids may come next is what
# the grammar of this package knows ([`lm/grammar.py`](../lm/grammar.py)).

# %%
out = Path(scratch.name, "model")
with quietly():
    taught["new rows and head"][0].save_pretrained(out)
    plain, its_words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    added_ids = list(range(extended.first_new_row, len(its_words)))
    again = plain.generate(
        start,
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=words.eos_token_id,
        suppress_tokens=added_ids,
    )
print(type(plain).__name__, sorted(path.name for path in out.iterdir()))
print(its_words.decode(again[0], skip_special_tokens=True).strip(), "…")
assert torch.equal(again, said)

# %% [markdown]
# ## What to try next: a real one
#
# ```sh
# lm-train store=runs/store lm=hf lm.name=DIR tune=lora learner.optimizer.lr=2e-4 \
#     mixture=with_text texts=file texts.path=TEXTS
# lm-evaluate model=runs/lm/model store=runs/store texts=file texts.path=TEXTS base=DIR
# ```
#
# - `lm.name` is a hub id or a folder, such as that of a Qwen3 or SmolLM2. A pretrained model wants a smaller learning
#   rate than the 3e-3 of this toy.
# - Keep text in the mixture, as much like what it was trained on as you can get. `lm-train` writes
#   `retention.jsonl`: the loss of held-out text from the base model on.
# - `lm/rows=codebook`: codes that look alike begin alike.
# - `tune=rows` first: it needs the least memory, and is the yardstick for what the others bring.
# - `layout=flat head=linear` makes a bundle that is a plain language model to the last id: see
#   [docs/language-model.md](../docs/language-model.md).
# - In this notebook: a rank of 2 or 64; half of the documents text; 500 batches for the new rows alone.
