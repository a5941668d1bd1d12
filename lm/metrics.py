"""How well a multimodal model reads and draws, and what it kept: losses per modality, caption fidelity, plain text.

Drawings are looked for in the whole set as the image tokenizer rebuilds it, and compared with it as a set; where the
pictures themselves are at hand (`Originals`), with those too, and then with how near the tokenizer comes to them.

Legend: M drawn pictures, N pictures of the whole set, C H W pixels; B rows, T positions, V ids of the base model.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.data import Pairs
from lm.model import MultimodalLM
from lm.objectives.next_token import measure
from lm.packing import pack
from lm.pipeline import Pipeline
from lm.sequence import NONE, Grid
from lm.vocab import BOS, EOS, PAD
from vq.data import THREADS, ImageData
from vq.images import Reject, from_bytes
from vq.metrics import FrechetWavelet, psnr
from vq.store import CodeStore
from vqlm.errors import ConfigError
from vqlm.evaluation import undisturbed

NEAREST = 10
# Share of first codes, at least, that pictures give again if they are the ones that were encoded.
AGREEING = 0.8
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
POSITIONS = 1024  # that one forward pass of plain text scores: their logits over all ids must fit into memory


@torch.inference_mode()
def losses(model: MultimodalLM, pairs: Pairs, limit: int = 512, documents: int = 64) -> dict[str, float]:
    """Loss (nats) and bits per token of each modality, the other one given, over `limit` pairs (spread evenly).

    text: the caption after its picture. image: the picture after its caption; `image_bits_per_picture` sums a picture.
    """
    device = next(model.parameters()).device
    result: dict[str, float] = {}
    places = spread(len(pairs), limit)
    for task, name in (("image_to_text", "text"), ("text_to_image", "image")):
        nll, count = 0.0, 0
        for start in range(0, len(places), documents):
            chosen = places[start : start + documents]
            laid = [model.form.lay(pairs.document(i, task, given=True)) for i in chosen]
            batch = pack(laid, model.form, max(128, max(len(each) for each in laid)))
            part = measure(model, batch.to(device))[name == "image"]
            nll, count = nll + float(part.nll), count + part.count
        result[f"{name}_loss"] = nll / max(count, 1)
        result[f"{name}_bits"] = nll / max(count, 1) / math.log(2)
    result["image_bits_per_picture"] = nll / math.log(2) / len(places)  # pictures come last
    return result


class Originals:
    """The pictures that a store was made of, found again in their source by their ids.

    images: of it the source counts; shapes are those of the store, whatever it says. ConfigError as `candidates`.
    """

    def __init__(self, images: ImageData, store: CodeStore):
        told = store.manifest["job"]["source"]  # of a store that vq-encode did not write, anything
        images.size, images.multiple = told.get("size", store.image_size), store.downsample
        images.aspects, images.fit = told.get("aspects", images.aspects), told.get("fit", images.fit)
        self.images, self.name = images, images.source.name
        self.pictures = {each.id: each for part in images.candidates() for each in part}

    def read(self, pipeline: Pipeline, pairs: Pairs, own: list[int]) -> Tensor:
        """The pictures of some pairs of one grid, uint8 (N,3,H,W).

        ConfigError where one is not there or cannot be read, and where the codes say that they are others.
        """
        ids = [pairs.ids[i] for i in own]
        if missing := [each for each in ids if each not in self.pictures]:
            raise ConfigError(self._refusal(f"lacks {len(missing):,} pictures of it, such as {missing[0]!r}"))
        with ThreadPoolExecutor(THREADS) as threads:
            read = list(threads.map(lambda each: self.images.decode(self.pictures[each]), ids))
        shape = torch.Size([3, *(side * self.images.multiple for side in pairs.grids[own[0]])])
        found = [each for each in read if not isinstance(each, Reject) and each.shape == shape]
        if unlike := len(read) - len(found):
            raise ConfigError(
                self._refusal(f"has {unlike:,} of its pictures in another shape, or they cannot be read")
            )
        x_NCHW = torch.stack(found)
        self._check(pipeline, pairs, own, x_NCHW)
        return x_NCHW

    def _check(self, pipeline: Pipeline, pairs: Pairs, own: list[int], x_NCHW: Tensor) -> None:
        """By the first codes of some: ids alone may be those of any pictures, such as 0, 1, 2."""
        some = spread(len(own), 16)
        stored = torch.stack([pairs.codes[own[n]][..., 0].long() for n in some])
        x_BCHW = from_bytes(x_NCHW[some]).to(pipeline.device)
        agreeing = float((pipeline.images.encode(x_BCHW)[..., 0].cpu() == stored).double().mean())
        if agreeing < AGREEING:
            raise ConfigError(
                self._refusal(f"has other pictures under its ids: {agreeing:.0%} of the codes agree")
            )

    def _refusal(self, what: str) -> str:
        return f"images={self.name} {what}; give those that the store was made from, or images=null"


@dataclass
class Gallery:
    """A whole set as the image tokenizer rebuilds it: pixels (N,3,H,W) and concepts of the pictures of each grid.

    real: the pictures themselves, uint8 (N,3,H,W), where they are at hand.
    """

    pixels: dict[Grid, Tensor]
    concepts: dict[Grid, list[str]]
    real: dict[Grid, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        parts: Sequence[Pairs],
        originals: Originals | None = None,
        at_once: int = 256,
    ) -> Gallery:
        """The pictures of all parts, in their order within each grid. ConfigError as `Originals.read`."""
        pixels: dict[Grid, list[Tensor]] = {}
        real: dict[Grid, list[Tensor]] = {}
        concepts: dict[Grid, list[str]] = {}
        for pairs in parts:
            for grid, own in by_grid(pairs).items():
                for start in range(0, len(own), at_once):
                    images = [pairs.image(i) for i in own[start : start + at_once]]
                    pixels.setdefault(grid, []).append(pipeline.decode(images))
                concepts.setdefault(grid, []).extend(pairs.concepts[i] for i in own)
                if originals is not None:
                    real.setdefault(grid, []).append(originals.read(pipeline, pairs, own))
        joined, kept = ({grid: torch.cat(x) for grid, x in each.items()} for each in (pixels, real))
        return cls(joined, concepts, kept)

    @cached_property
    def rebuilt_sets(self) -> dict[Grid, FrechetWavelet]:
        """The pictures of each grid as FWD sees them."""
        return {grid: wavelets(x_NCHW) for grid, x_NCHW in self.pixels.items() if measurable(x_NCHW)}

    @cached_property
    def real_sets(self) -> dict[Grid, FrechetWavelet]:
        """As `rebuilt_sets`, of the pictures themselves."""
        return {grid: wavelets(x_NCHW) for grid, x_NCHW in self.real.items() if measurable(x_NCHW)}


def by_grid(pairs: Pairs) -> dict[Grid, list[int]]:
    """Grid → which pairs have it."""
    found: dict[Grid, list[int]] = {}
    for index, grid in enumerate(pairs.grids):
        found.setdefault(grid, []).append(index)
    return found


@dataclass(frozen=True)
class Drawn:
    """Captions drawn, each in its picture's grid.

    pairs: which ones, of each grid. pixels: (M,3,H,W) for them. distinct: different drawings (by their codes) ÷
    drawings. seconds: until all had been drawn and decoded.
    """

    pairs: dict[Grid, list[int]]
    pixels: dict[Grid, Tensor]
    distinct: float
    seconds: float


def draw(pipeline: Pipeline, pairs: Pairs, chosen: Sequence[int], seed: int) -> Drawn:
    """Draw the captions of some pairs, all of a grid together."""
    wanted, pixels, different = {}, {}, set()
    began = time.perf_counter()
    for grid in by_grid(pairs):
        if not (here := [i for i in chosen if pairs.grids[i] == grid]):
            continue
        size = (grid[0] * pipeline.images.downsample, grid[1] * pipeline.images.downsample)
        images = pipeline.draw_codes([pairs.texts[i] for i in here], 1, pipeline.sampling, seed, size)
        wanted[grid], pixels[grid] = here, pipeline.decode(images)
        different |= {(grid, tuple(each.codes_hwQ.flatten().tolist())) for each in images}
    seconds = time.perf_counter() - began
    return Drawn(wanted, pixels, len(different) / max(len(chosen), 1), seconds)


def drawing(
    pipeline: Pipeline, gallery: Gallery, pairs: Pairs, first: dict[Grid, int], seed: int, count: int
) -> tuple[dict[str, Any], list[Tensor], list[int]]:
    """Draw `count` captions, each in its picture's grid; look for their pictures in the whole set of that grid, and
    compare what was drawn with that set.

    first: where the pairs of each grid begin in the gallery.
    Returns metrics, the drawn pixels (3,H,W) and which pairs were drawn. seconds_a_picture: wall time of drawing and
    decoding all of them together, ÷ count. The others: `likeness`, `colouring`, `wavelet_distance`, `against_real`.
    """
    chosen = spread(len(pairs), count)
    drawn = draw(pipeline, pairs, chosen, seed)
    places = {pair: n for own in by_grid(pairs).values() for n, pair in enumerate(own)}
    targets = {grid: [first.get(grid, 0) + places[pair] for pair in own] for grid, own in drawn.pairs.items()}
    result = {
        "captions": len(chosen),
        **likeness(drawn.pixels, gallery, targets),
        **colouring(drawn.pixels, gallery, targets),
        **wavelet_distance(drawn.pixels, gallery.rebuilt_sets),
        "distinct": drawn.distinct,
        "seconds_a_picture": drawn.seconds / len(chosen),
    }
    if gallery.real:
        result["real"] = against_real(drawn.pixels, gallery, targets)
    shown = {
        pair: x_CHW
        for grid, own in drawn.pairs.items()
        for pair, x_CHW in zip(own, drawn.pixels[grid], strict=True)
    }
    return result, [shown[pair] for pair in chosen], chosen


def likeness(drawn: dict[Grid, Tensor], gallery: Gallery, targets: dict[Grid, list[int]]) -> dict[str, float]:
    """Is the captioned picture the one of the whole set that is nearest to the drawing, or among the ten nearest?

    variant_followed: where its concept has several pictures, see `variants_followed`.
    """
    rank, chances, followed, variants = [], [], [], []
    for grid, x_MCHW in drawn.items():
        whole = gallery.pixels[grid]
        rank += ranks(x_MCHW, whole, targets[grid]).tolist()
        chances += [min(1.0, NEAREST / len(whole))] * len(x_MCHW)
        more, chance = variants_followed(x_MCHW, whole, targets[grid], gallery.concepts[grid])
        followed, variants = followed + more, variants + chance
    result = {
        "among_ten_nearest": sum(r < NEAREST for r in rank) / len(rank),
        "nearest": sum(r == 0 for r in rank) / len(rank),
        "chance": sum(chances) / len(chances),
        "median_rank": float(torch.tensor(rank).double().median()) + 1,
    }
    if followed:
        result["variants"] = len(followed)
        result["variant_followed"] = sum(followed) / len(followed)
        result["variant_chance"] = sum(variants) / len(variants)
    return result


def colouring(
    drawn: dict[Grid, Tensor], gallery: Gallery, targets: dict[Grid, list[int]]
) -> dict[str, float | None]:
    """Contrast and saturation of drawings ÷ those of the captioned pictures, as the tokenizer rebuilds them.

    Above 1: more than the set has. None where the set has none.
    """
    own = {grid: gallery.pixels[grid][places] for grid, places in targets.items()}
    result: dict[str, float | None] = {}
    for name, measure_of in (("contrast", contrast), ("saturation", saturation)):
        here, there = (
            float(torch.cat([measure_of(x) for x in each.values()]).mean()) for each in (drawn, own)
        )
        result[name] = here / there if there > 0 else None
    return result


def contrast(x_NCHW: Tensor) -> Tensor:
    """Pixels in [-1,1] → (N): standard deviation of luminance (black 0, white 1) inside each picture."""
    return ((x_NCHW + 1) / 2 * LUMINANCE).sum(1).flatten(1).std(1)


def saturation(x_NCHW: Tensor) -> Tensor:
    """Pixels in [-1,1] → (N): mean over each picture's pixels of largest less least of red, green and blue, 0 to 1."""
    return (x_NCHW.amax(1) - x_NCHW.amin(1)).flatten(1).mean(1) / 2


def measurable(x_NCHW: Tensor) -> bool:
    """Whether FWD is defined for these pictures: two of them, even sides."""
    return len(x_NCHW) > 1 and not any(side % 2 for side in x_NCHW.shape[2:])


def wavelets(x_NCHW: Tensor) -> FrechetWavelet:
    """Pictures, float in [-1,1] or uint8, as FWD sees them."""
    found = FrechetWavelet()
    for part in x_NCHW.split(256):
        found.update(part if part.is_floating_point() else from_bytes(part))
    return found


def wavelet_distance(drawn: dict[Grid, Tensor], sets: dict[Grid, FrechetWavelet]) -> dict[str, Any]:
    """fwd: Fréchet Wavelet Distance (`vq.metrics.FrechetWavelet`) of the drawings to a whole set, 0 for the set itself.

    It is biased upwards, the more the fewer drawings there are: of 64 or 128 by much. Only values of as many drawings
    (fwd_pictures) and the same set (fwd_set pictures) compare. Of several shapes the one with most drawings counts.
    fwd is None, and there is nothing else, where no shape has two drawings and even sides.
    """
    fitting = [grid for grid in drawn if grid in sets and measurable(drawn[grid])]
    if not fitting:
        return {"fwd": None}
    grid = max(fitting, key=lambda each: len(drawn[each]))
    found, whole = wavelets(drawn[grid]), sets[grid]
    counts = {"fwd_level": whole.level, "fwd_pictures": found.count, "fwd_set": whole.count}
    return {"fwd": found.distance(whole), **counts, "fwd_shape": list(drawn[grid].shape[2:])}


def against_real(
    drawn: dict[Grid, Tensor], gallery: Gallery, targets: dict[Grid, list[int]]
) -> dict[str, Any]:
    """FWD and PSNR (dB) of the drawings to the pictures themselves; `floor`: of the captioned ones' reconstructions.

    The floor is where a language model would stand that knew every code: what lies between (above_floor, of FWD) is the
    model's, what lies below is the image tokenizer's. FWD is to the whole set and biased alike for both
    (`wavelet_distance`); PSNR is to the captioned pictures, None where one came back exactly.
    """
    rebuilt = {grid: gallery.pixels[grid][places] for grid, places in targets.items()}
    own = {grid: from_bytes(gallery.real[grid][places]) for grid, places in targets.items()}

    def near(x: dict[Grid, Tensor]) -> dict[str, Any]:
        total = sum(psnr(x[grid], own[grid]) * len(own[grid]) for grid in own)
        mean = total / sum(map(len, own.values()))
        return {**wavelet_distance(x, gallery.real_sets), "psnr": mean if math.isfinite(mean) else None}

    found, floor = near(drawn), near(rebuilt)
    above = None if found["fwd"] is None else found["fwd"] - floor["fwd"]
    return {**found, "above_floor": above, "floor": floor}


def ranks(drawn: Tensor, gallery: Tensor, targets: list[int]) -> Tensor:
    """(M): how many pictures of the whole set are nearer to what was drawn than the captioned one, pixel by pixel."""
    flat_MP, parts = (
        drawn.flatten(1).double(),
        gallery.flatten(1).split(1024),
    )  # a set in fp64 may not fit into memory
    distance_MN = torch.cat([torch.cdist(flat_MP, part.double()) for part in parts], 1)
    return (distance_MN < distance_MN.gather(1, torch.tensor(targets)[:, None])).sum(1)


def variants_followed(
    drawn: Tensor, gallery: Tensor, targets: list[int], concepts: list[str]
) -> tuple[list[bool], list[float]]:
    """Where a concept has several pictures (one a skin tone, say): is the captioned one nearest among them alone?

    Nearest by colours, wherever they are in the picture: variants differ in colour, and a drawing of an unseen
    concept has its own shape. Returns, for each such caption, whether it is, and how likely that is by chance.
    """
    followed, chance = [], []
    for histogram, target in zip(colour_histograms(drawn), targets, strict=True):
        kin = [i for i, concept in enumerate(concepts) if concept == concepts[target]]
        if len(kin) > 1:
            distance = (colour_histograms(gallery[kin]) - histogram).abs().sum(1)
            followed.append(kin[int(distance.argmin())] == target)
            chance.append(1 / len(kin))
    return followed, chance


def colour_histograms(x_NCHW: Tensor, levels: int = 6) -> Tensor:
    """Pixels in [-1,1] → (N, levels³) shares of coarse colours."""
    level_NCP = ((x_NCHW.flatten(2) + 1) / 2 * levels).long().clamp(0, levels - 1)
    colour_NP = (level_NCP[:, 0] * levels + level_NCP[:, 1]) * levels + level_NCP[:, 2]
    counts = torch.zeros(len(x_NCHW), levels**3).scatter_add_(
        1, colour_NP, torch.ones_like(colour_NP, dtype=torch.float)
    )
    return counts / colour_NP.shape[1]


def captioning(pipeline: Pipeline, pairs: Pairs, count: int) -> dict[str, Any]:
    """Greedy captions of stored pictures: share that repeats the caption to the letter, and mean word overlap (F1)."""
    chosen = spread(len(pairs), count)
    said = pipeline.describe_images([pairs.image(i) for i in chosen])
    wanted = [pairs.texts[i] for i in chosen]
    exact = sum(a.strip().lower() == b.strip().lower() for a, b in zip(said, wanted, strict=True))
    overlap = sum(word_overlap(a, b) for a, b in zip(said, wanted, strict=True))
    return {"pictures": len(chosen), "exact": exact / len(chosen), "word_f1": overlap / len(chosen)}


def word_overlap(said: str, wanted: str) -> float:
    """F1 of the two sets of words; 1 if both are empty."""
    a, b = set(said.lower().split()), set(wanted.lower().split())
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over 0..total-1 (all, if there are fewer)."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


# --- plain text: what a base model knew, and what is left of it -------------------------------------------------------


@dataclass(frozen=True)
class PlainText:
    """Texts as a base model reads them, each a document of its own.

    Attributes:
        documents: ids of each text; the base model's <bos> before them where it has one. The first id of a document is
            read and not predicted: without a <bos> that is the text's first token.
        size: ids that the base model has, 0..size-1: probabilities are normalised over these alone.
        bytes: of all texts, as UTF-8.
        digest: 16 hex digits over the texts.
    """

    documents: list[list[int]]
    size: int
    bytes: int
    digest: str

    @classmethod
    def of(cls, pipeline: Pipeline, texts: Sequence[str]) -> PlainText:
        """ValueError where there is nothing to predict."""
        size = base_size(pipeline)
        bos = pipeline.model.form.vocabulary.bos
        start = [bos] if bos < size else []  # a <bos> that was added means nothing to the base model
        documents = [[*start, *pipeline.encode_text(text)] for text in texts]
        if not any(len(document) > 1 for document in documents):
            raise ValueError(f"{len(texts)} texts hold nothing to predict: give texts of at least two tokens")
        told = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        return cls(documents, size, sum(len(text.encode()) for text in texts), told)


def base_size(pipeline: Pipeline) -> int:
    """Ids that the text tokenizer had before it was extended: what was added lies right below <image_start>."""
    first = pipeline.model.form.vocabulary.image_start
    while pipeline.tokenizer.convert_ids_to_tokens(first - 1) in (BOS, EOS, PAD):
        first -= 1
    return first


def text_loss(lm: nn.Module, text: PlainText, context: int = 1024) -> dict[str, float]:
    """Loss of plain text under a causal LM, in fp32: {loss, perplexity, bits_per_byte, tokens}.

    lm: whatever answers `lm(input_ids=...)` with `.logits`: a base model, or `MultimodalLM.lm`. Both are compared over
    the same ids, so an extended model whose rows were not trained has the base model's own numbers.
    context: a longer text is read in windows of so many positions that overlap by half, and every token is predicted
    once: from at least half a window, but at the text's beginning. loss: nats per token. ValueError if it is below 2.
    """
    if context < 2:
        raise ValueError(f"context={context}: at least 2 positions")
    pieces = [piece for ids in text.documents for piece in windows(ids, context) if len(piece[0]) > piece[1]]
    pieces.sort(key=lambda piece: len(piece[0]))  # rows of one length need no padding
    device = next(lm.parameters()).device
    total, count = 0.0, 0
    with undisturbed(lm, device):
        for rows in packs(pieces):
            ids_BT, labels_BT = rectangle(rows, device)
            logits_BTV = lm(input_ids=ids_BT).logits[:, :-1, : text.size].float()
            nll = F.cross_entropy(
                logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=NONE, reduction="sum"
            )
            total, count = total + float(nll), count + int((labels_BT != NONE).sum())
    loss = total / count
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return result | {"bits_per_byte": total / math.log(2) / text.bytes, "tokens": count}


def measured(lm: nn.Module, text: PlainText, context: int) -> dict[str, Any]:
    """`text_loss`, and what it was measured on. context: as many positions as the model has, if those are fewer."""
    limit = getattr(getattr(lm, "config", None), "max_position_embeddings", None) or context
    about = {"texts": len(text.documents), "digest": text.digest, "size": text.size}
    context = min(context, limit)
    return {**text_loss(lm, text, context), **about, "context": context}


def windows(ids: list[int], context: int) -> Iterator[tuple[list[int], int]]:
    """Pieces of at most `context` ids, each with the number of its first ids that are not to be predicted in it."""
    start, known = 0, 1
    while True:
        yield ids[start : start + context], known - start
        known = start + context
        if known >= len(ids):
            return
        start += context // 2


def packs(pieces: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Pieces, shortest first, in groups that fill at most `POSITIONS` positions (a longer piece stands alone)."""
    group: list[tuple[list[int], int]] = []
    for piece in pieces:
        if group and (len(group) + 1) * len(piece[0]) > POSITIONS:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def rectangle(pieces: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (B,T), and labels (B,T) with NONE where nothing is to be predicted. Padding comes last: it needs no mask."""
    length = max(len(ids) for ids, _ in pieces)
    ids_BT, labels_BT = (
        torch.zeros(len(pieces), length, dtype=torch.int64),
        torch.full((len(pieces), length), NONE),
    )
    for row, (ids, known) in enumerate(pieces):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, known : len(ids)] = ids_BT[row, known : len(ids)]
    return ids_BT.to(device), labels_BT.to(device)


def retention(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Two results of `text_loss` beside each other. ratio: perplexity after / before; 1.05 is 5 % worse."""
    return {"before": before, "after": after, "ratio": math.exp(after["loss"] - before["loss"])}
