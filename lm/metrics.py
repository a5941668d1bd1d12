"""How well a multimodal model reads and draws, and what it kept: losses per modality, caption fidelity, plain text.

Legend: M drawn pictures, N pictures of the whole set, C H W pixels; B rows, T positions, V ids of the base model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from vqlm.evaluation import undisturbed

NEAREST = 10
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


@dataclass
class Gallery:
    """A whole set as the image tokenizer rebuilds it: pixels (N,3,H,W) and concepts of the pictures of each grid."""

    pixels: dict[Grid, Tensor]
    concepts: dict[Grid, list[str]]

    @classmethod
    def of(cls, pipeline: Pipeline, parts: Sequence[Pairs], at_once: int = 256) -> Gallery:
        """The pictures of all parts, in their order within each grid."""
        pixels: dict[Grid, list[Tensor]] = {}
        concepts: dict[Grid, list[str]] = {}
        for pairs in parts:
            for grid, own in by_grid(pairs).items():
                for start in range(0, len(own), at_once):
                    images = [pairs.image(i) for i in own[start : start + at_once]]
                    pixels.setdefault(grid, []).append(pipeline.decode(images))
                concepts.setdefault(grid, []).extend(pairs.concepts[i] for i in own)
        return cls({grid: torch.cat(parts) for grid, parts in pixels.items()}, concepts)


def by_grid(pairs: Pairs) -> dict[Grid, list[int]]:
    """Grid → which pairs have it."""
    found: dict[Grid, list[int]] = {}
    for index, grid in enumerate(pairs.grids):
        found.setdefault(grid, []).append(index)
    return found


def drawing(
    pipeline: Pipeline, gallery: Gallery, pairs: Pairs, first: dict[Grid, int], seed: int, count: int
) -> tuple[dict[str, Any], list[Tensor], list[int]]:
    """Draw `count` captions, each in its picture's grid, and look for their pictures in the whole set of that grid.

    first: where the pairs of each grid begin in the gallery.
    Returns metrics, the drawn pixels (3,H,W) and which pairs were drawn.
    """
    chosen = spread(len(pairs), count)
    drawn: dict[int, Tensor] = {}
    rank, chances, followed, variants = [], [], [], []
    for grid, own in by_grid(pairs).items():
        here = [i for i in chosen if pairs.grids[i] == grid]
        if not here:
            continue
        places = {pair: first.get(grid, 0) + number for number, pair in enumerate(own)}
        size = (grid[0] * pipeline.images.downsample, grid[1] * pipeline.images.downsample)
        x_MCHW = pipeline.decode(
            pipeline.draw_codes([pairs.texts[i] for i in here], 1, pipeline.sampling, seed, size)
        )
        drawn |= dict(zip(here, x_MCHW, strict=True))
        targets, whole = [places[i] for i in here], gallery.pixels[grid]
        rank += ranks(x_MCHW, whole, targets).tolist()
        chances += [min(1.0, NEAREST / len(whole))] * len(here)
        more, chance = variants_followed(x_MCHW, whole, targets, gallery.concepts[grid])
        followed, variants = followed + more, variants + chance
    result = {
        "captions": len(chosen),
        "among_ten_nearest": sum(r < NEAREST for r in rank) / len(chosen),
        "nearest": sum(r == 0 for r in rank) / len(chosen),
        "chance": sum(chances) / len(chosen),
        "median_rank": float(torch.tensor(rank).double().median()) + 1,
    }
    if followed:
        result["variants"] = len(followed)
        result["variant_followed"] = sum(followed) / len(followed)
        result["variant_chance"] = sum(variants) / len(variants)
    return result, [drawn[i] for i in chosen], chosen


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
