"""Next-token prediction as a plain causal language model learns it: every id competes at every position.

Legend: B rows, T positions, W columns, C hidden width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lm.grammar import grammar_of
from lm.model import MultimodalLM, Rows
from lm.objectives.next_token import columns
from lm.objectives.scoring import LIMIT, ModalityLoss, Weights, nothing, score
from lm.packing import Batch
from lm.vocab import Vocabulary


class FullVocabulary:
    """As `NextToken`, but the loss of a token is -log of its share among all ids: image ids compete where text stands,
    and text where codes stand, so that the scales of the two modalities pull at each other (Chameleon, §2.2).

    What the grammar forces (the end of a picture, say) is not learnt here either. chunk: logits that exist at once;
    more of them are made in parts.
    """

    def __init__(self, text: float = 0.2, image: float = 1.0, z: float = 1e-5, chunk: int = LIMIT):
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least 1 logit at once, such as {LIMIT}")
        self.weights, self.chunk = Weights(text, image, z), chunk

    def competitors(self, vocabulary: Vocabulary) -> tuple[int, int]:
        """How many ids compete for a text label, and for a picture label."""
        return vocabulary.size, vocabulary.size

    def losses(self, model: MultimodalLM, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name; numbers per token of each modality, as `Weights.weigh` has them."""
        return self.weights.weigh(*self.measure(model, batch))

    def measure(self, model: MultimodalLM, batch: Batch) -> tuple[ModalityLoss, ModalityLoss]:
        """Text and image losses of a batch, unweighted, of this process alone."""
        next_BTW, vocabulary = batch.next_BTW, model.form.vocabulary
        made = model.teach(batch.ids_BTW, next_BTW, batch.mask, batch.positions_BT)
        depth_BTW = grammar_of(model.form).label_depths(next_BTW)
        rows = all_rows(model)

        def scored(feature_nC: Tensor, ids_n: Tensor) -> ModalityLoss:
            def logits(part_nC: Tensor) -> Tensor:
                return model.text_logits(part_nC, [rows])

            return score(feature_nC, ids_n, logits, vocabulary.size, limit=self.chunk)

        is_text_BT = depth_BTW[..., 0] >= vocabulary.depth
        text = scored(made.hidden_BTC[is_text_BT], next_BTW[..., 0][is_text_BT])
        image = nothing(made.hidden_BTC.float())
        for feature_NC, ids_N, depth_N in columns(model, made, next_BTW, depth_BTW):
            at_N = (depth_N >= 0) & (depth_N < vocabulary.depth)
            image = image + scored(feature_NC[at_N], ids_N[at_N])
        return text, image


def all_rows(model: MultimodalLM) -> Rows:
    """The output rows of all ids in one piece; rows beyond the vocabulary, which some models have, are left out."""
    output: Any = model.lm.get_output_embeddings()
    size, bias = model.form.vocabulary.size, getattr(output, "bias", None)
    if len(output.weight) == size:  # a slice would build a second gradient of the full size
        return output.weight, bias
    return output.weight[:size], None if bias is None else bias[:size]
