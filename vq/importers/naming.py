"""Names of tensors elsewhere ↔ names here: what is missing, unknown or of another shape is said, all of it.

Knows that a model has parts with names; not which models there are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vqlm.errors import ConfigError

# Module here → the module elsewhere that it comes from; several are joined along their outputs (q, k, v).
Modules = Mapping[str, str | tuple[str, ...]]


def check_sound(origin: str, tensors: dict[str, Tensor]) -> None:
    """ConfigError unless all are plain, finite tensors whose numbers are really in the file."""
    bad = []
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_complex():
            bad.append(
                f"{name}: not a plain tensor of numbers ({tensor.dtype}, {tensor.layout}, {tensor.device})"
            )
        elif tensor.numel() == 0:
            bad.append(f"{name}: of shape {tuple(tensor.shape)}, which holds nothing")
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            bad.append(f"{name}: of shape {tuple(tensor.shape)}, whose numbers are not in the file")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad.append(f"{name}: holds NaN or infinite numbers")
    if bad:
        raise ConfigError(f"{origin} holds tensors that cannot be used.\n" + lines("unusable", bad))


@dataclass
class Parts:
    """The tensors of one tokenizer elsewhere, with a record of which were taken and which left out on purpose."""

    origin: str
    prefix: str  # what stood before each name in the file
    tensors: dict[str, Tensor]
    taken: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why → names

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor that sizes are read from. ConfigError if it is not there."""
        if name not in self.tensors:
            raise ConfigError(
                f"{self.origin}: {self.prefix}{name} is missing; without it the architecture is not known"
            )
        return self.tensors[name].shape

    def take(self, name: str) -> Tensor:
        """A tensor as float32. ConfigError if it is not there."""
        self.shape(name)
        self.taken.add(name)
        return self.tensors[name].float()

    def count(self, template: str) -> int:
        """How many numbers, from 0 on, `{}` stands for in names that begin as `template`: the length of a list.

        Numbers of more than three digits are no such list: a file may not ask for a million layers by one name.
        """
        before, after = (re.escape(each) for each in template.split("{}"))
        found = [re.match(f"{before}(\\d{{1,3}}){after}(\\.|$)", name) for name in self.tensors]
        return 1 + max((int(each[1]) for each in found if each), default=-1)

    def has(self, beginning: str) -> bool:
        return any(name.startswith(beginning) for name in self.tensors)

    def leave_out(self, why: str, pattern: str) -> None:
        """Set aside what matches `pattern` from its beginning; it is reported, with the reason."""
        matched = [name for name in self.tensors if re.match(pattern, name) and name not in self.taken]
        if matched:
            self.left_out.setdefault(why, []).extend(matched)

    def fill(self, module: nn.Module, modules: Modules) -> None:
        """Load `module` from these tensors. ConfigError lists what is missing and what has another shape."""
        missing, wrong, state = [], [], {}
        for name, expected in module.state_dict().items():
            inner, _, leaf = name.rpartition(".")
            sources = modules[inner]
            names = [f"{each}.{leaf}" for each in ((sources,) if isinstance(sources, str) else sources)]
            absent = [each for each in names if each not in self.tensors]
            if absent:
                missing += absent
                continue
            parts = [self.take(each) for each in names]
            shape = torch.Size([expected.shape[0] // len(parts), *expected.shape[1:]])
            for each, part in zip(names, parts, strict=True):
                if not same_layer(part.shape, shape):
                    wrong.append(f"{self.prefix}{each} is {tuple(part.shape)}, expected {tuple(shape)}")
            if not wrong:
                state[name] = torch.cat([part.reshape(shape) for part in parts])
        if missing or wrong:
            raise ConfigError(
                f"{self.origin} does not fit the architecture that its other tensors show.\n"
                + lines("missing", grouped(self.prefix, missing))
                + lines("other shape", wrong)
            )
        module.load_state_dict(state)

    def finish(self) -> None:
        """ConfigError if something was neither taken nor left out on purpose."""
        known = self.taken.union(*self.left_out.values()) if self.left_out else self.taken
        unknown = [name for name in self.tensors if name not in known]
        if unknown:
            raise ConfigError(
                f"{self.origin} holds tensors that this importer does not know, so the model may not be the one "
                "expected.\n" + lines("unknown", grouped(self.prefix, unknown))
            )


def same_layer(shape: torch.Size, expected: torch.Size) -> bool:
    """Equal, or a 1x1 convolution and a linear layer of the same widths."""
    return shape == expected or (
        len(shape) != len(expected) and without_ones(shape) == without_ones(expected)
    )


def without_ones(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:2], *(n for n in shape[2:] if n != 1))


def grouped(prefix: str, names: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone become one line with a count."""
    names = list(names)
    counts = Counter(re.sub(r"\d+", "N", name) for name in names)
    example = {re.sub(r"\d+", "N", name): name for name in reversed(names)}
    return [
        f"{prefix}{example[pattern]}"
        if n == 1
        else f"{prefix}{pattern} ({n} of them, as {prefix}{example[pattern]})"
        for pattern, n in counts.items()
    ]


def lines(title: str, each: Iterable[str]) -> str:
    return "".join(f"  {title}: {one}\n" for one in each)


def find_prefix(names: Iterable[str], fits: Callable[[set[str]], bool], anchor: str) -> list[str]:
    """Every prefix after which `fits` accepts the names; `anchor` is a name that is there in all of them."""
    names = set(names)
    ends = [name for name in names if name == anchor or name.endswith("." + anchor)]
    prefixes = sorted(name[: -len(anchor)] for name in ends)
    return [
        prefix
        for prefix in prefixes
        if fits({name[len(prefix) :] for name in names if name.startswith(prefix)})
    ]
