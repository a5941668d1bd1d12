"""multimodal.json: what a bundle says of itself beside the plain Hugging Face folder. Written and read here.

ranges of ids, layout, grids, attention to pictures, head, sampling, fingerprint of the image tokenizer, version
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from lm.architecture import check_context
from lm.decoding import Sampling
from lm.heads import Head
from lm.heads.depth_transformer import DepthTransformerHead
from lm.heads.layered import LayeredHead
from lm.heads.linear import LinearHead
from lm.heads.parallel import ParallelHead
from lm.sequence import LAYOUTS, SequenceFormat
from lm.vocab import IMAGE_END, IMAGE_START, ROW_END, Vocabulary, grid_name
from vqlm import __version__
from vqlm.checkpoint import describe, load_tensors, rebuild
from vqlm.errors import ConfigError, nearest
from vqlm.files import read_json, seal_is_broken, sealed, sha256, write_json
from vqlm.hub import check_model_folder

FORMAT = 1
HEADS = (LinearHead, ParallelHead, LayeredHead, DepthTransformerHead)  # that a bundle may name
PLAIN_HEADS = (LinearHead.__name__, LayeredHead.__name__)  # that have no weights in the flat layout
PROCESSOR = {"processor_class": "VqlmProcessor"}  # processor_config.json: what AutoProcessor looks for
WRITTEN_AFTER = ("multimodal.json", "metrics.json", "processor_config.json")  # no part of the models
FILES = (  # of a bundle, for others; what else may lie in a folder is not sent anywhere
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "multimodal.json",
    "head.safetensors",
    "processor_config.json",
    "metrics.json",
    "vq/config.json",
    "vq/model.safetensors",
)
MOST, MOST_LAYERS = 65_536, 256  # what a description may ask for


class ImageTokenizerLike(Protocol):
    """The part of `vq.ImageTokenizer` that is compared here."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def depth(self) -> int: ...


def about(form: SequenceFormat, head: Head, sampling: Sampling, fingerprint: str) -> dict[str, Any]:
    """What multimodal.json says."""
    return {
        "format": FORMAT,
        "vqlm": __version__,
        "fingerprint": fingerprint,
        "vocabulary": form.vocabulary.to_json(),
        "layout": form.layout.name,
        "grids": [list(grid) for grid in form.grids],
        "picture_attention": form.picture_attention,
        "head": describe(head),
        "sampling": asdict(sampling),
    }


def read_about(folder: Path) -> dict[str, Any]:
    """multimodal.json of a bundle; ConfigError if there is none, or of another format, or if the folder asks for more
    than reading it (`vqlm.hub.check_model_folder`)."""
    path = folder / "multimodal.json"
    if not path.is_file():
        if (folder / "model" / "multimodal.json").is_file():
            raise ConfigError(
                f"no model at {folder}: it is a run's folder, whose model is {folder / 'model'}"
            )
        siblings = [p.parent.name for p in folder.parent.glob("*/multimodal.json")]
        raise ConfigError(f"no model at {folder}: multimodal.json is missing{nearest(folder.name, siblings)}")
    check_model_folder(folder)
    try:
        about = read_json(path)
        if about["format"] != FORMAT or isinstance(about["format"], bool):
            raise ConfigError(f"{path} has format {about['format']!r}; this version of vqlm reads {FORMAT}")
        missing = {"fingerprint", "vocabulary", "layout", "grids", "head"} - about.keys()
        if missing:
            raise ConfigError(f"{path} lacks {sorted(missing)}")
    except ConfigError:
        raise
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    return about


def check_files(folder: Path, about: dict[str, Any], ending: str = "") -> None:
    """ConfigError if multimodal.json, or a file beside it, is not what was saved: a bit may flip on any disk.

    ending: of the names of files that are to be read; the others are not hashed. Older bundles have no sums, and are
    read as they are.
    """
    advice = (
        "Copy the folder anew; if it was changed on purpose, save it with vqlm (`Pipeline`, `VqlmProcessor`), or "
        'take "files" and "seal" out of multimodal.json'
    )
    with _damage(folder):
        broken, sums = seal_is_broken(about), about.get("files", {})
        if broken or not isinstance(sums, dict):
            raise ConfigError(f"it does not fit its seal. {advice}")
    for name, saved in sums.items():
        path = folder / Path(name).name
        if not path.name.endswith(ending) or not path.is_file():  # what is missing is missed by who needs it
            continue
        if sha256(path) != saved:
            raise ConfigError(
                f"{path} is damaged or was changed: its SHA-256 is not that of the file that was saved. {advice}"
            )


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write multimodal.json, with the sums of the models' files that lie beside it, for `check_files`."""
    models = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")]
    sums = {path.name: sha256(path) for path in models if path.name not in WRITTEN_AFTER}
    plain = {name: value for name, value in about.items() if name not in ("files", "seal")}
    write_json(folder / "multimodal.json", sealed({**plain, "files": sums}))


def read_parts(about: dict[str, Any], folder: Path, config: Any) -> tuple[SequenceFormat, Head, Sampling]:
    """The parts that multimodal.json describes, for a language model of this configuration; the head has its weights.

    ConfigError if it does not describe them rightly, or asks for more than the files hold.
    """
    form, weights = read_format(about, folder), folder / "head.safetensors"
    with _damage(folder):
        check_context(config, form.longest_picture)
        sampling = Sampling(**about.get("sampling", {}))
        check_head(about["head"])
        with torch.device("meta"):  # no memory is taken before shapes have been compared with the file's
            head = rebuild(about["head"])
        if head.width != form.width:
            raise ConfigError(
                f"its {type(head).__name__} has {head.width} ids a position, the layout {form.layout.name} {form.width}"
            )
        if bool(head.state_dict()) != weights.is_file():
            there = (
                "has no weights, but head.safetensors is there"
                if weights.is_file()
                else "needs head.safetensors (or an older vqlm wrote it: train it again)"
            )
            raise ConfigError(f"its {type(head).__name__} {there}")
        if head.state_dict():
            check_shapes(head, weights)
            head = head.to_empty(device="cpu")
            load_tensors(head, weights)
    return form, head, sampling


def read_format(about: dict[str, Any], folder: Path) -> SequenceFormat:
    """Vocabulary, layout and grids of a bundle; ConfigError if they do not fit each other."""
    with _damage(folder):
        if about["layout"] not in LAYOUTS:
            raise ConfigError(f"unknown layout {about['layout']!r}; known: {sorted(LAYOUTS)}")
        given = about["vocabulary"]
        numbers = [v for k, v in given.items() if k != "sizes" and v is not None] + list(
            given.get("sizes", [])
        )
        grids = tuple((height, width) for height, width in about["grids"])
        sides = [side for grid in grids for side in grid]
        if not all(_whole(each, 2**31) for each in numbers) or not all(_whole(each, MOST) for each in sides):
            raise ConfigError(f"ids, sizes and sides of grids are whole numbers, found {[*numbers, *sides]}")
        if any(height * width > MOST for height, width in grids):
            raise ConfigError(f"grids={grids}: at most {MOST} cells")
        vocabulary, layout = Vocabulary.from_json(given), LAYOUTS[about["layout"]]()
        return SequenceFormat(vocabulary, layout, grids, about.get("picture_attention", "causal"))


def check_head(described: Any) -> None:
    """ConfigError unless it is a head, with plain numbers of possible sizes as arguments."""
    names = {each.__name__ for each in HEADS}
    kind = described.get("type") if isinstance(described, dict) else described
    if kind not in names:
        raise ConfigError(f"unknown type {kind!r} of a head; known: {sorted(names)}")
    for name, value in described.items():
        numbers = value if isinstance(value, list) else [value]
        if name != "type" and not all(each is None or _whole(each, MOST) for each in numbers):
            raise ConfigError(f"head.{name}={value!r}: whole numbers from 0 to {MOST} are expected")
    for name, most in (("layers", MOST_LAYERS), ("width", MOST_LAYERS)):
        if isinstance(described.get(name), int) and described[name] > most:
            raise ConfigError(f"head.{name}={described[name]}: at most {most}")


def check_plain(about: dict[str, Any], form: SequenceFormat) -> None:
    """ValueError, with the reason, unless the language model's folder alone is the whole model: one id a position, and
    a head without weights. Only then do transformers or vLLM compute the logits that were trained.
    """
    if form.width != 1:
        raise ValueError(
            f"layout {form.layout.name!r} has {form.width} ids a position, a plain causal language model one: train "
            "with layout=flat head=linear, or draw with lm.Pipeline"
        )
    head = about["head"]["type"] if isinstance(about["head"], dict) else about["head"]
    if head not in PLAIN_HEADS:
        raise ValueError(
            f"{head} has weights of its own, which a plain causal language model leaves out: train with head=linear, "
            "or draw with lm.Pipeline"
        )


def is_plain(about: dict[str, Any], form: SequenceFormat) -> bool:
    """Whether `check_plain` has nothing to say."""
    try:
        check_plain(about, form)
    except ValueError:
        return False
    return True


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was measured of a bundle, from its metrics.json; empty without one. ConfigError if it is damaged."""
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    try:
        metrics = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(metrics, dict):
        raise ConfigError(f"{path} is damaged: an object is expected, found {type(metrics).__name__}")
    return metrics


def check_shapes(head: Head, path: Path) -> None:
    """ConfigError unless the file has the head's tensors in their shapes; reads its header alone."""
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own and OS errors; all mean an unusable file
        raise ConfigError(f"cannot read {path}: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"{path.name} does not fit its {type(head).__name__}: {wrong[:4]}. If an older vqlm wrote it, train again"
        )


def check_codes(form: SequenceFormat, images: ImageTokenizerLike) -> None:
    """ConfigError unless the codes of the language model are those of the image tokenizer."""
    for name in ("codebook_size", "depth"):
        ours, theirs = getattr(form.vocabulary, name), getattr(images, name)
        if ours != theirs:
            raise ConfigError(f"multimodal.json has {name} {ours}, the image tokenizer in vq/ {theirs}")


def check_names(tokenizer: PreTrainedTokenizerFast, form: SequenceFormat) -> None:
    """ConfigError unless marks, and the first and last image token, have the ids that multimodal.json gives them."""
    v = form.vocabulary
    wanted = {f"<|image_{i}|>": v.image_offset + i for i in (0, v.depth * v.codebook_size - 1)}
    wanted |= {IMAGE_START: v.image_start, IMAGE_END: v.image_end}
    wanted |= {} if v.row_end is None else {ROW_END: v.row_end}
    wanted |= {grid_name(grid): i for grid, i in zip(form.grids, v.sizes, strict=False)}
    wanted |= {
        str(tokenizer.bos_token): v.bos,
        str(tokenizer.eos_token): v.eos,
        str(tokenizer.pad_token): v.pad,
    }
    found = {name: tokenizer.convert_tokens_to_ids(name) for name in wanted}
    if wrong := {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}:
        told = ", ".join(f"{name}: {theirs} and {ours}" for name, (theirs, ours) in list(wrong.items())[:4])
        raise ConfigError(f"ids of the text tokenizer and of multimodal.json differ: {told}")


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever a description makes fail is told as what it is: a damaged file."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{folder / 'multimodal.json'} is damaged: {error}") from error


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
