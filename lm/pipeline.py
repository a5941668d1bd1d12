"""Pipeline: prompts in, pictures and text out; the bundle, one folder that anyone can load.

The folder is a plain Hugging Face model (AutoModelForCausalLM and AutoTokenizer load it without this package), with
`vq/` (the image tokenizer), `multimodal.json` (ranges, layout, grids, head, fingerprint, version), for heads that have
weights `head.safetensors`, and for readers `README.md` and, once it was measured, `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.bundle import (
    FILES,
    PROCESSOR,
    about,
    check_codes,
    check_files,
    check_names,
    is_plain,
    read_about,
    read_format,
    read_metrics,
    read_parts,
    write_about,
)
from lm.card import card
from lm.decoding import Drawing, Sampling, Watch, draw_all, draw_images, draw_text, likelihoods, unwatched
from lm.heads import Head
from lm.model import MultimodalLM
from lm.rows import code_vectors
from lm.sequence import NONE, Grid, Image, Layout, PictureAttention, Segment, SequenceFormat, Text
from lm.source import Extended, Pictures, open_model
from lm.vocab import ids_to_text, text_to_ids
from vq.images import (
    MAX_PIXELS,
    Reject,
    contact_sheet,
    nearest_shape,
    open_image,
    to_image,
    to_pixels,
    to_rgb,
)
from vq.store import CodeStore
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.files import new_folder, write_json, write_text
from vqlm.hardware import Device, detect
from vqlm.hub import Hub, check_repo_id, local_folder, upload

MASK_DETAIL = 8  # pixels of a mask that a cell's side is judged by


class Translator:
    """Text and pictures ↔ segments of ids and codes: all that a bundle needs to read and show, without its model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, images: ImageTokenizer, form: SequenceFormat):
        self.tokenizer, self.images, self.form = tokenizer, images, form

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Translator:
        """Of a bundle, a folder or a hub id. ConfigError says which part is missing, damaged or of another model."""
        folder = local_folder(folder)
        description = read_about(folder)
        images = ImageTokenizer.from_pretrained(folder / "vq")
        if images.fingerprint != description["fingerprint"]:
            raise ConfigError(
                f"{folder} was trained on codes of tokenizer {description['fingerprint']}, "
                f"its vq/ holds tokenizer {images.fingerprint}; codes of one mean nothing to the other"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers each raise their own
            raise ConfigError(f"cannot load the text tokenizer in {folder}: {error}") from error
        form = read_format(description, folder)
        check_names(tokenizer, form)
        check_codes(form, images)
        return Translator(tokenizer, images, form)

    @property
    def device(self) -> torch.device:
        return next(self.images.parameters()).device

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths in pixels of the pictures that the model knows; the first is what it draws unasked."""
        f = self.images.downsample
        return [(height * f, width * f) for height, width in self.form.grids]

    def grid_of(self, size: tuple[int, int] | None) -> Grid:
        """The grid of a size in pixels. ValueError on a size that the model does not know."""
        sizes = self.sizes
        if size is None:
            return self.form.grids[0]
        if not isinstance(size, tuple | list) or tuple(size) not in sizes:
            raise ValueError(f"size={size}: this model draws pictures of {sizes} (height, width)")
        return self.form.grids[sizes.index((size[0], size[1]))]

    # --- to segments -------------------------------------------------------------------------------------------------

    @staticmethod
    def read(data: bytes, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
        """The picture in the bytes of a file. ValueError on one that cannot be used, or has more pixels."""
        try:
            return open_image(data, max_pixels=max_pixels)
        except Reject as error:
            raise ValueError(str(error)) from error

    def encode_text(self, text: str) -> list[int]:
        """A user's text → ids; names of special tokens in it stay ordinary text. ValueError on what is no Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of a text is {text[error.start]!a}: a byte that is no UTF-8, or half of a "
                "surrogate pair. Give the text as UTF-8"
            ) from error
        return text_to_ids(self.tokenizer, text)

    def encode_image(self, picture: PILImage.Image) -> Image:
        """A picture → its codes, in the nearest shape that the model knows. ValueError on anything else."""
        if not isinstance(picture, PILImage.Image):
            raise ValueError(
                f"a picture is expected, found {type(picture).__name__}; vq.images.open_image reads files"
            )
        x_CHW = to_pixels(to_rgb(picture), nearest_shape(self.sizes, *picture.size))
        return Image(self.images.encode(x_CHW[None].to(self.device))[0].cpu())

    def segments(self, parts: str | PILImage.Image | Sequence[str | PILImage.Image]) -> list[Segment]:
        """Text and pictures in any order → segments that are read and not learnt. ValueError on other things."""
        parts = (
            [parts] if isinstance(parts, str | PILImage.Image) else parts
        )  # a string's parts are its letters
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str):
                segments += [Text(tuple(self.encode_text(part)), given=True)] if part.strip() else []
            elif isinstance(part, PILImage.Image):
                segments.append(replace(self.encode_image(part), given=True))
            else:
                raise ValueError(f"a prompt holds {type(part).__name__}; allowed: str and PIL images")
        return segments

    # --- from segments -----------------------------------------------------------------------------------------------

    def decode(self, pictures: list[Image]) -> Tensor:
        """Codes of pictures of one grid → pixels (N,3,H,W) in [-1,1], on the CPU."""
        codes_BhwQ = torch.stack([p.codes_hwQ for p in pictures]).to(self.device)
        return self.images.decode(codes_BhwQ).cpu()

    @staticmethod
    def show(x_NCHW: Tensor) -> list[PILImage.Image]:
        """Pixels in [-1,1] → pictures."""
        return [to_image(x_CHW) for x_CHW in x_NCHW]

    def show_segment(self, segment: Segment) -> str | PILImage.Image:
        """Words, or a picture."""
        if isinstance(segment, Text):
            return ids_to_text(self.tokenizer, list(segment.ids))
        return to_image(self.decode([segment])[0])


class Rater(Protocol):
    """Who says how well pictures fit captions: `vq.scorer.Scorer` is one."""

    def score(self, pictures: Tensor, captions: list[str]) -> Tensor: ...


@dataclass
class Pipeline(Translator):
    """A multimodal language model, its text tokenizer, its image tokenizer, and how it draws unless told otherwise.

    metrics: what was measured of it, as `lm-train` and `lm-evaluate` write it; for its card.
    """

    model: MultimodalLM
    tokenizer: PreTrainedTokenizerFast
    images: ImageTokenizer
    sampling: Sampling = field(default_factory=Sampling)
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def assemble(
        cls,
        extended: Extended,
        head: Head,
        layout: Layout,
        images: ImageTokenizer,
        grids: tuple[Grid, ...],
        sampling: Sampling,
        picture_attention: PictureAttention = "causal",
    ) -> Pipeline:
        """A pipeline to train: a language model, a head, and the image tokenizer that a store was made with."""
        form = SequenceFormat(extended.vocabulary, layout, grids, picture_attention)
        return cls(MultimodalLM(extended.lm, head, form), extended.tokenizer, images, sampling)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: Device = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        revision: str | None = None,
    ) -> Pipeline:
        """Load a bundle: a folder or a hub id. ConfigError says which part is missing, damaged or of another model.

        precision: of the language model's weights; bf16 takes half the memory and, where memory is the limit, half the
        time, and draws other pictures for the same seed. The image tokenizer stays fp32. revision: branch, tag or
        commit of a hub id.
        """
        folder = local_folder(folder, revision)
        parts, description = Translator.from_pretrained(folder), read_about(folder)
        try:
            language_model = open_model(folder, local=True)
        except Exception as error:  # transformers and safetensors each raise their own
            raise ConfigError(f"cannot load the language model in {folder}: {error}") from error
        form, head, sampling = read_parts(description, folder, language_model.config)
        check_files(folder, description)
        model = MultimodalLM(language_model, head, form)
        if precision == "bf16":
            model.to(torch.bfloat16)
        pipeline = cls(model, parts.tokenizer, parts.images, sampling, read_metrics(folder))
        return pipeline.to(detect(device, "fp32").device)

    def to(self, device: torch.device) -> Pipeline:
        """Move both models to a device, ready to draw."""
        self.model.eval().to(device)
        self.images.eval().to(device)
        return self

    @property
    def form(self) -> SequenceFormat:
        return self.model.form

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- the folder --------------------------------------------------------------------------------------------------

    @property
    def about(self) -> dict[str, Any]:
        """What multimodal.json says."""
        return about(self.form, self.model.head, self.sampling, self.images.fingerprint)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the bundle, atomically: a reader sees the old folder or the new one."""
        with new_folder(folder) as part:
            self.model.lm.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            self.images.save_pretrained(part / "vq")
            head = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.head.state_dict().items()}
            if head:
                save_file(head, str(part / "head.safetensors"))
            write_about(part, self.about)
            if is_plain(self.about, self.form):
                write_json(part / "processor_config.json", PROCESSOR)
            self.save_card(part)

    def save_card(
        self, folder: str | Path, repo_id: str = "", license: str | None = None, trained_on: str | None = None
    ) -> None:
        """Write the card, README.md, and the numbers behind it, metrics.json, into a bundle's folder."""
        if self.metrics:
            write_json(Path(folder, "metrics.json"), self.metrics)
        write_text(Path(folder, "README.md"), card(self, repo_id, license, trained_on))

    def push_to_hub(
        self,
        repo_id: str,
        license: str | None = None,
        trained_on: str | None = None,
        private: bool = True,
        token: str | None = None,
        hub: Hub | None = None,
    ) -> str:
        """Upload the bundle and its card to the Hugging Face hub; returns the address of the upload.

        license: of these weights, as the hub names licences, such as apache-2.0; None: the card says that none was
        given. trained_on: words for the card. private: of a repository that is made now. Only what `save_pretrained`
        writes is uploaded. ValueError on a repo_id that is none.
        """
        check_repo_id(repo_id)
        with TemporaryDirectory() as place:
            folder = Path(place, "model")
            self.save_pretrained(folder)
            self.save_card(folder, repo_id, license, trained_on)
            return upload(folder, repo_id, FILES, private, token=token, hub=hub)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | list[str],
        n: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        best_of: int = 1,
        scorer: Rater | None = None,
        watch: Watch = unwatched,
        **more: Any,
    ) -> list[PILImage.Image]:
        """Draw n pictures of a prompt (of each prompt: n·len(prompt), the first prompt's first).

        guidance: u + s·(c - u) on the logits, 1 = none. temperature: 0 = greedy. top_k: 0 = all. top_p: 1 = all.
        more: the other values of `lm.decoding.Sampling`, such as min_p, parallel or ramp. What is not given is as in
        `self.sampling`, the values that the model was measured with: what suits one model ruins another.
        size: height and width in pixels, one of `sizes`; None: the first of them, the most frequent one. best_of: draw
        so many for each picture and keep the one that `rank` finds best. watch: called after each pass with the rows
        under way (`lm.decoding.Row`). A prompt's n-th picture for a seed is the same whatever is drawn beside it (on
        the same machine, up to rounding). ValueError on values out of range.
        """
        sampling = self.sampling_with(guidance, temperature, top_k, top_p, **more)
        pictures = self.draw_codes(
            prompt, _whole(n, "n") * _whole(best_of, "best_of"), sampling, seed, size, watch
        )
        if best_of > 1:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            told = [each for each in prompts for _ in range(n)]
            tries = [pictures[first : first + best_of] for first in range(0, len(pictures), best_of)]
            pictures = [self._best(each, some, scorer) for each, some in zip(told, tries, strict=True)]
        return self.show(self.decode(pictures))

    def sampling_with(
        self,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **more: Any,
    ) -> Sampling:
        """These values, and for those that are not given our own. ValueError on names that `Sampling` does not have."""
        given = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p, **more}
        known = {each.name for each in fields(Sampling)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"unknown {', '.join(unknown)}; sampling has {', '.join(sorted(known))}")
        return replace(self.sampling, **{name: value for name, value in given.items() if value is not None})

    def draw_codes(
        self,
        prompt: str | list[str],
        n: int,
        sampling: Sampling,
        seed: int,
        size: tuple[int, int] | None = None,
        watch: Watch = unwatched,
    ) -> list[Image]:
        """As `generate`, as codes."""
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError("prompt must be a string or a list of strings")
        grid = self.grid_of(size)
        n = _whole(n, "n")
        starts = [self.form.image_prompt(self.segments([p]), grid) for p in prompts for _ in range(n)]
        return draw_images(self.model, starts, sampling, seeds(seed, n) * len(prompts), watch=watch)

    def edit(
        self,
        image: PILImage.Image,
        instruction: str,
        n: int = 1,
        guidance: float | None = None,
        image_guidance: float | None = None,
        seed: int = 0,
        **more: Any,
    ) -> list[PILImage.Image]:
        """n pictures that follow a picture and an instruction, for models trained on such documents (mixture.edit).

        guidance: how much the instruction counts; image_guidance: how much the picture does (`lm.logits.guide_edit`).
        """
        sampling = self.sampling_with(guidance, image_guidance=image_guidance, **more)
        picture = replace(self.encode_image(image), given=True)
        start = self.form.image_prompt([picture, *self.segments([instruction])], picture.grid)
        drawn = draw_images(self.model, [start] * _whole(n, "n"), sampling, seeds(seed, n), ((picture,), ()))
        return self.show(self.decode(drawn))

    def inpaint(
        self,
        image: PILImage.Image,
        redraw: Any,
        prompt: str = "",
        n: int = 1,
        guidance: float | None = None,
        seed: int = 0,
        **more: Any,
    ) -> list[PILImage.Image]:
        """Draw some cells of a picture anew; the others keep their codes.

        redraw: (h,w) of the picture's grid, True where a cell is to be drawn; or a picture of any size, white there.
        Cells are drawn in their order: a new one sees the kept ones before it, not those behind it.
        """
        sampling = self.sampling_with(guidance, **more)
        old = self.encode_image(image)
        redraw_hw = cells_to_redraw(redraw, old.grid, image.size)
        kept_hwQ = torch.where(redraw_hw[..., None], NONE, old.codes_hwQ)
        start = self.form.image_prompt(self.segments([prompt]), old.grid)
        drawings = [
            Drawing(start, sampling, each, images=1, contexts=((),), kept=kept_hwQ)
            for each in seeds(seed, _whole(n, "n"))
        ]
        drawn = [segment for segments in draw_all(self.model, drawings) for segment in segments]
        return self.show(self.decode([segment for segment in drawn if isinstance(segment, Image)]))

    def vary(
        self,
        image: PILImage.Image,
        share: float = 0.5,
        prompt: str = "",
        n: int = 1,
        seed: int = 0,
        **more: Any,
    ) -> list[PILImage.Image]:
        """n variations of a picture: a share of its cells, other ones for each, drawn anew."""
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: of the cells, from 0 to 1")
        grid, made = nearest_shape(self.sizes, *image.size), []
        h, w = (side // self.images.downsample for side in grid)
        for number, each in enumerate(seeds(seed, _whole(n, "n"))):
            random = np.random.default_rng([each, number])
            redraw = torch.from_numpy(random.random((h, w)) < share)
            made += self.inpaint(image, redraw, prompt, 1, seed=each, **more)
        return made

    def rank(self, prompt: str, images: list[PILImage.Image], scorer: Rater | None = None) -> list[float]:
        """How well each picture fits a prompt, larger is better: log p(prompt | picture) of this model (nats), or what
        a scorer of the same image tokenizer says (`vq.scorer.Scorer`; DALL·E and Parti re-rank with such a model).
        """
        return self._fit(prompt, [self.encode_image(image) for image in images], scorer)

    def _fit(self, prompt: str, pictures: list[Image], scorer: Rater | None) -> list[float]:
        if scorer is None:
            return likelihoods(self.model, pictures, Text(tuple(self.encode_text(prompt))))
        codes = [picture.codes_hwQ[None].to(self.device) for picture in pictures]
        return [float(scorer.score(codes_1hwQ, [prompt])) for codes_1hwQ in codes]

    def _best(self, prompt: str, pictures: list[Image], scorer: Rater | None) -> Image:
        fit = self._fit(prompt, pictures, scorer)
        return pictures[fit.index(max(fit))]

    # --- reading and writing -----------------------------------------------------------------------------------------

    def caption(self, image: PILImage.Image, limit: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Words for a picture; greedy unless a temperature is given."""
        return self.captions([image], limit, temperature, seed)[0]

    def captions(
        self, pictures: list[PILImage.Image], limit: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Words for each picture."""
        return self.describe_images(
            [self.encode_image(picture) for picture in pictures], limit, temperature, seed
        )

    def describe_images(
        self, pictures: list[Image], limit: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Words for each picture given as codes."""
        if not pictures:
            return []
        prompts = [self.form.lay([replace(picture, given=True)], end=False) for picture in pictures]
        told = draw_text(self.model, prompts, Sampling(1.0, temperature), seeds(seed, len(prompts)), limit)
        return [ids_to_text(self.tokenizer, ids) for ids in told]

    def complete(
        self,
        prompt: str | PILImage.Image | list[str | PILImage.Image],
        limit: int = 64,
        max_images: int = 1,
        min_images: int = 0,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        **more: Any,
    ) -> list[str | PILImage.Image]:
        """Go on from text and pictures in any order; text and pictures come back in the order they were drawn.

        limit: the most text ids; max_images: the most pictures; min_images: so many are drawn in any case, after the
        text if the model does not begin them before. limit=0 with both equal: pictures alone.
        """
        sampling = self.sampling_with(guidance, temperature, top_k, top_p, **more)
        if min(limit, max_images, min_images) < 0:
            raise ValueError(f"limit={limit}, max_images={max_images}, min_images={min_images}: not negative")
        max_images = max(max_images, min_images)
        start = self.form.lay(self.segments(prompt), end=False)
        drawing = Drawing(start, sampling, seeds(seed, 1)[0], limit, max_images, min_images, contexts=((),))
        (made,) = draw_all(self.model, [drawing])
        return [self.show_segment(segment) for segment in made]


def _whole(value: int, name: str) -> int:
    """The value; ValueError unless it is a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value} must be a whole number from 1")
    return value


def cells_to_redraw(redraw: Any, grid: Grid, size: tuple[int, int]) -> Tensor:
    """(h,w) bool. redraw: numbers of that shape; or a picture, white where it is to be drawn, which is cut to the grid
    as the picture of this size (width, height) is. ValueError on another shape.
    """
    if isinstance(redraw, PILImage.Image):
        mask = redraw.convert("L").resize(size, PILImage.Resampling.BOX).convert("RGB")
        x_CHW = to_pixels(mask, (grid[0] * MASK_DETAIL, grid[1] * MASK_DETAIL))
        return avg_pool2d(x_CHW[:1], MASK_DETAIL)[0] > 0
    redraw_hw = torch.as_tensor(redraw).bool()
    if tuple(redraw_hw.shape) != grid:
        raise ValueError(f"redraw has the shape {tuple(redraw_hw.shape)}, the picture has {grid} cells")
    return redraw_hw


def images_of(store: CodeStore) -> ImageTokenizer:
    """The image tokenizer that a store was made with. ConfigError if another one lies in its place."""
    images = ImageTokenizer.from_pretrained(store.tokenizer_folder)
    store.check(images)
    return images


def pictures_of(store: CodeStore, images: ImageTokenizer, row_ends: bool) -> Pictures:
    """What a vocabulary must name of a store's pictures, and what its codes stand for."""
    vectors_QKD = code_vectors(images.quantizer.lookup, store.codebook_size, store.depth)
    return Pictures(store.codebook_size, store.depth, store.grids, row_ends, vectors_QKD)


def seeds(seed: int, count: int) -> list[int]:
    """The seeds of so many pictures of one call; the n-th does not depend on how many there are."""
    sequences = [np.random.SeedSequence([abs(seed), n, int(seed < 0)]) for n in range(count)]
    return [int(each.generate_state(1, np.uint64)[0]) >> 1 for each in sequences]


def sheet(pictures: list[PILImage.Image], labels: list[str], columns: int = 8) -> PILImage.Image:
    """Pictures under each other in rows, each with its words beneath."""

    def rows(items: list[Any]) -> list[list[Any]]:
        return [items[i : i + columns] for i in range(0, len(items), columns)]

    return contact_sheet(rows(pictures), rows(labels))
