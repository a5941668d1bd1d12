"""The grammar for transformers' own `generate`: only ids that may come next can be drawn from the plain folder.

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(ids, logits_processor=[GrammarProcessor.from_pretrained(folder)], max_new_tokens=300)

For bundles whose plain model is the whole model: the flat layout with the linear head. It masks logits and prepares
nothing: prompts come from `lm.processor`.

Legend: B rows, T positions, V ids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor

from lm.bundle import check_plain, read_about, read_format
from lm.grammar import DONE, Grammar
from lm.sequence import SequenceFormat
from vqlm.hub import local_folder


class GrammarProcessor(LogitsProcessor):
    """Masks what may not follow, each row in its own state. Rows begin with <bos>, which padding may precede.

    images=False: no picture may be drawn, though prompts may hold some. One processor serves one call of `generate` at
    a time.
    """

    def __init__(self, form: SequenceFormat, images: bool = True):
        if form.width != 1:
            raise ValueError(
                f"layout {form.layout.name!r} has {form.width} ids a position; transformers draws one: flat"
            )
        self.form, self.grammar = form, Grammar(form)  # which reads prompts too
        self.table_KV = Grammar(form, images).legal_table()
        self.read_BT = torch.zeros(0, 0, dtype=torch.int64)
        self.state_B = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def from_pretrained(cls, folder: str | Path, images: bool = True) -> GrammarProcessor:
        """Of a bundle. ConfigError where there is none, ValueError where the plain model is not the whole model."""
        folder = local_folder(folder)
        about = read_about(folder)
        form = read_format(about, folder)
        check_plain(about, form)
        return cls(form, images)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B,T) so far, scores (B,V) → scores, -inf where an id may not follow. ValueError on an illegal prompt."""
        self._read(input_ids.cpu())
        legal_BV = self.table_KV[self.grammar.legal_kinds(self.state_B)].to(scores.device)
        masked = torch.full_like(scores, -torch.inf)
        V = legal_BV.shape[1]  # a model may have more rows than ids
        masked[:, :V] = scores[:, :V].masked_fill(~legal_BV, -torch.inf)
        return masked

    def _read(self, ids_BT: Tensor) -> None:
        B, T = ids_BT.shape
        known = self.read_BT.shape[1]
        if self.read_BT.shape == (B, T - 1) and torch.equal(self.read_BT, ids_BT[:, :-1]):
            self.state_B = self._step(self.state_B, ids_BT[:, known])
        else:
            starts = [self._start(row_T) for row_T in ids_BT]
            self.state_B = torch.tensor(starts)
        self.read_BT = ids_BT.clone()

    def _step(self, state_B: Tensor, token_B: Tensor) -> Tensor:
        running_B = state_B != DONE
        moved_B = self.grammar.advance(state_B[running_B], token_B[running_B, None])
        return state_B.masked_scatter(running_B, moved_B)

    def _start(self, row_T: Tensor) -> int:
        """The state after a prompt: what stands before its <bos> is padding."""
        found = (row_T == self.form.vocabulary.bos).nonzero()
        if not len(found):
            raise ValueError(
                "a prompt must begin with <bos>; the text tokenizer of a bundle may not add it by itself"
            )
        return self.grammar.start(row_T[int(found[0]) :, None])
