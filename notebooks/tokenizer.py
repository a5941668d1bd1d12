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
# # Pictures as grids of integers
#
# An image tokenizer turns a picture into a small grid of integers, the *codes*, and codes back into a picture.
# Here you look at the codes, and then you change them and see what happens.
#
# Run as it is, this takes half a minute: it uses drawn shapes and trains a toy tokenizer on them, whose pictures are
# a little rough. After `make demo` it finds the real one. What happens inside is in
# [`vq/tokenizer.py`](../vq/tokenizer.py).

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib import colormaps
from PIL import Image

from vq import ImageTokenizer
from vq.images import contact_sheet, to_image, to_pixels
from vq.metrics import CodeUse, psnr
from vq.plots import plot_code_use
from vq.shapes import Shapes

# A folder that vq-train left, such as "runs/mine/tokenizer". None: that of `make demo`, or a toy.
TOKENIZER = os.environ.get("VQLM_TOKENIZER")

scratch = tempfile.TemporaryDirectory()  # removed with this notebook's kernel


# %%
def find_or_train() -> Path:
    """The tokenizer named above, else the demo's, else a toy, trained by the command that you would use."""
    if TOKENIZER:
        return Path(TOKENIZER)
    for root in (Path(), Path("..")):
        if (root / "runs/demo/tokenizer/config.json").is_file():
            return root / "runs/demo/tokenizer"
    out = Path(scratch.name, "vq")
    arguments = [
        "images=shapes",
        "vq_size=smoke",
        "images.size=32",
        "tokenizer.encoder.channels=[32,64]",
        "tokenizer.quantizer.dim=16",
        "tokenizer.quantizer.depth=3",
        "learner.optimizer.lr=3e-3",
        "learner.budget.batches=600",
        f"out={out}",
    ]
    done = subprocess.run([sys.executable, "-m", "vq.train", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out / "tokenizer"


tokenizer = ImageTokenizer.from_pretrained(find_or_train())
K, Q, f, size = tokenizer.codebook_size, tokenizer.depth, tokenizer.downsample, tokenizer.image_size
print(f"{size}x{size} pixels become {size // f}x{size // f} cells of {Q} codes, each in 0..{K - 1}")
print(f"that is {size * size * 24} bits in, {(size // f) ** 2 * Q * (K - 1).bit_length()} bits out")
print(f"fingerprint {tokenizer.fingerprint}: codes of one tokenizer mean nothing to another")

# %% [markdown]
# ## Encode
#
# Pictures enter as float tensors `(B, 3, H, W)` in [-1, 1]. For your own: `to_pixels(open_image("cat.jpg"), size)`,
# both from `vq.images`.

# %%
drawings = {picture.caption: picture for picture in Shapes().pictures(size)}
captions = ["a large red circle, left", "a large blue square, right"]
captions += ["a large green triangle, middle", "a medium black bar, middle"]
x_BCHW = torch.stack([to_pixels(drawings[caption].load(), size) for caption in captions])


def pictures(x_BCHW: torch.Tensor) -> list[Image.Image]:
    return [to_image(x_CHW) for x_CHW in x_BCHW]


codes_BhwQ = tokenizer.encode(x_BCHW)
print("codes", tuple(codes_BhwQ.shape), codes_BhwQ.dtype)
for depth in range(Q):
    print(f"\n{captions[0]!r}, depth {depth}:")
    print(codes_BhwQ[0, :, :, depth].numpy())

# %% [markdown]
# The same as colours, a row for each depth: like places have like codes, and codes have no order, so that two colours
# that are near say nothing.

# %%
maps = codes_BhwQ.double() / max(1, K - 1)


def as_colours(codes_hw: torch.Tensor) -> Image.Image:
    """Codes as a picture of as many pixels as there are cells, enlarged."""
    return Image.fromarray((colormaps["nipy_spectral"](codes_hw)[..., :3] * 255).astype("uint8"))


rows = [[as_colours(map_hwQ[..., depth]) for map_hwQ in maps] for depth in range(Q)]
contact_sheet(
    [pictures(x_BCHW), *rows], [captions, *[[f"depth {depth}"] * len(captions) for depth in range(Q)]]
)

# %% [markdown]
# ## Decode
#
# Originals above, what comes back from the codes below.

# %%
decoded_BCHW = tokenizer.decode(codes_BhwQ)
scores = [f"{psnr(a[None], b[None]):.1f} dB" for a, b in zip(decoded_BCHW, x_BCHW, strict=True)]
contact_sheet([pictures(x_BCHW), pictures(decoded_BCHW)], [captions, scores])

# %% [markdown]
# ## What each depth adds
#
# A cell's latent is the sum of one vector from each depth's codebook, $z = e_1 + e_2 + \dots + e_Q$; each depth
# describes what the ones before left over. Stop the sum early and decode: coarse first, then details. PSNR is
# $10 \log_{10}(4 / \text{mean}\,(x - \hat x)^2)$ dB: 3 dB more is half the error.


# %%
@torch.no_grad()
def decode_first(codes_BhwQ: torch.Tensor, depths: int) -> torch.Tensor:
    """As `decode`, but with the vectors of the first depths alone."""
    vectors = [tokenizer.quantizer.codebook(d)[codes_BhwQ[..., d]] for d in range(depths)]
    z_BDhw = torch.stack(vectors).sum(0).permute(0, 3, 1, 2)
    return tokenizer.decoder(z_BDhw).float().clamp(-1, 1)


assert torch.allclose(decode_first(codes_BhwQ, Q), decoded_BCHW, atol=1e-4)  # all of them: the picture itself

partial = [decode_first(codes_BhwQ, depths) for depths in range(1, Q + 1)]
labels = [
    [f"{depths} of {Q}: {psnr(a[None], b[None]):.1f} dB" for a, b in zip(each, x_BCHW, strict=True)]
    for depths, each in enumerate(partial, start=1)
]
contact_sheet([pictures(each) for each in partial], labels)

# %% [markdown]
# ## Swap codes between two pictures
#
# Codes are numbers in a grid, so pictures can be cut and mixed like arrays: the right half of another picture, or
# the first depth of one with the other depths of the other.

# %%
a, b = codes_BhwQ[0], codes_BhwQ[1]
half = a.shape[1] // 2
halves, mixed = a.clone(), a.clone()
halves[:, half:] = b[:, half:]
mixed[..., 1:] = b[..., 1:]
shown = pictures(tokenizer.decode(torch.stack([a, b, halves, mixed])))
contact_sheet([shown], [["A", "B", "left of A, right of B", "depth 0 of A, the rest of B"]])

# %% [markdown]
# ## Which codes are used?
#
# Over all drawn shapes. A code that no picture uses is wasted; a toy has few pictures, so it may leave some idle.

# %%
use = CodeUse(Q, K)
everything = list(drawings.values())
for start in range(0, len(everything), 64):
    batch = [to_pixels(picture.load(), size) for picture in everything[start : start + 64]]
    use.update(tokenizer.encode(torch.stack(batch)))
result = use.result()
for depth, (used, perplexity) in enumerate(zip(result["used"], result["perplexity"], strict=True)):
    print(f"depth {depth}: {used:.0%} of {K} codes used, as varied as {perplexity:.0f} equally frequent ones")
chart = Path(scratch.name, "code_use.png")
plot_code_use({"shapes": use.counts_QK}, chart)
Image.open(chart)

# %% [markdown]
# ## What to try next
#
# - Pictures of your own: `to_pixels(open_image("cat.jpg"), size)`. What becomes of what the tokenizer never saw?
# - Swap depth 1 instead of depth 0; shift a picture by a cell with `codes.roll(1, 1)`.
# - Another quantizer: `vq-train images=shapes vq_size=smoke quantizer=fsq out=runs/fsq`, then `TOKENIZER` above. What
#   others there are, and what they cost: [docs/tokenizers.md](../docs/tokenizers.md).
# - Watch one learn, from Python: [training](training.ipynb). Let a language model write the codes:
#   [generation](generation.ipynb).
