"""Tiny models and pictures that tests share: random weights, made drawings, seconds at most."""

import json
import os
import signal


def make_tokenizer(seed=0):
    """An image tokenizer with random weights: 16 px, f = 8, 2 depths of 16 codes."""
    import torch

    from vq.backbones.conv import ConvDecoder, ConvEncoder
    from vq.quantizers.residual import ResidualQuantizer
    from vq.tokenizer import ImageTokenizer

    torch.manual_seed(seed)
    parts = {"channels": [8, 16], "latent_dim": 4, "blocks": 1, "patch": 4}
    return ImageTokenizer(ConvEncoder(**parts), ResidualQuantizer(4, 16, 2), ConvDecoder(**parts), 16).eval()


SHAPES = ("circle", "square", "bar")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "black": (20, 20, 20)}


def draw_shape(shape, colour, size, shift):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), "white")
    box = (shift, shift, size - 1 - shift, size - 1 - shift)
    if shape == "bar":
        box = (shift, size // 3, size - 1 - shift, 2 * size // 3)
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
    return picture


def write_pictures(folder):
    """Drawings of 3 shapes, 4 colours, 4 sizes with metadata.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for shape in SHAPES:
        for colour in COLOURS:
            for shift in range(4):
                name = f"{colour}-{shape}-{shift}.png"
                draw_shape(shape, colour, 20, shift).save(folder / name)
                lines.append(json.dumps({"file_name": name, "text": f"a {colour} {shape}, inset {shift}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_format(layout="stacked", grid=(2, 2), codebook_size=16, depth=2, more_grids=(), row_ends=False):
    """A sequence format over a small text vocabulary, and its text tokenizer."""
    from lm.sequence import LAYOUTS, SequenceFormat
    from lm.vocab import extend, train_text_tokenizer

    tokenizer = train_text_tokenizer(["a red circle, inset 1", "a blue square"] * 4, 300)
    grids = (grid, *more_grids)
    vocabulary = extend(tokenizer, codebook_size, depth, grids, row_ends)
    return SequenceFormat(vocabulary, LAYOUTS[layout](), grids), tokenizer


HEADS = ("linear", "parallel", "layered", "depth_transformer")


def make_head(name, width, hidden_size=32, trunk_layers=5):
    from lm.heads.depth_transformer import DepthTransformerHead
    from lm.heads.layered import LayeredHead
    from lm.heads.linear import LinearHead
    from lm.heads.parallel import ParallelHead

    if name == "depth_transformer":
        return DepthTransformerHead(width, hidden_size, trunk_layers, dim=16, layers=1, heads=2)
    heads = {"linear": LinearHead, "parallel": ParallelHead, "layered": LayeredHead}
    return heads[name](width, hidden_size, trunk_layers)


QWEN = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def make_model(head="layered", layout="stacked", grid=(2, 2), depth=2, seed=0, **form):
    """A multimodal language model with random weights, large enough to tell ids apart; and its text tokenizer."""
    import torch

    from lm.model import MultimodalLM, from_scratch

    form, tokenizer = make_format(layout, grid, depth=depth, **form)
    torch.manual_seed(seed)
    lm = from_scratch({**QWEN, "initializer_range": 0.3}, form.vocabulary.size, seed)
    return MultimodalLM(lm, make_head(head, form.width), form).eval(), tokenizer


def make_plain_llama(folder):
    """A Hugging Face causal LM with none of our tokens, as a user would bring one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lm.vocab import train_text_tokenizer

    tokenizer = train_text_tokenizer(["a red circle, inset 1", "a blue square"] * 4, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantizer_files():
    """Name → what each file of conf/quantizer sets, its `defaults` merged in: tokenizer.quantizer, learner.losses."""
    from omegaconf import OmegaConf

    from vqlm.command import CONF

    def load(name):
        own = OmegaConf.load(CONF / "quantizer" / f"{name}.yaml")
        parts = [own if base == "_self_" else load(base) for base in own.pop("defaults", ["_self_"])]
        return OmegaConf.merge(*parts)

    return {
        path.stem: OmegaConf.to_container(load(path.stem))
        for path in sorted((CONF / "quantizer").glob("*.yaml"))
    }


def small_quantizers():
    """Name → node of each quantizer that ships, with a latent of 8 numbers and, where that is a setting, 16 codes."""
    nodes = {name: file["tokenizer"]["quantizer"] for name, file in quantizer_files().items()}
    small = {"dim": 8, "codebook_size": 16}
    return {name: node | {k: v for k, v in small.items() if k in node} for name, node in nodes.items()}


def make_quantizer(node, seed=0):
    """A quantizer from its node, with random weights that tell codes apart (new codebooks may be all but zero)."""
    import torch

    from vq.quantizers import CodebookQuantizer
    from vqlm.schema import build

    torch.manual_seed(seed)
    quantizer = build(node)
    if isinstance(quantizer, CodebookQuantizer):
        for book in range(quantizer.books):
            K, width = quantizer.codebook(book).shape
            quantizer.replace_codes(book, torch.arange(K), torch.randn(K, width))
    return quantizer


class Terminated:
    """A run's batches; SIGTERM comes while batch `at` is read."""

    def __init__(self, batches, at):
        self.batches, self.at = batches, at

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, n):
        if n == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.batches[n]
