"""How well a multimodal model reads and draws: losses per modality, caption fidelity, variants.

Legend: M drawn pictures, N pictures of the whole set, C H W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lm.data import Pairs, pack
from lm.decoding import Sampling
from lm.model import MultimodalLM
from lm.objectives.next_token import ModalityLoss, measure, to_bits
from lm.pipeline import Pipeline
from lm.sequence import Image

NEAREST = 10


@torch.inference_mode()
def losses(model: MultimodalLM, pairs: Pairs, limit: int = 512, documents: int = 64) -> dict[str, float]:
    """Loss (nats) and bits per token of each modality, the other one given, over the first `limit` pairs.

    text: the caption after its picture. image: the picture after its caption; `image_bits_per_picture` sums a picture.
    """
    device = next(model.parameters()).device
    sums: dict[str, ModalityLoss] = {}
    count = min(limit, len(pairs))
    for task, modality in (("image_to_text", 0), ("text_to_image", 1)):
        name = ("text", "image")[modality]
        for start in range(0, count, documents):
            chosen = range(start, min(start + documents, count))
            built = [model.form.build(pairs.document(i, task)) for i in chosen]
            batch = pack(built, model.form, max(128, max(len(d) for d in built)))
            part = measure(model, batch.to(device))[modality]
            before = sums.get(name, ModalityLoss(torch.zeros(()), torch.zeros(()), 0))
            sums[name] = ModalityLoss(
                before.nll + part.nll.cpu(), before.z + part.z.cpu(), before.count + part.count
            )
    result = {f"{name}_loss": float(loss.mean) for name, loss in sums.items()}
    result |= {f"{name}_bits": to_bits(loss) for name, loss in sums.items()}
    result["image_bits_per_picture"] = float(sums["image"].nll) / math.log(2) / count
    return result


def drawing(
    pipeline: Pipeline,
    gallery: Tensor,
    pairs: Pairs,
    place: list[int],
    concepts: list[str],
    sampling: Sampling,
    seed: int,
    count: int,
) -> tuple[dict[str, Any], Tensor, list[int]]:
    """Draw `count` captions and look for their pictures in the whole set.

    gallery: (N,3,H,W) pixels of the whole set; place: index in it of each pair's picture; concepts: of the gallery.
    Returns metrics, the drawn pixels (M,3,H,W) and which pairs were drawn.
    """
    chosen = spread(len(pairs), count)
    drawn = pipeline.draw([pairs.texts[i] for i in chosen], 1, sampling, seed)
    rank_M, nearest_of_kind, chance = ranks(drawn, gallery, [place[i] for i in chosen], concepts)
    near = int((rank_M < NEAREST).sum())
    result = {
        "captions": len(chosen),
        "among_ten_nearest": near / len(chosen),
        "nearest": int((rank_M == 0).sum()) / len(chosen),
        "chance": NEAREST / len(gallery),
        "median_rank": float(rank_M.double().median()) + 1,
    }
    if nearest_of_kind:
        result["variants"] = len(nearest_of_kind)
        result["variant_followed"] = sum(nearest_of_kind) / len(nearest_of_kind)
        result["variant_chance"] = sum(chance) / len(chance)
    return result, drawn, chosen


def ranks(
    drawn: Tensor, gallery: Tensor, targets: list[int], concepts: list[str]
) -> tuple[Tensor, list[bool], list[float]]:
    """Where the captioned picture stands among the whole set by squared pixel distance (0 = nearest).

    Where its concept has several pictures (tones of a hand, say): whether, among those alone, the captioned one is
    the nearest, and how likely that is by chance.
    """
    distance_MN = torch.cdist(drawn.flatten(1).double(), gallery.flatten(1).double())
    rank_M, followed, chance = [], [], []
    for distance_N, target in zip(distance_MN, targets, strict=True):
        rank_M.append(int((distance_N < distance_N[target]).sum()))
        kin = [i for i, concept in enumerate(concepts) if concept == concepts[target]]
        if len(kin) > 1:
            followed.append(min(kin, key=lambda i: float(distance_N[i])) == target)
            chance.append(1 / len(kin))
    return torch.tensor(rank_M), followed, chance


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
