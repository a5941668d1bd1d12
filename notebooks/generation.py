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
# Run as it is, this takes a minute or two: it trains a toy that knows 252 drawn shapes and nothing else. After
# `make demo` it finds the real model. What happens inside is in [`lm/pipeline.py`](../lm/pipeline.py).

# %%
import io
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
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


def quietly() -> redirect_stderr:
    """Without progress bars, which are made for terminals."""
    return redirect_stderr(io.StringIO())


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
    wider = (
        "tokenizer.encoder.channels=[32,64]",
        "tokenizer.quantizer.dim=16",
        "tokenizer.quantizer.depth=3",
    )
    longer = ("learner.optimizer.lr=3e-3", "learner.budget.batches=500")
    command("vq.train", *images, "vq_size=smoke", *wider, *longer, f"out={vq}")
    command("vq.encode", *images, f"tokenizer={vq}/tokenizer", f"out={store}")
    wider = ("lm.config.hidden_size=96", "lm.config.head_dim=48", "lm.config.intermediate_size=192")
    longer = ("learner.optimizer.lr=3e-3", "learner.budget.batches=450", "learner.objective.text=1")
    more = ("mixture.image_to_text=0.3", "mixture.text_to_image=0.7", "precision=fp32")
    command("lm.train", "lm_size=smoke", *wider, *longer, *more, f"store={store}", f"out={out}")
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
with quietly():
    pipe = Pipeline.from_pretrained(folder)
parameters = sum(p.numel() for p in pipe.model.parameters())
print(f"{parameters / 1e6:.2f} M parameters, {pipe.model.form.vocabulary.size} ids")

# %% [markdown]
# ## Draw
#
# *Guidance* says how closely to follow the prompt. With logits $c$ under the prompt and $u$ without one, a code is
# drawn from the logits $u + s\,(c - u)$: $s = 1$ is the model's own distribution, more exaggerates what the prompt
# changes in it, too much tears pictures apart. Each row is one value, from the same seeds.

# %%
guidances = [0.0, 1.0, 2.0, 8.0]
rows = [pipe.generate(prompt, n=4, guidance=g, temperature=0.3, seed=1) for g in guidances]
contact_sheet(rows, [[f"guidance {g:g}"] * 4 for g in guidances], title=prompt)

# %% [markdown]
# *Temperature* $t$ divides the logits before a code is drawn: below 1 the probable codes gain, above 1 the others do.
# 0 always takes the most probable code, so all pictures of that row are equal.

# %%
temperatures = [0.0, 0.3, 0.6, 1.2]
rows = [pipe.generate(prompt, n=4, guidance=1.2, temperature=t, seed=1) for t in temperatures]
contact_sheet(rows, [[f"temperature {t:g}"] * 4 for t in temperatures], title=prompt)

# %% [markdown]
# ## Re-ranking
#
# Draw several and keep the best. Which is best, the same model can say: it also writes captions, so
# $\log p(\text{prompt} \mid \text{picture})$ is at hand (`rank`; 0 would be certain). Below, eight pictures at a
# temperature that is too high, the most fitting one first; `generate(…, best_of=8)` returns that one.

# %%
candidates = pipe.generate(prompt, n=8, guidance=1.0, temperature=0.7, seed=3)
fits = pipe.rank(prompt, candidates)
order = sorted(range(len(fits)), key=lambda i: -fits[i])
contact_sheet(
    [[candidates[i] for i in order]], [[f"{fits[i]:.1f}" for i in order]], title=f"log p of {prompt!r}"
)

# %%
best = pipe.generate(prompt, n=4, guidance=1.0, temperature=0.7, seed=4, best_of=4)
first = pipe.generate(prompt, n=4, guidance=1.0, temperature=0.7, seed=4)
contact_sheet([first, best], [["as they come"] * 4, ["best of 4"] * 4], title=prompt)

# %% [markdown]
# ## Redraw a part
#
# `inpaint` keeps some cells and draws the others (grey) anew; `vary` does so for cells that it picks itself.

# %%
own = pipe.generate(prompt, guidance=1.2, temperature=0.0)[0]
grid_h, grid_w = pipe.model.form.grid
redraw_hw = torch.zeros(grid_h, grid_w, dtype=torch.bool)
redraw_hw[grid_h // 2 :] = True
box = (0, own.height // 2, own.width, own.height)
hidden = own.copy()
hidden.paste("grey", box)
redrawn = pipe.inpaint(own, redraw_hw, prompt, n=3, temperature=0.6)
varied = pipe.vary(own, share=0.3, prompt=prompt, n=5, temperature=0.6)
contact_sheet(
    [[own, hidden, *redrawn], varied], [["whole", "redrawn: grey", *["redrawn"] * 3], ["30% redrawn"] * 5]
)

# %% [markdown]
# ## Describe
#
# The same model the other way round: first a picture that it drew itself, then one that we draw.

# %%
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
    answer = pipe.complete(start, limit=16, max_images=1, temperature=0.3, seed=1)
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
with quietly():
    plain = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
print(type(plain).__name__, "with", type(words).__name__)
print(words.convert_ids_to_tokens(ids_TW[:, 0].tolist()))

text_ids = torch.tensor([[form.vocabulary.bos, *pipe.encode_text(prompt)]])
next_id = int(plain(text_ids).logits[0, -1].argmax())
print("after the prompt it expects", words.convert_ids_to_tokens(next_id))

# %% [markdown]
# ## What to try next
#
# - Your prompts; three at once: `pipe.generate(["…", "…", "…"], n=4)`.
# - `top_k`, `top_p` and `min_p` of [`lm/decoding.py`](../lm/decoding.py): they cut unlikely codes off, so a higher
#   temperature does less harm. `deeper=0.7` is a cooler one for each further depth.
# - High guidance without its colours: `generate(prompt, guidance=6, parallel=0)` projects it (APG), `ramp=0.5` lets it
#   rise.
# - The same from a shell: `lm-generate model=DIR prompt="…" n=8 temperature=0.7`, or with a page: `lm-serve model=DIR`.
# - How it was trained: [training](training.ipynb). Stories in words and pictures, and editing:
#   [interleaved](interleaved.ipynb).
