"""Next-token prediction: cross-entropy of text and of picture codes, each over the ids that the grammar allows.

Legend: B rows, T positions, W columns, N picture positions, C hidden width, K codebook size, V text ids and specials.
"""

from __future__ import annotations

from torch import Tensor

from lm.grammar import grammar_of
from lm.heads import Predicted
from lm.model import MultimodalLM
from lm.objectives.scoring import LIMIT, ModalityLoss, Weights, nothing, score, to_bits
from lm.objectives.soft_codes import SoftCodes
from lm.packing import Batch
from lm.vocab import Vocabulary

__all__ = ["ModalityLoss", "NextToken", "legal_losses", "measure", "to_bits"]


class NextToken:
    """Σ of text · mean text loss, image · mean image loss, and z · mean (log Z)² (Chameleon, arXiv 2405.09818, §2.3).

    The loss of a token is -log of its share among the ids that may stand there: all text ids and marks that the grammar
    allows for text, the sizes for a size (counted as text), the K codes of its depth for pictures.
    soft: pictures are learnt from soft targets (`SoftCodes`); null: from the codes of the store alone.
    """

    def __init__(self, text: float = 0.2, image: float = 1.0, z: float = 1e-5, soft: SoftCodes | None = None):
        self.weights, self.soft = Weights(text, image, z), soft

    def competitors(self, vocabulary: Vocabulary) -> tuple[int, int]:
        """How many ids compete for a text label, and for a picture label."""
        return vocabulary.image_offset, vocabulary.codebook_size

    def losses(self, model: MultimodalLM, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name; numbers per token of each modality, as `Weights.weigh` has them."""
        ids_BTW, next_BTW = batch.ids_BTW, batch.next_BTW
        if self.soft is not None:
            ids_BTW, next_BTW = self.soft.replace(model.form.vocabulary, ids_BTW, next_BTW)
        made = model.teach(ids_BTW, next_BTW, batch.mask, batch.positions_BT)
        return self.weights.weigh(*legal_losses(model, made, batch.next_BTW, self.soft))


def measure(model: MultimodalLM, batch: Batch, limit: int = LIMIT) -> tuple[ModalityLoss, ModalityLoss]:
    """Text and image losses of a batch, unweighted, of this process alone. limit: logits that may exist at once."""
    made = model.teach(batch.ids_BTW, batch.next_BTW, batch.mask, batch.positions_BT)
    return legal_losses(model, made, batch.next_BTW, limit=limit)


def legal_losses(
    model: MultimodalLM,
    made: Predicted,
    next_BTW: Tensor,
    soft: SoftCodes | None = None,
    limit: int = LIMIT,
) -> tuple[ModalityLoss, ModalityLoss]:
    """Text and image losses of what the model predicted. next_BTW: what truly follows."""
    grammar, rows = grammar_of(model.form), model.output_rows()
    vocabulary = model.form.vocabulary
    depth_BTW = grammar.label_depths(next_BTW)

    text = nothing(made.hidden_BTC.float())
    masks = {
        vocabulary.depth: grammar.text_mask(next_BTW.device),
        vocabulary.depth + 1: grammar.size_mask(next_BTW.device),
    }
    for kind, allowed_V in masks.items():
        at_BT = depth_BTW[..., 0] == kind

        def logits(hidden_nC: Tensor) -> Tensor:
            return model.text_logits(hidden_nC, rows)

        next_n, width = next_BTW[..., 0][at_BT], vocabulary.image_offset
        text = text + score(made.hidden_BTC[at_BT], next_n, logits, width, allowed_V=allowed_V, limit=limit)
    return text, _image_losses(model, made, next_BTW, depth_BTW, rows, soft, limit)


def _image_losses(
    model: MultimodalLM,
    made: Predicted,
    next_BTW: Tensor,
    depth_BTW: Tensor,
    rows: list,
    soft: SoftCodes | None,
    limit: int,
) -> ModalityLoss:
    vocabulary = model.form.vocabulary
    image = nothing(made.hidden_BTC.float())
    for feature_NC, ids_N, depth_N in columns(model, made, next_BTW, depth_BTW):
        for depth in depth_N.unique().tolist():
            if not 0 <= depth < vocabulary.depth:
                continue  # an empty column
            at_N = depth_N == depth

            def logits(feature_nC: Tensor, depth: int = depth) -> Tensor:
                return model.image_logits(feature_nC, depth, rows)

            codes_n = ids_N[at_N] - vocabulary.image_range(depth).start
            soften = None if soft is None else soft.targets(depth)
            part = score(feature_NC[at_N], codes_n, logits, vocabulary.codebook_size, soften, limit=limit)
            image = image + part
    return image


def columns(model: MultimodalLM, made: Predicted, next_BTW: Tensor, depth_BTW: Tensor):
    """For each column: features (N,C) of the positions followed by picture ids, those ids (N), their depths (N)."""
    where_BT = model.is_image(next_BTW).any(-1)
    ids_NW, depth_NW = next_BTW[where_BT], depth_BTW[where_BT]
    return zip(made.features, ids_NW.unbind(-1), depth_NW.unbind(-1), strict=True)
