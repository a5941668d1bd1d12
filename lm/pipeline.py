"""Pipeline: prompts in, pictures and text out; the bundle, one folder that anyone can load.

The folder is a plain Hugging Face model (AutoModelForCausalLM and AutoTokenizer load it without this package), with
`vq/` (the image tokenizer), `multimodal.json` (ranges, layout, grid, head, fingerprint, version) and, for heads that
have weights, `head.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lm.heads.depth_transformer
import lm.heads.layered
import lm.heads.linear  # noqa: F401  the three declare the heads that a bundle may name
from lm.decoding import Sampling, draw_images, draw_text
from lm.heads import Head
from lm.model import MultimodalLM
from lm.sequence import LAYOUTS, Image, Layout, Segment, SequenceFormat, Text
from lm.source import Extended
from lm.vocab import Vocabulary, ids_to_text, text_to_ids
from vq.images import contact_sheet, to_image, to_pixels, to_rgb
from vq.store import CodeStore
from vq.tokenizer import ImageTokenizer
from vqlm import __version__
from vqlm.checkpoint import describe, load_tensors, rebuild
from vqlm.errors import ConfigError, nearest
from vqlm.files import new_folder, write_json
from vqlm.hardware import Device, detect

FORMAT = 1
ROWS = 64  # pictures drawn together; twice as many rows with guidance


@dataclass
class Pipeline:
    """A multimodal language model, its text tokenizer, its image tokenizer, and how it draws unless told otherwise."""

    model: MultimodalLM
    tokenizer: PreTrainedTokenizerFast
    images: ImageTokenizer
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def assemble(
        cls, extended: Extended, head: Head, layout: Layout, store: CodeStore, sampling: Sampling
    ) -> Pipeline:
        """A pipeline to train: a language model, a head, and the image tokenizer that a store was made with."""
        images = ImageTokenizer.from_pretrained(store.tokenizer_folder)
        store.check(images)
        assert store.grid is not None
        form = SequenceFormat(extended.vocabulary, layout, store.grid)
        return cls(MultimodalLM(extended.lm, head, form), extended.tokenizer, images, sampling)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: Device = "auto") -> Pipeline:
        """Load a bundle. ConfigError says which part is missing, damaged or of another model."""
        folder = Path(folder)
        about = read_about(folder)
        images = ImageTokenizer.from_pretrained(folder / "vq")
        if images.fingerprint != about["fingerprint"]:
            raise ConfigError(
                f"{folder} was trained on codes of tokenizer {about['fingerprint']}, "
                f"its vq/ holds tokenizer {images.fingerprint}; codes of one mean nothing to the other"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            language_model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            )
        except Exception as error:  # transformers, tokenizers and safetensors each raise their own
            raise ConfigError(f"cannot load the language model in {folder}: {error}") from error
        form, head, sampling = read_parts(about, folder)
        if head.state_dict():
            load_tensors(head, folder / "head.safetensors")
        check_names(tokenizer, form.vocabulary)
        pipeline = cls(MultimodalLM(language_model, head, form), tokenizer, images, sampling)
        return pipeline.to(detect(device, "fp32").device)

    def to(self, device: torch.device) -> Pipeline:
        """Move both models to a device, ready to draw."""
        self.model.eval().to(device)
        self.images.eval().to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the bundle, atomically: a reader sees the old folder or the new one."""
        with new_folder(folder) as part:
            self.model.lm.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            self.images.save_pretrained(part / "vq")
            head = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.head.state_dict().items()}
            if head:
                save_file(head, str(part / "head.safetensors"))
            write_json(part / "multimodal.json", self.about())

    def about(self) -> dict[str, Any]:
        """What multimodal.json says."""
        form = self.model.form
        return {
            "format": FORMAT,
            "vqlm": __version__,
            "fingerprint": self.images.fingerprint,
            "vocabulary": form.vocabulary.to_json(),
            "layout": form.layout.name,
            "grid": list(form.grid),
            "head": describe(self.model.head),
            "sampling": asdict(self.sampling),
        }

    def generate(
        self,
        prompt: str | list[str],
        n: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[PILImage.Image]:
        """Draw n pictures of a prompt (of each prompt: n·len(prompt), the first prompt's first).

        guidance: u + s·(c - u) on the logits, 1 = none. temperature: 0 = greedy. top_k: 0 = all. top_p: 1 = all.
        What is None is as in `self.sampling`, the values that the model was measured with: what suits one model
        ruins another. The same seed gives the same pictures on the same machine. ValueError on values out of range.
        """
        return self.show(self.draw(prompt, n, self.sampling_with(guidance, temperature, top_k, top_p), seed))

    def sampling_with(
        self, guidance: float | None, temperature: float | None, top_k: int | None, top_p: float | None
    ) -> Sampling:
        """These values, and for those that are None our own."""
        given = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return replace(self.sampling, **{name: value for name, value in given.items() if value is not None})

    @staticmethod
    def show(x_NCHW: Tensor) -> list[PILImage.Image]:
        """Pixels in [-1,1] → pictures."""
        return [to_image(x_CHW) for x_CHW in x_NCHW]

    def draw(self, prompt: str | list[str], n: int, sampling: Sampling, seed: int) -> Tensor:
        """As `generate`, as pixels (N,3,H,W) in [-1,1]."""
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not isinstance(n, int) or n < 1 or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"n={n} must be a whole number from 1, and prompt a string or a list of strings")
        form, random = self.model.form, torch.Generator().manual_seed(seed)
        starts = [form.image_prompt(self._segments([p])) for p in prompts for _ in range(n)]
        drawn: list[Image] = []
        for first in range(0, len(starts), ROWS):
            drawn += draw_images(
                self.model, starts[first : first + ROWS], form.image_prompt([]), sampling, random
            )
        return self.decode(drawn)

    def encode_text(self, text: str) -> list[int]:
        """A user's text → ids; names of special tokens in it stay ordinary text."""
        return text_to_ids(self.tokenizer, text)

    def decode(self, pictures: list[Image]) -> Tensor:
        """Codes → pixels (N,3,H,W) in [-1,1], on the CPU."""
        codes_BhwQ = torch.stack([p.codes_hwQ for p in pictures]).to(self.device)
        return self.images.decode(codes_BhwQ).cpu()

    def caption(self, image: PILImage.Image, limit: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Words for a picture; greedy unless a temperature is given."""
        return self.captions([image], limit, temperature, seed)[0]

    def captions(
        self, pictures: list[PILImage.Image], limit: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Words for each picture."""
        return self.describe_images([self._encode(picture) for picture in pictures], limit, temperature, seed)

    def describe_images(
        self, pictures: list[Image], limit: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Words for each picture given as codes."""
        if not pictures:
            return []
        prompts = [self.model.form.build([picture], end=False) for picture in pictures]
        random = torch.Generator().manual_seed(seed)
        drawn = draw_text(self.model, prompts, Sampling(1.0, temperature), random, limit, images=False)
        return [ids_to_text(self.tokenizer, ids) for ids, _ in drawn]

    def complete(
        self,
        prompt: list[str | PILImage.Image],
        limit: int = 64,
        max_images: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str | PILImage.Image]:
        """Go on from text and pictures in any order; text and pictures come back in the order they were drawn.

        limit: most text ids; max_images: most pictures, after which <image_start> cannot be drawn.
        """
        sampling = self.sampling_with(guidance, temperature, top_k, top_p)
        random = torch.Generator().manual_seed(seed)
        form, segments = self.model.form, self._segments(prompt)
        made: list[Segment] = []
        remaining, pictures = limit, 0
        while remaining > 0:
            start = form.build([*segments, *made], end=False)
            may_draw = pictures < max_images
            (ids, wants_image), *_ = draw_text(self.model, [start], sampling, random, remaining, may_draw)
            remaining -= max(1, len(ids))
            if ids:
                made.append(Text(tuple(ids)))
            if not wants_image:
                break
            start = form.image_prompt([*segments, *made])
            made += draw_images(self.model, [start], form.image_prompt([]), sampling, random)
            pictures += 1
        return [self._show(segment) for segment in made]

    def _segments(self, prompt: list[str | PILImage.Image]) -> list[Segment]:
        segments: list[Segment] = []
        for part in prompt:
            if isinstance(part, str):
                segments += [Text(tuple(self.encode_text(part)))] if part.strip() else []
            elif isinstance(part, PILImage.Image):
                segments.append(self._encode(part))
            else:
                raise ValueError(f"a prompt holds {type(part).__name__}; allowed: str and PIL images")
        return segments

    def _encode(self, picture: PILImage.Image) -> Image:
        if not isinstance(picture, PILImage.Image):
            raise ValueError(
                f"a picture is expected, found {type(picture).__name__}; vq.images.open_image reads files"
            )
        height, width = self.model.form.grid
        if height != width:
            raise ValueError(f"pictures are read as squares, this model draws {height}x{width} cells")
        x_CHW = to_pixels(to_rgb(picture), height * self.images.downsample)
        return Image(self.images.encode(x_CHW[None].to(self.device))[0].cpu())

    def _show(self, segment: Segment) -> str | PILImage.Image:
        if isinstance(segment, Text):
            return ids_to_text(self.tokenizer, list(segment.ids))
        return to_image(self.decode([segment])[0])


def sheet(pictures: list[PILImage.Image], labels: list[str], columns: int = 8) -> PILImage.Image:
    """Pictures under each other in rows, each with its words beneath."""

    def rows(items: list[Any]) -> list[list[Any]]:
        return [items[i : i + columns] for i in range(0, len(items), columns)]

    return contact_sheet(rows(pictures), rows(labels))


def read_about(folder: Path) -> dict[str, Any]:
    """multimodal.json of a bundle; ConfigError if there is none, or of another format."""
    path = folder / "multimodal.json"
    if not path.is_file():
        siblings = [p.parent.name for p in folder.parent.glob("*/multimodal.json")]
        raise ConfigError(f"no model at {folder}: multimodal.json is missing{nearest(folder.name, siblings)}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ConfigError(f"{path} has format {about['format']!r}; this version of vqlm reads {FORMAT}")
        missing = {"fingerprint", "vocabulary", "layout", "grid", "head"} - about.keys()
        if missing:
            raise ConfigError(f"{path} lacks {sorted(missing)}")
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    return about


def read_parts(about: dict[str, Any], folder: Path) -> tuple[SequenceFormat, Head, Sampling]:
    """The parts that multimodal.json describes; ConfigError if it does not describe them rightly."""
    try:
        head = rebuild(about["head"])
        if not isinstance(head, Head):
            raise ConfigError(f"head is a {type(head).__name__}")
        return read_format(about), head, Sampling(**about.get("sampling", {}))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{folder / 'multimodal.json'} is damaged: {error}") from error


def read_format(about: dict[str, Any]) -> SequenceFormat:
    if about["layout"] not in LAYOUTS:
        raise ConfigError(f"unknown layout {about['layout']!r}; known: {sorted(LAYOUTS)}")
    height, width = about["grid"]
    return SequenceFormat(
        Vocabulary.from_json(about["vocabulary"]), LAYOUTS[about["layout"]](), (int(height), int(width))
    )


def check_names(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """The names of the first and last image token stand at the ends of the image range."""
    last = vocabulary.depth * vocabulary.codebook_size - 1
    found = [tokenizer.convert_tokens_to_ids(f"<|image_{i}|>") for i in (0, last)]
    expected = [vocabulary.image_offset, vocabulary.size - 1]
    if found != expected:
        raise ConfigError(f"the text tokenizer puts image tokens at {found}, multimodal.json at {expected}")
