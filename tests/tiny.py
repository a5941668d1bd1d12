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


def write_gguf(path, lm, tokenizer):
    """A llama model and a byte-level BPE in llama.cpp's format, with names and row order of its own."""
    import gguf

    c = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*model["vocab"], "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(model["vocab"]) + [3, 3])
    writer.add_token_merges([" ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in lm.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp turns pairs, transformers halves
            n = c.num_attention_heads
            tensor = tensor.reshape(n, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


class MadePictures:
    """`vq.store.Pictures` without pixels: numbered captions, three to a concept, a fifth held out."""

    digest = "made"

    def __init__(self, count, more_captions=""):
        self.count, self.more = count, more_captions

    def __len__(self):
        return self.count

    def load(self, start, stop):
        import torch

        from vq.store import Loaded, Record

        records = [
            Record(
                f"p{i:07d}",
                f"a red circle, inset {i}{self.more}",
                f"c{i // 3}",
                "heldout" if i // 3 % 5 == 4 else "train",
            )
            for i in range(start, stop)
        ]
        return Loaded(records, torch.zeros(stop - start, 3, 1, 1, dtype=torch.uint8))


class MadeCodes:
    """A tokenizer whose codes are drawn, for stores of made pictures."""

    image_size, downsample, fingerprint = 8, 4, "made"

    def __init__(self, codebook_size=16, depth=2, grid=(2, 2)):
        import numpy as np

        self.codebook_size, self.depth, self.grid, self.random = (
            codebook_size,
            depth,
            grid,
            np.random.default_rng(0),
        )

    def encode(self, x_BCHW):
        import torch

        shape = (len(x_BCHW), *self.grid, self.depth)
        return torch.from_numpy(self.random.integers(0, self.codebook_size, shape))

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps({"fingerprint": self.fingerprint}))


def write_made_store(folder, count, shard_size, tokenizer=None, more_captions=""):
    """A store of made pictures with drawn codes; returns its folder."""
    from vq.store import write_store

    made = MadePictures(count, more_captions)
    write_store(
        folder,
        tokenizer or MadeCodes(),
        made,
        source={"name": "made"},
        shard_size=shard_size,
        batch_size=1024,
        progress=False,
    )
    return folder


class Signalled:
    """A run's batches; a signal comes while batch `at` is read."""

    def __init__(self, batches, at, number=signal.SIGTERM):
        self.batches, self.at, self.number = batches, at, number

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, n):
        if n == self.at:
            os.kill(os.getpid(), self.number)
        return self.batches[n]
