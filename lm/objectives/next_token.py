"""Next-token prediction: cross-entropy of text and of picture codes, each over the ids that the grammar allows.

Legend: B rows, T positions, W columns, N picture positions, K codebook size, V text ids and specials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm.data import Batch
from lm.grammar import Grammar
from lm.model import MultimodalLM


@dataclass
class ModalityLoss:
    """Sums over the tokens of one modality; natural logarithm."""

    nll: Tensor  # Σ -log p
    z: Tensor  # Σ (log Z)²
    count: int

    @property
    def mean(self) -> Tensor:
        return self.nll / max(self.count, 1)

    @property
    def mean_z(self) -> Tensor:
        return self.z / max(self.count, 1)


class NextToken:
    """Σ of text · mean text loss, image · mean image loss, and z · mean (log Z)² (Chameleon, arXiv 2405.09818, §2.3).

    The loss of a token is -log of its share among the ids that may stand there: V with pad, <bos> and <image_end>
    masked for text, the K codes of its depth for pictures.
    """

    def __init__(self, text: float = 0.2, image: float = 1.0, z: float = 1e-5):
        if text < 0 or image < 0 or z < 0 or text + image == 0:
            raise ValueError(
                f"text={text}, image={image}, z={z}: weights must not be negative, text or image positive"
            )
        self.text, self.image, self.z = text, image, z

    def losses(self, model: MultimodalLM, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name, and unweighted bits per token."""
        text, image = measure(model, batch)
        total = {"text": self.text * text.mean, "image": self.image * image.mean}
        total["z"] = self.z * (text.mean_z + image.mean_z)
        bits = {"text_bits": to_bits(text), "image_bits": to_bits(image)}
        return {k: v for k, v in total.items() if getattr(self, k)}, bits


def measure(model: MultimodalLM, batch: Batch) -> tuple[ModalityLoss, ModalityLoss]:
    """Text and image losses of a batch, unweighted."""
    next_BTW = batch.next_BTW
    made = model.teach(batch.ids_BTW, next_BTW, batch.mask, batch.positions_BT)
    where_BT = model.is_image(next_BTW[..., 0])
    depth_BTW = Grammar(model.form).label_depths(next_BTW.cpu()).to(next_BTW.device)

    rows = model.output_rows()
    is_text = depth_BTW[..., 0] == model.form.vocabulary.depth
    allowed = Grammar(model.form).text_mask(next_BTW.device)
    text_logits = model.text_logits(made.hidden_BTC[is_text], rows).float().masked_fill(~allowed, -torch.inf)
    text = cross_entropy(text_logits, next_BTW[..., 0][is_text])

    image = ModalityLoss(text.nll.new_zeros(()), text.nll.new_zeros(()), 0)
    for column, feature_NC in enumerate(made.features):
        ids_N, depth_N = next_BTW[where_BT][:, column], depth_BTW[where_BT][:, column]
        for depth in depth_N.unique().tolist():
            at = depth_N == depth
            logits = model.image_logits(feature_NC[at], depth, rows).float()
            part = cross_entropy(logits, ids_N[at] - model.form.vocabulary.image_range(depth).start)
            image = ModalityLoss(image.nll + part.nll, image.z + part.z, image.count + part.count)
    return text, image


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> ModalityLoss:
    """Summed over N; the log-partition is computed once for both terms."""
    log_z = torch.logsumexp(logits_NV, -1)
    chosen = logits_NV.gather(-1, targets_N[:, None])[:, 0]
    return ModalityLoss((log_z - chosen).sum(), log_z.square().sum(), len(targets_N))


def to_bits(loss: ModalityLoss) -> float:
    return float(loss.mean.detach()) / float(torch.log(torch.tensor(2.0)))
