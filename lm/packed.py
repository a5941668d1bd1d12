"""Weights as oneDNN wants to read them: decoding on a CPU in a half to a third of the time.

A step of decoding multiplies a few rows by every weight, so it takes as long as reading the weights does. torch reads
its own layout at a third to two thirds of the memory's speed there, and one that is made once at full speed
(`benchmarks/generate.py`). Same numbers up to rounding. It costs a second copy in memory.

Legend: N outputs, C inputs.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm import attention, fused
from lm.architecture import exchanged
from lm.model import MultimodalLM, Rows

LARGEST = 8 * 2**30  # bytes of weights; a model above keeps its own layout
TYPICAL = 16  # rows of a step, for which the layout is chosen
LOOKED_AT = 16  # every so manieth row of a matrix is compared
Version = tuple[int, int, int]
Packed = tuple[list[Version], Callable[..., Tensor]]  # versions of a module's weights, its new `forward`


def weights_of(model: MultimodalLM) -> PackedWeights:
    """The packed weights of a model, up to date; kept as long as the model is."""
    with _LOCK:
        found = _KEPT.get(model)
        if found is None:
            found = _KEPT[model] = PackedWeights(model)
    with found.lock:
        found.refresh()
    return found


class PackedWeights:
    """The decoder layers or linear layers of a model and its output rows, packed; made again where they change."""

    def __init__(self, model: MultimodalLM):
        self._model = weakref.ref(model)  # or keeping these would keep the model
        self.parts: dict[nn.Module, Packed] = {}
        self.rows: list[Callable[[Tensor], Tensor]] = []
        self.rows_versions: list[Version] = []
        self.lock = threading.RLock()  # decoding exchanges parts of the model for the length of a pass

    @property
    def model(self) -> MultimodalLM:
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    @property
    def pays(self) -> bool:
        """On a CPU that has oneDNN for the model's numbers, up to `LARGEST`; how much memory is free is not asked."""
        weight = next(self.model.parameters())
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or size > LARGEST:
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    def refresh(self) -> None:
        """Pack what is new or was written to since (`_version` says what is seen)."""
        if not self.pays:
            self.parts, self.rows = {}, []
            return
        output: Any = self.model.lm.get_output_embeddings()
        known, self.parts = self.parts, {}
        for part in self._parts(self.model):
            if part is output:
                continue  # its rows are packed by kind, below
            versions = [_version(weight) for weight in part.parameters()]
            old = known.get(part)
            self.parts[part] = old if old and old[0] == versions else (versions, stand_in(part))
        versions = [_version(weight) for weight in output.parameters()]
        if self.rows_versions != versions or not self.rows:
            parts: list[Rows] = self.model.output_rows()
            self.rows, self.rows_versions = [packed(*part) for part in parts], versions

    def _parts(self, module: nn.Module) -> Iterator[nn.Module]:
        """Whole decoder layers where they are known, single linear layers elsewhere."""
        if (attention.suits(self.model.lm) and fused.suits(module)) or _is_linear(module):
            yield module
        else:
            for child in module.children():
                yield from self._parts(child)

    @contextmanager
    def used(self) -> Iterator[None]:
        """For the length of the block the model's layers read packed weights, and no other thread gets here."""
        with self.lock, exchanged({part: forward for part, (_, forward) in self.parts.items()}):
            yield

    def text_logits(self, hidden: Tensor) -> Tensor:
        """As `MultimodalLM.text_logits`."""
        return self.model.finish(self.rows[0](hidden)) if self.rows else self.model.text_logits(hidden)

    def image_logits(self, feature: Tensor, depth: int) -> Tensor:
        """As `MultimodalLM.image_logits`."""
        if not self.rows:
            return self.model.image_logits(feature, depth)
        return self.model.finish(self.rows[1 + depth](feature))


def _version(weight: Tensor) -> Version:
    """Other after a change: torch's count of writes, the place in memory, and a checksum.

    torch counts no writes through `.data`, nor through a numpy array that shares the memory. Of those are seen all that
    reach a vector, or one of every `LOOKED_AT` rows of a matrix; not one that leaves these rows as they were, such as a
    write to a single row. It takes 45 ms for each GB of weights, once for each `Decoder`.
    """
    told = weight.detach()
    seen = told[::LOOKED_AT] if told.dim() > 1 else told.reshape(-1)
    content: Any = seen.contiguous().view(torch.uint8).numpy()
    return weight._version, weight.data_ptr(), zlib.crc32(content)


def stand_in(part: Any) -> Callable[..., Tensor]:
    """What a linear layer or a decoder layer computes, by packed products."""
    return packed(part.weight, part.bias) if type(part) is nn.Linear else fused.FusedLayer(part, packed)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype in (torch.float32, torch.bfloat16)


_KEPT: weakref.WeakKeyDictionary[MultimodalLM, PackedWeights] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def packed(weight_NC: Tensor, bias_N: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x (…,C) → (…,N), as `F.linear`."""
    operators: Any = torch.ops.mkldnn
    with torch.no_grad():
        weight = operators._reorder_linear_weight(weight_NC.detach().contiguous(), TYPICAL)
    bias = None if bias_N is None else bias_N.detach().contiguous()

    def multiply(x: Tensor) -> Tensor:
        return operators._linear_pointwise.default(x, weight, bias, "none", [], "")

    return multiply
