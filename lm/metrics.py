"""How well a multimodal model reads and draws: losses per modality, caption fidelity, variants.

Legend: M drawn pictures, N pictures of the whole set, C H W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lm.data import Pairs, pack
from lm.model import MultimodalLM
from lm.objectives.next_token import ModalityLoss, measure, to_bits
from lm.pipeline import Pipeline
from lm.sequence import Image

NEAREST = 10


@torch.inference_mode()
def losses(model: MultimodalLM, pairs: Pairs, limit: int = 512, documents: int = 64) -> dict[str, float]:
    """Loss (nats) and bits per token of each modality, the other one given, over `limit` pairs (spread evenly).

    text: the caption after its picture. image: the picture after its caption; `image_bits_per_picture` sums a picture.
    """
    device = next(model.parameters()).device
    sums: dict[str, ModalityLoss] = {}
    places = spread(len(pairs), limit)
    for task, modality in (("image_to_text", 0), ("text_to_image", 1)):
        name = ("text", "image")[modality]
        for start in range(0, len(places), documents):
            chosen = places[start : start + documents]
            built = [model.form.build(pairs.document(i, task)) for i in chosen]
            batch = pack(built, model.form, max(128, max(len(d) for d in built)))
            part = measure(model, batch.to(device))[modality]
            before = sums.get(name, ModalityLoss(torch.zeros(()), torch.zeros(()), 0))
            sums[name] = ModalityLoss(
                before.nll + part.nll.cpu(), before.z + part.z.cpu(), before.count + part.count
            )
    result = {f"{name}_loss": float(loss.mean) for name, loss in sums.items()}
    result |= {f"{name}_bits": to_bits(loss) for name, loss in sums.items()}
    result["image_bits_per_picture"] = float(sums["image"].nll) / math.log(2) / len(places)
    return result


def drawing(
    pipeline: Pipeline,
    gallery: Tensor,
    pairs: Pairs,
    place: list[int],
    concepts: list[str],
    seed: int,
    count: int,
) -> tuple[dict[str, Any], Tensor, list[int]]:
    """Draw `count` captions and look for their pictures in the whole set.

    gallery: (N,3,H,W) pixels of the whole set; place: index in it of each pair's picture; concepts: of the gallery.
    Returns metrics, the drawn pixels (M,3,H,W) and which pairs were drawn.
    """
    chosen = spread(len(pairs), count)
    drawn = pipeline.draw([pairs.texts[i] for i in chosen], 1, pipeline.sampling, seed)
    targets = [place[i] for i in chosen]
    rank_M = ranks(drawn, gallery, targets)
    followed, chance = variants_followed(drawn, gallery, targets, concepts)
    near = int((rank_M < NEAREST).sum())
    result = {
        "captions": len(chosen),
        "among_ten_nearest": near / len(chosen),
        "nearest": int((rank_M == 0).sum()) / len(chosen),
        "chance": NEAREST / len(gallery),
        "median_rank": float(rank_M.double().median()) + 1,
    }
    if followed:
        result["variants"] = len(followed)
        result["variant_followed"] = sum(followed) / len(followed)
        result["variant_chance"] = sum(chance) / len(chance)
    return result, drawn, chosen


def ranks(drawn: Tensor, gallery: Tensor, targets: list[int]) -> Tensor:
    """(M): how many pictures of the whole set are nearer to what was drawn than the captioned one, pixel by pixel."""
    distance_MN = torch.cdist(drawn.flatten(1).double(), gallery.flatten(1).double())
    return (distance_MN < distance_MN.gather(1, torch.tensor(targets)[:, None])).sum(1)


def variants_followed(
    drawn: Tensor, gallery: Tensor, targets: list[int], concepts: list[str]
) -> tuple[list[bool], list[float]]:
    """Where a concept has several pictures (one a skin tone, say): is the captioned one nearest among them alone?

    Nearest by colours, wherever they are in the picture: variants differ in colour, and a drawing of an unseen
    concept has its own shape. Returns, for each such caption, whether it is, and how likely that is by chance.
    """
    histograms_M, histograms_N = colour_histograms(drawn), colour_histograms(gallery)
    followed, chance = [], []
    for histogram, target in zip(histograms_M, targets, strict=True):
        kin = [i for i, concept in enumerate(concepts) if concept == concepts[target]]
        if len(kin) > 1:
            distance = (histograms_N[kin] - histogram).abs().sum(1)
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
    said = pipeline.describe_images([Image(pairs.codes_NhwQ[i]) for i in chosen])
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
