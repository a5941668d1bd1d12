"""MultimodalLM: any Hugging Face causal LM with added rows for image ids, and a head on top.

The language model stays a plain transformers model: its input rows embed all ids, its output rows score them.
A stacked position's input is the sum of its Q rows. Knows ids and formats; nothing of strings, pictures or losses.

Legend: B rows, T positions, W columns, C hidden width, K codebook size, V text ids and specials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lm.architecture import attention_mask, decoder_layers, final_logits
from lm.heads import Head, Predicted, TrunkInputs, last_chosen
from lm.sequence import NONE, SequenceFormat

Rows = tuple[Tensor, Tensor | None]  # weight (n,C) and bias (n) of some output ids


class MultimodalLM(nn.Module):
    """lm: a causal LM whose vocabulary has been extended to `form.vocabulary.size` rows (`lm.rows.add_rows`)."""

    def __init__(self, lm: PreTrainedModel, head: Head, form: SequenceFormat):
        super().__init__()
        rows = embedding(lm).shape[0]
        if rows < form.vocabulary.size:
            raise ValueError(
                f"the language model has {rows} rows, the vocabulary needs {form.vocabulary.size}"
            )
        if head.width != form.width:
            raise ValueError(
                f"the head predicts {head.width} ids per position, layout {form.layout.name!r} has {form.width}"
            )
        self.lm, self.head, self.form = lm, head, form
        self.finish = final_logits(lm.config)
        given: Any = lm.get_input_embeddings()
        given.padding_idx = None  # an id that may be one of ours; torch would keep its row from being trained
        self.held_rows = 0  # input and output rows below it are not trained (`lm.tune`)

    def teach(self, ids_BTW: Tensor, next_BTW: Tensor, mask: Tensor, positions_BT: Tensor) -> Predicted:
        """Training pass. next_BTW: what follows each position (NONE: nothing to predict).

        mask: (B,1,T,T) bool, True where a position may look. Returns hidden states of all positions and W features
        (N,C) of the N positions that picture ids follow, in row-major order. Of such a position's next ids some may be
        NONE (delayed layout).
        """
        where_BT = self.is_image(next_BTW).any(-1)
        # what follows is read by heads even where it is given and not learnt, as in decoding
        read_BTW = torch.where(where_BT[..., None], next_BTW, followers(ids_BTW))
        shown_BTW = torch.where(self.is_image(read_BTW), read_BTW, NONE)
        return self.head.teach(self._inputs(ids_BTW, mask, positions_BT, None), shown_BTW, where_BT)

    def step(
        self,
        ids_BTW: Tensor,
        mask: Tensor,
        positions_BT: Tensor,
        cache: Any,
        choose_last: Callable[[int, Tensor], Tensor],
    ) -> Predicted:
        """Decoding pass over T new positions. choose_last(column, feature_BC) → ids (B) drawn after the last one."""
        known_BTW = followers(ids_BTW)
        image_BTW = torch.where(self.is_image(known_BTW), known_BTW, NONE)
        inputs = self._inputs(ids_BTW, mask, positions_BT, cache)
        return self.head(inputs, last_chosen(image_BTW, choose_last))

    def output_rows(self) -> list[Rows]:
        """The output matrix in parts: text ids and specials first, then each depth's codes.

        Taken apart once for all: a slice for each part would build a gradient of the full size for each.
        """
        output: Any = self.lm.get_output_embeddings()
        v = self.form.vocabulary
        sizes = [v.image_offset, *[v.codebook_size] * v.depth, output.weight.shape[0] - v.size]
        weights = output.weight.split(sizes)
        bias = getattr(output, "bias", None)
        biases: Any = bias.split(sizes) if bias is not None else [None] * len(sizes)
        return [*zip(weights, biases, strict=True)][:-1]

    def text_logits(self, hidden: Tensor, rows: list[Rows] | None = None) -> Tensor:
        """(…,C) → (…,V): scores of text ids and specials, unmasked. rows: `output_rows()`, if at hand."""
        return self.finish(F.linear(hidden, *(rows or self.output_rows())[0]))

    def image_logits(self, feature: Tensor, depth: int, rows: list[Rows] | None = None) -> Tensor:
        """(…,C) → (…,K): scores of one depth's codes."""
        return self.finish(F.linear(feature, *(rows or self.output_rows())[1 + depth]))

    def is_image(self, ids: Tensor) -> Tensor:
        return ids >= self.form.vocabulary.image_offset

    def embed(self, ids: Tensor) -> Tensor:
        """ids (…) → rows (…,C); zeros where NONE."""
        rows = self.lm.get_input_embeddings()(ids.clamp(min=0))
        return rows * (ids >= 0).unsqueeze(-1)

    def _inputs(self, ids_BTW: Tensor, mask: Tensor, positions_BT: Tensor, cache: Any) -> TrunkInputs:
        trunk = self.lm.base_model
        embedded_BTC = self.embed(ids_BTW).sum(2)

        def run() -> Tensor:
            return trunk(
                inputs_embeds=embedded_BTC,
                attention_mask=attention_mask(self.lm.config, mask, embedded_BTC.dtype),
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

        return TrunkInputs(run, decoder_layers(trunk), self.embed)


def followers(ids_BTW: Tensor) -> Tensor:
    """What stands after each position; NONE after the last. After a document's last one stands the next one's <bos>."""
    return torch.cat([ids_BTW[:, 1:], torch.full_like(ids_BTW[:, :1], NONE)], 1)


def embedding(lm: PreTrainedModel) -> Tensor:
    """The input rows (V,C)."""
    module: Any = lm.get_input_embeddings()
    return module.weight


def from_scratch(config: dict[str, Any], vocabulary_size: int, seed: int) -> PreTrainedModel:
    """A language model with random weights. config: arguments of a transformers configuration, with `model_type`."""
    config = dict(config)
    if "model_type" not in config:
        raise ValueError("the configuration of a new language model needs model_type, e.g. qwen3")
    built = AutoConfig.for_model(config.pop("model_type"), **config, vocab_size=vocabulary_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32)
