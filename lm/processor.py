"""The processor for transformers: text and pictures in, ids out; ids in, text and pictures out. No language model.

    model = AutoModelForCausalLM.from_pretrained(folder)
    processor = VqlmProcessor.from_pretrained(folder)
    inputs = processor(text="a red apple", return_for_image_generation=True, return_tensors="pt")
    ids = model.generate(**inputs, logits_processor=[processor.grammar()], max_new_tokens=processor.picture_tokens())
    processor.post_process_multimodal_output(ids, generation_mode="image")

It follows the names of transformers' own processors of such models (Emu3, Janus, Chameleon), with two differences. The
image tokenizer is here and not in the model, so a picture becomes ids at once and there are no pixel values. Text is
read in pieces and never put together with the names of special tokens, so that no spelling of it becomes an image id.

For bundles whose plain model is the whole model: the flat layout with the linear head.

Legend: B rows, T positions, L positions of a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import (
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from lm.bundle import PROCESSOR, check_files, check_plain, read_about, write_about
from lm.logits_processor import GrammarProcessor
from lm.pipeline import Translator
from lm.sequence import Segment, Text
from vqlm.files import write_text
from vqlm.hub import local_folder

PLACE = "<image>"  # where a picture stands in a text; only as many as pictures are given
AROUND = re.compile(rf"\s*{PLACE}\s*")
Part = str | PILImage.Image
Size = tuple[int, int]


class VqlmProcessor(ProcessorMixin):
    """Prepares what a bundle's plain language model reads, and shows what it wrote.

    tokenizer: the bundle's; translator: its image tokenizer and format; about: what its multimodal.json says.
    """

    image_token = PLACE

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, translator: Translator | None = None, about: Any = None
    ):
        if translator is None or about is None:
            raise ValueError("a processor is made by VqlmProcessor.from_pretrained(folder of a bundle)")
        check_plain(about, translator.form)
        super().__init__(tokenizer)
        self.translator, self.about = translator, about

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, **ignored: Any
    ) -> VqlmProcessor:
        """Of a bundle, or of what `save_pretrained` wrote: a folder or a hub id.

        ConfigError where a part is missing or damaged, ValueError where the plain model is not the whole model. What
        AutoProcessor gives beside it (`trust_remote_code`, …) has no use here: there is no code in a bundle.
        """
        folder = local_folder(pretrained_model_name_or_path, revision)
        about = read_about(folder)
        check_files(folder, about, ".json")  # the language model is not read here
        translator = Translator.from_pretrained(folder)
        return cls(translator.tokenizer, translator, about)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write text tokenizer, vq/, multimodal.json and processor_config.json into a folder, beside what is there."""
        folder = Path(save_directory)
        self.tokenizer.save_pretrained(folder)
        self.translator.images.save_pretrained(folder / "vq")
        write_about(folder, self.about)
        write_text(folder / "processor_config.json", self.to_json_string())
        return [str(folder / "processor_config.json")]

    def to_dict(self) -> dict[str, Any]:
        return dict(PROCESSOR)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to(self, device: torch.device | str) -> VqlmProcessor:
        """Move the image tokenizer; ids are made on the CPU."""
        self.translator.images.to(device)
        return self

    # --- to ids ------------------------------------------------------------------------------------------------------

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: PILImage.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        return_for_image_generation: bool = False,
        size: Size | None = None,
        padding: bool = True,
        padding_side: Literal["left", "right"] = "left",
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Text and pictures → input_ids and attention_mask (B,T), a row for each text.

        images: one, a list in the order of the places `<image>` in all texts, or a list of lists, one for each text.
        Without a text, each picture is a prompt of its own. return_for_image_generation: each row ends with
        <image_start> and the size, so that a picture follows. size: height and width in pixels, one of
        `translator.sizes`; None: the first. padding: rows of one length, with <pad> on this side and 0 in the mask.

        ValueError where places and pictures are not as many, on sizes that the model does not know, and on a given
        picture where the model reads pictures bidirectionally, which a plain model does not do.
        """
        rows = place(images, text)
        return self.lay(rows, return_for_image_generation, size, padding, padding_side, return_tensors)

    def lay(
        self,
        rows: Sequence[Sequence[Part]],
        return_for_image_generation: bool = False,
        size: Size | None = None,
        padding: bool = True,
        padding_side: Literal["left", "right"] = "left",
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """As a call, for rows that are lists of text and pictures in any order: there `<image>` is text too."""
        if size is not None and not return_for_image_generation:
            raise ValueError(f"size={size}: of a picture to draw, with return_for_image_generation=True")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: left or right")
        grid = self.translator.grid_of(size)
        made = []
        for row in rows:
            segments = self._segments(row)
            form = self.translator.form
            laid = (
                form.image_prompt(segments, grid)
                if return_for_image_generation
                else form.lay(segments, end=False)
            )
            made.append(laid.ids_TW[:, 0].tolist())
        longest = max(map(len, made)) if padding else 0
        fill = [[self.translator.form.vocabulary.pad] * (longest - len(ids)) for ids in made]
        masks = [[1] * len(ids) for ids in made]
        zeros = [[0] * len(pads) for pads in fill]
        left = padding_side == "left"
        data = {
            "input_ids": [f + ids if left else ids + f for ids, f in zip(made, fill, strict=True)],
            "attention_mask": [f + mask if left else mask + f for mask, f in zip(masks, zeros, strict=True)],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Any],
        tokenize: bool = True,
        return_dict: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """A conversation (or several) → what a call gives; `return_dict=False`: the ids alone.

        The texts and pictures (`{"type": "image", "image": a PIL image}`) of all messages in their order: these models
        know documents and no turns, so roles are not marked, and there is nothing to add for an answer. ValueError on
        pictures by address or path: none is opened here.
        """
        if not tokenize:
            raise ValueError("tokenize=False: there is no text form; a picture's ids stand in no text")
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        rows = [parts_of(each) for each in (conversation if several else [conversation])]
        made = self.lay(rows, **options)
        return made if return_dict else made["input_ids"]

    def picture_tokens(self, size: Size | None = None) -> int:
        """The ids that follow a prompt for a picture: its cells, the ends of its rows, and <image_end>."""
        return len(self.translator.form.plan(self.translator.grid_of(size))) + 1

    def grammar(self, images: bool = True) -> GrammarProcessor:
        """For `generate(logits_processor=[…])`: nothing but whole pictures and text can be drawn. For one call."""
        return GrammarProcessor(self.translator.form, images)

    def _segments(self, row: Sequence[Part]) -> list[Segment]:
        if self.translator.form.picture_attention == "bidirectional" and not all(
            isinstance(part, str) for part in row
        ):
            raise ValueError(
                "this model reads a given picture bidirectionally, a plain causal language model does not: its words "
                "would be other ones; use lm.Pipeline"
            )
        return self.translator.segments(row)

    # --- from ids ----------------------------------------------------------------------------------------------------

    def read(self, ids_BT: Any, skip_prompt: int = 0) -> list[list[Part]]:
        """Rows as `generate` returns them, prompt included → the texts and pictures of each, in their order.

        skip_prompt: columns of the prompt, to leave out what stands there; a picture that the prompt only begins is
        part of the answer. ValueError on an unfinished picture, or an id out of its place.
        """
        return [
            [self.translator.show_segment(segment) for segment in self._drawn(row, skip_prompt)]
            for row in rows_of(ids_BT)
        ]

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: Literal["text", "image"] | None = None,
        skip_prompt: int = 0,
        **options: Any,
    ) -> list[Any]:
        """What `generate` returned → the text of each row, or (`generation_mode="image"`) all pictures, row by row."""
        if generation_mode not in (None, "text", "image"):
            raise ValueError(f"generation_mode={generation_mode!r}: text or image")
        if generation_mode == "image":
            made = chain.from_iterable(self.read(generated_outputs, skip_prompt))
            return [part for part in made if isinstance(part, PILImage.Image)]
        rows = [row[skip_prompt:] for row in rows_of(generated_outputs)]
        told = self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens, **options)
        return [each.strip() if skip_special_tokens else each for each in told]

    def decode_image_tokens(self, ids_BL: Any, size: Size | None = None) -> list[PILImage.Image]:
        """What follows prompts for pictures of one size, with or without <image_end> → pictures.

        ValueError on an id that is not of its depth, and on other lengths.
        """
        form, grid = self.translator.form, self.translator.grid_of(size)
        L, pictures = len(form.plan(grid)), []
        for row in rows_of(ids_BL):
            if len(row) == L + 1 and row[L] == form.vocabulary.image_end:
                row = row[:L]
            if len(row) != L:
                raise ValueError(f"{len(row)} ids; a picture of {grid} cells has {L}, and <image_end>")
            pictures.append(form.read_image(torch.tensor(row)[:, None], grid))
        return self.translator.show(self.translator.decode(pictures)) if pictures else []

    def _drawn(self, row: list[int], skip_prompt: int) -> list[Segment]:
        """Segments of a row from its <bos> on, without those that end in the first columns."""
        v = self.translator.form.vocabulary
        if v.bos not in row:
            raise ValueError(
                "a row must begin with <bos>; give rows as `generate` returns them, prompt included"
            )
        start = row.index(v.bos)
        stop = (
            row.index(v.eos, start + 1) if v.eos in row[start + 1 :] else len(row)
        )  # <bos> may be the same id
        made = self._split(row[start:stop])
        given = row[start:skip_prompt]
        while given and given[-1] in (v.image_start, *v.sizes):
            given.pop()
        known = self._split(given) if given else []
        rest = made[len(known) :]
        if known and isinstance(last := known[-1], Text) and isinstance(same := made[len(known) - 1], Text):
            more = same.ids[len(last.ids) :]
            rest = [*([Text(more)] if more else []), *rest]
        return rest

    def _split(self, ids: list[int]) -> list[Segment]:
        return self.translator.form.split(torch.tensor(ids)[:, None])


def rows_of(ids: Any) -> list[list[int]]:
    """(B,T) or (T) ids, a tensor or lists → lists of whole numbers."""
    rows = ids.tolist() if isinstance(ids, Tensor) or hasattr(ids, "tolist") else list(ids)
    return [list(row) for row in rows] if rows and not isinstance(rows[0], int) else [rows] if rows else []


def place(images: Any, text: str | Sequence[str] | None) -> list[list[Part]]:
    """Texts and pictures → rows of parts: pictures stand at the places in the texts, without the spaces around them.

    ValueError if their numbers differ.
    """
    if text is None:
        if images is None:
            raise ValueError("neither text nor images: nothing to prepare")
        return [[picture] for picture in flat(images)]
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError("text must be a string or a list of strings")
    split = [AROUND.split(each) for each in texts]
    counts = [len(pieces) - 1 for pieces in split]
    if is_nested(images):
        if not all(isinstance(each, list | tuple) for each in images):
            raise ValueError(
                "images hold both pictures and lists of pictures: one list, or a list for each text"
            )
        if [len(each) for each in images] != counts:
            raise ValueError(
                f"texts have {counts} places {PLACE}, and {[len(each) for each in images]} images"
            )
    pictures = flat(images)
    if len(pictures) != sum(counts):
        raise ValueError(
            f"texts have {sum(counts)} places {PLACE}, {len(pictures)} images were given; `lay` and "
            "`apply_chat_template` take text and pictures apart, and there the word is text"
        )
    following = iter(pictures)
    return [
        [pieces[0], *chain.from_iterable((next(following), piece) for piece in pieces[1:])]
        for pieces in split
    ]


def is_nested(images: Any) -> bool:
    return isinstance(images, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in images)


def flat(images: Any) -> list[PILImage.Image]:
    """One picture, a list, or a list of lists → a list. ValueError on what is no PIL image: a name would be text."""
    lists = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
    made = [one for each in lists for one in (each if isinstance(each, (list, tuple)) else [each])]
    if wrong := {type(each).__name__ for each in made if not isinstance(each, PILImage.Image)}:
        raise ValueError(
            f"images hold {', '.join(sorted(wrong))}; allowed: PIL images (PIL.Image.open reads files)"
        )
    return made


def parts_of(conversation: Sequence[Any]) -> list[Part]:
    """The texts and pictures of a conversation's messages. ValueError on anything else."""
    parts: list[Part] = []
    if not conversation:
        raise ValueError("a conversation without messages: nothing to prepare")
    for message in conversation:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str | list | tuple):
            raise ValueError(
                f"a message is {message!r}; allowed: {{'role': …, 'content': a string, or a list of parts}}"
            )
        if isinstance(content, str):
            parts.append(content)
            continue
        for part in content:
            if not isinstance(part, dict):
                raise ValueError(
                    f"a part is {part!r}; allowed: {{'type': 'text', 'text': …}} and images alike"
                )
            kind = str(part.get("type"))
            found = part.get(kind)
            if not isinstance(found, {"text": str, "image": PILImage.Image}.get(kind, ())):
                raise ValueError(
                    f"a part of type {kind!r} holds {type(found).__name__}; allowed: "
                    '{"type": "text", "text": str} and {"type": "image", "image": a PIL image}'
                )
            parts.append(found)  # pyright: ignore[reportArgumentType]  checked right above
    return parts


class _Key(PreTrainedConfig):
    """What AutoProcessor knows the processor by. No model has this type: the language model is a plain one."""

    model_type = "vqlm"


AutoProcessor.register(_Key, VqlmProcessor, exist_ok=True)
