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
# # A language model that draws
#
# One model reads and writes text and pictures as one sequence of ids. Here it draws prompts, describes a picture,
# goes on from a mixed prompt, and you look at the ids behind all that.
#
# Run as it is, this takes a minute or two: it trains a toy on drawn shapes, which shows how things work and draws
# badly. After `make demo` it finds the real model.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm import Pipeline
from lm.sequence import Image, Text
from vq.images import contact_sheet, to_pixels
from vq.shapes import draw

# A folder that lm-train left, such as "runs/mine/model". None: that of `make demo`, or a toy.
MODEL = os.environ.get("VQLM_MODEL")
PROMPT = "a red apple"
TOY_PROMPT = "a large red circle, left"  # the toy knows nothing but shapes

scratch = tempfile.TemporaryDirectory()  # removed with this notebook's kernel


# %%
def command(module: str, *arguments: str) -> None:
    """One of the commands, as you would type it: "vq.train" is vq-train."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def make_toy() -> Path:
    """The whole road in three commands: pictures, tokenizer, codes, language model."""
    vq, store, out = (Path(scratch.name, name) for name in ("vq", "store", "lm"))
    images = ("images=shapes", "images.size=32")
    longer = "learner.budget.batches=400"
    command("vq.train", *images, "vq_size=smoke", longer, f"out={vq}")
    command("vq.encode", *images, f"tokenizer={vq}/tokenizer", f"out={store}")
    command("lm.train", "lm_size=smoke", longer, f"store={store}", f"out={out}")
    return out / "model"


def find_model() -> Path | None:
    """The model named above, else the demo's."""
    if MODEL:
        return Path(MODEL)
    found = [root / "runs/demo/model" for root in (Path(), Path(".."))]
    return next((folder for folder in found if (folder / "multimodal.json").is_file()), None)


folder = find_model()
prompt = PROMPT if folder else TOY_PROMPT
folder = folder or make_toy()
pipe = Pipeline.from_pretrained(folder)
parameters = sum(p.numel() for p in pipe.model.parameters())
print(f"{parameters / 1e6:.2f} M parameters, {pipe.model.form.vocabulary.size} ids")

# %% [markdown]
# ## Draw
#
# *Guidance* says how closely to follow the prompt: 1 is the model's own distribution, more exaggerates what the
# prompt changes in it. Each row is one value, from the same seed.

# %%
guidances = [1.0, 2.0, 4.0]
rows = [pipe.generate(prompt, n=4, guidance=g, temperature=0.7, seed=1) for g in guidances]
contact_sheet(rows, [[f"guidance {g:g}"] * 4 for g in guidances], title=prompt)

# %% [markdown]
# *Temperature* says how far to stray from the most probable code: 0 always takes that one, so all pictures of a
# row are equal.

# %%
temperatures = [0.0, 0.7, 1.2]
rows = [pipe.generate(prompt, n=4, guidance=2.0, temperature=t, seed=1) for t in temperatures]
contact_sheet(rows, [[f"temperature {t:g}"] * 4 for t in temperatures], title=prompt)

# %% [markdown]
# ## Describe
#
# The same model the other way round: first a picture that it drew itself, then one that we draw.

# %%
own = pipe.generate(prompt, guidance=2.0, temperature=0.7, seed=1)[0]
given = draw("large", "blue", "square", "middle", side=128)
captions = pipe.captions([own, given], limit=16)
contact_sheet([[own, given]], [[caption or "(no words)" for caption in captions]], tile=160)

# %% [markdown]
# ## Go on from text and pictures
#
# A prompt may mix both in any order, and so may the answer: here the beginning of a caption, a picture, and a
# caption with its picture and a further caption. The models trained here have seen only pairs of a caption and
# its picture, so they often end where one would go on; nothing is then the right answer.

# %%
words_of_prompt = prompt.split()
beginning = " ".join(words_of_prompt[: -(-len(words_of_prompt) // 2)])
parts, labels = [], []
for start in ([beginning], [given], ["a large blue square", given, prompt]):
    answer = pipe.complete(start, limit=16, max_images=1, temperature=0.7, seed=1)
    told = [part if isinstance(part, str) else "[picture]" for part in start]
    print(told, "→", [part if isinstance(part, str) else "[picture]" for part in answer])
    drawn = [part for part in answer if not isinstance(part, str)]
    parts += drawn
    labels += [f"drawn after {told[-1]!r}"] * len(drawn)
contact_sheet([[given, *parts]], [["the picture given", *labels]])

# %% [markdown]
# ## The ids
#
# What the model sees: `build` writes segments as one sequence, `split` reads it back. A text id stands in the
# first column. In the stacked layout a row holds all codes of one cell, each depth in its own range of ids; -1 is
# an empty column.

# %%
form = pipe.model.form
x_CHW = to_pixels(given, pipe.images.image_size)
codes_hwQ = pipe.images.encode(x_CHW[None].to(pipe.device))[0].cpu()
segments = [Text(tuple(pipe.encode_text(prompt))), Image(codes_hwQ)]
ids_TW = form.build(segments)
assert form.split(ids_TW) == segments
print(
    f"{form.layout.name} layout, {tuple(ids_TW.shape)} ids; pictures begin at id {form.vocabulary.image_offset}"
)
print(ids_TW.numpy())

# %% [markdown]
# ## The same folder in plain transformers
#
# The language model in the folder is an ordinary one, with image tokens called `<|image_0|>` and so on. It needs
# none of this package, which adds the grammar, guidance, the head for several codes per cell, and pixels.

# %%
plain = AutoModelForCausalLM.from_pretrained(folder)
words = AutoTokenizer.from_pretrained(folder)
print(type(plain).__name__, "with", type(words).__name__)
print(words.convert_ids_to_tokens(ids_TW[:, 0].tolist()))

text_ids = torch.tensor([[form.vocabulary.bos, *pipe.encode_text(prompt)]])
next_id = int(plain(text_ids).logits[0, -1].argmax())
print("after the prompt it expects", words.convert_ids_to_tokens(next_id))
