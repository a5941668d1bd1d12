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
# # Stories in words and pictures, and editing
#
# A model that reads and writes text and pictures as one sequence can do more than draw captions, if its documents
# show it more. Here a tiny one learns, in half a minute, from documents that we write: a picture, an instruction, the
# changed picture, and so on. Then it tells stories, edits, fills holes, varies pictures, and says which of several
# pictures fits some words.
#
# How the models are made is shown step by step in [training](training.ipynb).

# %%
import functools
import io
import itertools
import json
import os
import random
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from lm.data import read_documents, read_pairs
from lm.decoding import Sampling
from lm.heads.layered import LayeredHead
from lm.learner import LMLearner
from lm.mixture import DocumentBatches, Mixture
from lm.objectives.next_token import NextToken
from lm.pipeline import Pipeline, images_of, pictures_of
from lm.sequence import Stacked
from lm.source import Scratch
from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.batches import NoAugment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import ImageData, Picture
from vq.images import contact_sheet, to_pixels
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.pieces import StreamedPictures
from vq.quantizers.residual import ResidualQuantizer
from vq.shapes import draw
from vq.store import CodeStore, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.hardware import detect
from vqlm.training import Budget, fit, read_log

# A folder that vq-train left, such as "runs/mine/tokenizer". None: a toy is trained.
TOKENIZER = os.environ.get("VQLM_TOKENIZER")

scratch = tempfile.TemporaryDirectory()  # removed with this notebook's kernel
hardware = detect("cpu", "fp32")  # so small that a GPU would not be faster


def quietly() -> redirect_stderr:
    """Without progress bars, which are made for terminals."""
    return redirect_stderr(io.StringIO())


# %% [markdown]
# ## A small world
#
# 2 sizes × 4 colours × 3 shapes × 2 places: 48 pictures. Four words say which.

# %%
Words = tuple[str, str, str, str]
CHOICES = (
    ("small", "large"),
    ("red", "yellow", "green", "blue"),
    ("circle", "square", "triangle"),
    ("left", "right"),
)
WORLD: list[Words] = list(itertools.product(*CHOICES))


def caption(words: Words) -> str:
    return f"a {words[0]} {words[1]} {words[2]}, {words[3]}"


def changes(words: Words) -> list[tuple[str, Words]]:
    """Every instruction that changes one word, and what the picture then is."""
    each_word = enumerate(CHOICES)
    others = [(place, new) for place, choices in each_word for new in choices if new != words[place]]
    return [(f"now {new}", (*words[:place], new, *words[place + 1 :])) for place, new in others]


class World:
    """A source of pictures, as `vq.data.ImageData` wants one."""

    name = "a small world"

    def pictures(self, size: int = 64) -> list[Picture]:
        return [self._picture(words, 4 * size) for words in WORLD]

    def _picture(self, words: Words, side: int) -> Picture:
        return Picture("-".join(words), caption(words), caption(words), lambda: draw(*words, side=side))


some = WORLD[::6]
contact_sheet([[draw(*words, side=96) for words in some]], [[caption(words) for words in some]], tile=96)

# %% [markdown]
# ## Tokenizer and store
#
# As in the notebook on training: 32×32 pixels become 4×4 cells of three codes.


# %%
def make_tokenizer(images: ImageData) -> ImageTokenizer:
    torch.manual_seed(0)
    parts = {"channels": [32, 64], "latent_dim": 16, "blocks": 1, "patch": 4}
    quantizer = ResidualQuantizer(dim=16, codebook_size=64, depth=3)
    learner = TokenizerLearner(
        ImageTokenizer(ConvEncoder(**parts), quantizer, ConvDecoder(**parts), image_size=32),
        losses={"squared": Squared(1.0), "commitment": Codes("commitment", 0.25)},
        reset=CodebookReset(threshold=0.2),
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
        budget=Budget(batches=400, warmup=10, cooldown=0.7),
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
images = ImageData(World(), size=given.image_size if given else 32, holdout=0.0)
folder = Path(scratch.name, "store")
with quietly():
    tokenizer = given or make_tokenizer(images)
    write_store(folder, tokenizer, StreamedPictures(images), source={"pictures": "a small world"})
store = CodeStore.open(folder)
Q = store.depth
decoded = tokenizer.decode(store.codes_NhwQ("train")[::6])
contact_sheet([Pipeline.show(decoded)], tile=96, title="what comes back from codes")

# %% [markdown]
# ## Documents that we write
#
# A JSONL file, a document a line; a part is a text or the id of a picture in the store. Two kinds:
#
# - an *edit*: a picture and an instruction, both `given` (read, not learnt), and the changed picture;
# - a *story*: a caption, its picture, an instruction, the changed picture, another one. All of it is learnt.
#
# One (picture, instruction) in ten is left out, of stories too: edits that the model will never have seen.

# %%
dice = random.Random(0)
edits = [(words, told, after) for words in WORLD for told, after in changes(words)]
dice.shuffle(edits)
unseen, seen = edits[: len(edits) // 10], edits[len(edits) // 10 :]
allowed = {(words, told) for words, told, _ in seen}


def picture(words: Words) -> dict[str, object]:
    return {"image": "-".join(words)}


def edit(words: Words, told: str, after: Words) -> list[dict[str, object]]:
    return [{**picture(words), "given": True}, {"text": told, "given": True}, picture(after)]


def story() -> list[dict[str, object]]:
    words = dice.choice(WORLD)
    parts = [{"text": caption(words)}, picture(words)]
    for _ in range(2):
        told, after = dice.choice([each for each in changes(words) if (words, each[0]) in allowed])
        parts += [{"text": told}, picture(after)]
        words = after
    return parts


documents = [edit(*each) for each in seen] + [story() for _ in seen]
file = Path(scratch.name, "documents.jsonl")
file.write_text("".join(json.dumps({"parts": parts}) + "\n" for parts in documents))
print(len(documents), "documents;", len(unseen), "edits are left out")
print(json.dumps(documents[0]), json.dumps(documents[-1]), sep="\n")

# %% [markdown]
# ## The mixture
#
# Shares of the tasks ([`lm/mixture.py`](../lm/mixture.py)): mostly our documents, and captions with their pictures both
# ways. The other tasks need no file: `edit` makes edits of pictures that share a concept and have different captions,
# `interleaved` lays several captions and pictures end to end, `text` reads plain text.

# %%
size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 48}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
source = Scratch({"model_type": "qwen3", "tie_word_embeddings": True, **size, **heads}, text_vocabulary=320)
tokens = images_of(store)
extended = source.build(store.captions("train"), pictures_of(store, tokens, row_ends=False), seed=0)
sampling = Sampling(guidance=1.0, temperature=0.3)
pipe = Pipeline.assemble(extended, LayeredHead(Q, 96, 4), Stacked(), tokens, store.grids, sampling)
form = pipe.model.form

mixture = Mixture(text_to_image=0.15, image_to_text=0.15, written=0.7, documents=str(file))
pairs = read_pairs(store, "train", pipe.encode_text)
written = read_documents(file, store, "train", pipe.encode_text)


def batches(total: int, count: int = 24, row_length: int | None = None) -> DocumentBatches:
    return DocumentBatches(pairs, form, mixture, count, row_length, 0, total, written=written)


print(f"{sum(p.numel() for p in pipe.model.parameters()):,} weights, {form.vocabulary.size} ids")

# %% [markdown]
# ## What a batch looks like
#
# Documents of unlike length are packed into rows ([`lm/packing.py`](../lm/packing.py)). On the left each row of a
# batch: text and marks in blue, pictures in orange; what is given, or cannot be otherwise, is pale: it is read, and
# not learnt. On the right the *mask* of one row: a position (from above) sees those before it (to the left) that
# belong to its own document. Nobody sees another document, and every document counts its positions from 0.

# %%
batch = batches(1, count=16, row_length=160)[0]
inside_BT = batch.document_BT >= 0
is_picture_BT = form.vocabulary.image_offset <= batch.ids_BTW.amax(-1)
learnt_BT = (batch.next_BTW >= 0).any(-1).roll(1, 1)  # what follows a position is predicted there
kinds_BT = inside_BT * (1 + learnt_BT.long() + 2 * is_picture_BT)
starts_BT = inside_BT & (batch.positions_BT == 0)

colours = ["white", "#c6dbef", "#2171b5", "#fdd0a2", "#e6550d"]
names = ["padding", "text and marks, read", "text, learnt", "picture, read", "picture, learnt"]
figure = Figure(figsize=(11, 4.2), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
left.imshow(kinds_BT, cmap=ListedColormap(colours), vmin=0, vmax=4, aspect="auto", interpolation="nearest")
for row, position in starts_BT.nonzero().tolist():
    left.plot([position - 0.5] * 2, [row - 0.5, row + 0.5], color="black", linewidth=2)
left.set(title="rows of a batch; a black line begins a document", xlabel="position", ylabel="row")
left.legend(
    handles=[Patch(facecolor=c, edgecolor="grey", label=n) for c, n in zip(colours, names, strict=True)],
    loc="upper center",
    bbox_to_anchor=(0.5, -0.16),
    ncols=3,
    fontsize=8,
)
fullest = int(batch.document_BT.amax(1).argmax())
right.imshow(batch.mask[fullest, 0], cmap="Greys", interpolation="nearest")
right.set(title=f"mask of row {fullest}", xlabel="seen", ylabel="position")


def shown(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return Image.open(file)


print(f"{batch.samples} documents in {len(batch.ids_BTW)} rows, {batch.padding:.0%} padding")
shown(figure)

# %% [markdown]
# ## Training
#
# Half a minute. Bits are $-\log_2 p$ of what truly followed, for a code and for a piece of text.

# %%
learner = LMLearner(
    pipe.model,
    NextToken(text=0.5),
    optimizer=functools.partial(torch.optim.AdamW, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05),
    budget=Budget(batches=260, warmup=20, cooldown=0.7),
)
out = Path(scratch.name, "lm")
with quietly():
    fit(learner, batches, out, hardware, "language model")
pipe.to(hardware.device)
log = read_log(out / "log.jsonl")
figure = Figure(figsize=(6, 2.4), layout="tight")
axes = figure.subplots()
for name, label in (("image_bits", "a code"), ("text_bits", "a piece of text")):
    axes.plot([each["batch"] for each in log], [each[name] for each in log], label=label)
axes.set(xlabel="batch", ylabel="bits")
axes.legend()
shown(figure)

# %% [markdown]
# ## Stories
#
# `complete` goes on from text and pictures in any order, and decides itself what comes next: words, a picture, or the
# end. Only what can be read back may be drawn: a picture has all of its codes, whatever is asked for
# ([`lm/grammar.py`](../lm/grammar.py)). The same beginning, three seeds; words stand under the picture that follows
# them.


# %%
def in_order(parts: list[str | Image.Image]) -> tuple[list[Image.Image], list[str]]:
    """Pictures, and the words before each."""
    found, words = ([], []), ""
    for part in parts:
        if isinstance(part, str):
            words = part
        else:
            found[0].append(part)
            found[1].append(words)
            words = ""
    return found


beginning = "a small green triangle, left"
three = {"max_images": 3, "min_images": 3, "limit": 40}
stories = [
    in_order([beginning, *pipe.complete([beginning], **three, temperature=0.4, seed=seed)])
    for seed in range(3)
]
contact_sheet([each for each, _ in stories], [words for _, words in stories], tile=96)

# %% [markdown]
# A prompt may end with a picture and an instruction: then its answer begins with the changed picture.

# %%
start = [draw("large", "yellow", "square", "right", side=96), "now blue"]
shown_parts, words = in_order([*start, *pipe.complete(start, max_images=2, min_images=2, limit=40, seed=1)])
contact_sheet([shown_parts], [["given", *words[1:]]], tile=96)

# %% [markdown]
# ## Editing
#
# `edit` is the same for one picture and one instruction. First edits that were trained on, then some that were never
# seen: other pictures were given that instruction, and that picture other instructions.


# %%
def edited(some: list[tuple[Words, str, Words]]) -> list[Image.Image]:
    pictures = [draw(*words, side=96) for words, _, _ in some]
    return [
        pipe.edit(each, instruction, temperature=0.0)[0]
        for each, (_, instruction, _) in zip(pictures, some, strict=True)
    ]


answers = {"trained on": (seen[:16], edited(seen[:16])), "never seen": (unseen[:16], edited(unseen[:16]))}
rows, labels = [], []
for some, found in answers.values():
    rows += [[draw(*words, side=96) for words, _, _ in some[:8]], found[:8]]
    labels += [[""] * 8, [instruction for _, instruction, _ in some[:8]]]
contact_sheet(rows, labels, tile=80, title="above: trained on; below: never seen")

# %% [markdown]
# How often is it right? The answer is the picture of the world that is nearest, pixel by pixel.

# %%
side = images.size
everything = torch.stack([to_pixels(draw(*words, side=4 * side), side) for words in WORLD])


def nearest(picture: Image.Image) -> Words:
    distances = (to_pixels(picture, side) - everything).square().sum((1, 2, 3))
    return WORLD[int(distances.argmin())]


for name, (some, found) in answers.items():
    right = sum(nearest(each) == after for each, (_, _, after) in zip(found, some, strict=True))
    print(f"{name}: {right} of {len(some)} edits right (by chance: 1 in {len(WORLD)})")

# %% [markdown]
# It knows the edits that it was shown, and follows new ones in part: often the words that were to stay stay, or the
# instruction is followed, and not both. A rule is worth learning only where there are too many cases to remember, and
# here there are few.
#
# A model that was also trained on edits without their instruction, as `mixture.edit` makes them, can be guided twice:
# `image_guidance` $s_i$ says how much the picture counts and `guidance` $s$ how much the instruction does, by logits
# $u + s_i\,(i - u) + s\,(f - i)$ of nothing, the picture alone, and both ([`lm/logits.py`](../lm/logits.py)).
#
# ## Filling holes
#
# `inpaint` draws some cells anew and keeps the codes of the others. Which ones, a grid of the picture's cells says, or
# a black picture that is white there. Below, the grey cells are drawn again, under several prompts. Cells are drawn in
# their order, from above: a new cell sees the kept ones before it, so it is the lower half that is redrawn here. What
# the kept cells show may outweigh the prompt.

# %%
whole = draw("large", "red", "square", "left", side=96)
h, w = form.grid
redraw_hw = torch.zeros(h, w, dtype=torch.bool)
redraw_hw[h // 2 :] = True


def with_hole(picture: Image.Image, redraw_hw: torch.Tensor) -> Image.Image:
    cells = Image.fromarray((redraw_hw.numpy() * 255).astype("uint8"))
    mask = cells.resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)


prompts = ["", "a large red square, left", "a large red triangle, left", "a large green circle, left"]
redrawn = [pipe.inpaint(whole, redraw_hw, prompt, temperature=0.3)[0] for prompt in prompts]
contact_sheet(
    [[whole, with_hole(whole, redraw_hw), *redrawn]],
    [["given", "redrawn: grey", *[prompt or "no prompt" for prompt in prompts]]],
    tile=96,
)

# %% [markdown]
# ## Variations
#
# `vary` redraws a share of the cells, other ones each time. With few cells the rest says what belongs there; with all
# of them it is a new picture.

# %%
rows = [pipe.vary(whole, share=share, n=6, temperature=0.8) for share in (0.25, 0.5, 1.0)]
contact_sheet(rows, [[f"{share:.0%} redrawn"] * 6 for share in (0.25, 0.5, 1.0)], tile=80)

# %% [markdown]
# ## Ranking
#
# How well do pictures fit some words? $\log p(\text{words} \mid \text{picture})$, by the model that draws them too.
# Nearer to 0 is better. `generate(…, best_of=4)` draws four for one and keeps the best.

# %%
wanted = ("small", "blue", "circle", "left")
candidates = [wanted, *[after for _, after in changes(wanted)[::2]], ("large", "red", "square", "right")]
pictures = [draw(*words, side=96) for words in candidates]
fits = pipe.rank(caption(wanted), pictures)
order = sorted(range(len(fits)), key=lambda i: -fits[i])
contact_sheet(
    [[pictures[i] for i in order]], [[f"{fits[i]:.1f}" for i in order]], tile=96, title=caption(wanted)
)

# %% [markdown]
# ## What to try next
#
# - Three changes in a story instead of two; ask for four pictures. Does it go on?
# - Leave out a whole instruction for one shape (all "now green" of circles): does it still follow it?
# - `picture_attention="bidirectional"` in `Pipeline.assemble`: given pictures are then read in both directions.
# - `Flat()` instead of `Stacked()`, with `LinearHead(1, 96, 4)`: one code a position, three times as many positions.
# - Documents of your own, with your own pictures:
#   `lm-train store=runs/store mixture=everything texts=wordnet mixture.written=0.2 mixture.documents=docs.jsonl`.
# - Then give the task to [your own language model](own_llm.ipynb).
