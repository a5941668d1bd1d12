"""The one training loop of both rooms: a learner's step, its budget, its checkpoints, its end.

Lightning drives the batches; counting, schedules and checkpoints are ours, because a framework's step count means
other things with two optimizers, and its checkpoints are pickles. Knows neither pictures nor tokens.

Several processes (ranks) may run one loop, each on its share of every batch: they take the same steps, skip the same
batches and stop together; the first one writes. Each holds the whole model, or a part of it (`vqlm.shards`); then each
writes its part of a checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from vqlm.errors import ConfigError, Interrupted
from vqlm.files import clean, new_folder, read_json, seal_is_broken, sealed, sha256, write_json, write_text
from vqlm.hardware import Hardware, peak_flops
from vqlm.progress import percent
from vqlm.ranks import (
    first_rank_names,
    first_rank_says,
    largest_over_ranks,
    leave,
    rank,
    rank_count,
    rows_of_ranks,
    sum_over_ranks,
)
from vqlm.shards import (
    checksums,
    fill,
    forget_step,
    hollow,
    own_part,
    read_shards,
    replace_parameters,
    run_whole,
    shapes,
    shard,
    total_norm,
    used_alone,
    write_shards,
)

FALLS: dict[str, Callable[[float], float]] = {  # share of the fall that is left, 1..0 → factor 1..0
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}
COUNTERS = ("batches_seen", "samples_seen", "seconds", "flops", "bad_batches", "bad_in_a_row")
WHOLE = "state.safetensors"  # of a checkpoint that one process wrote
# SIGUSR1 is what a scheduler sends a while before a job's time is over; not every system has it.
STOPPING = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
FOREVER = 10**9  # batches of a run that only its minutes end


@dataclass(frozen=True)
class Budget:
    """When a run ends, and how its learning rate goes: whichever of batches and minutes is used up first.

    batches: 0 = no limit; minutes: of training, over all resumed parts, 0 = no limit. The learning rate rises over
    `warmup` batches, stays, and falls over the last `cooldown` share of the budget to `floor` times itself: linearly
    ("WSD", Hu et al. 2024, arXiv 2404.06395) or as half a cosine (Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5;
    with cooldown=1 there is no constant part). With a limit in minutes two runs on machines of unequal speed differ;
    for exact repetition set batches alone.
    """

    batches: int = 0
    minutes: float = 0.0
    warmup: int = 50
    cooldown: float = 0.5
    fall: Literal["linear", "cosine"] = "linear"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.fall not in FALLS or not 0 <= self.floor < 1:
            raise ValueError(
                f"fall={self.fall!r} must be one of {', '.join(FALLS)}, floor={self.floor} lie in [0, 1)"
            )
        if self.batches < 0 or self.minutes < 0 or self.warmup < 0 or not 0 <= self.cooldown <= 1:
            raise ValueError(
                f"batches={self.batches}, minutes={self.minutes}, warmup={self.warmup} must not be negative, "
                f"cooldown={self.cooldown} must lie in [0, 1]"
            )
        if not self.batches and not self.minutes:
            raise ValueError("batches=0 and minutes=0: give at least one limit")

    def progress(self, batches: int, seconds: float) -> float:
        """Share of the run done, 0..1."""
        by_batches = batches / self.batches if self.batches else 0.0
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(by_batches, by_time))

    def rate(self, batches: int, progress: float) -> float:
        """Factor on the learning rate, 0..1."""
        rise = min(1.0, (batches + 1) / (self.warmup + 1))
        left = min(1.0, (1 - progress) / self.cooldown) if self.cooldown else 1.0
        return rise * (self.floor + (1 - self.floor) * FALLS[self.fall](left))


class Learner(L.LightningModule):
    """A model in training. A subclass says what a batch costs (`losses`); this class does the step.

    optimizer: parameters → optimizer, with its base learning rate. clip: largest gradient norm. max_bad_batches: a
    batch whose loss or gradient is not finite is skipped before any weight is updated; so many in a row end the run.
    average: decay of an exponential moving average of the weights, which is then the `result`; null: the last weights.
    Its first steps decay faster, (1 + n) / (10 + n) at step n, or a short run would be left with its first weights.
    companions: modules trained beside the model and left out of it (a text encoder that a loss needs, say).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        budget: Budget,
        clip: float = 1.0,
        max_bad_batches: int = 10,
        average: float | None = None,
        companions: dict[str, nn.Module] | None = None,
    ):
        super().__init__()
        self.work_has_flops = False  # a subclass whose `work` counts them says so: the peak is then measured
        if average is not None and not 0 < average < 1:
            raise ValueError(f"average={average}: a decay between 0 and 1, such as 0.999, or null")
        if clip <= 0 or max_bad_batches < 1:
            raise ValueError(f"clip={clip} must be positive and max_bad_batches={max_bad_batches} at least 1")
        self.automatic_optimization = False
        self.model, self.budget, self.clip, self.max_bad_batches = model, budget, clip, max_bad_batches
        self.companions = nn.ModuleDict(companions)
        self.averaged = AveragedModel(model, avg_fn=warmed_average(average)) if average else None
        if self.averaged is not None:
            self.averaged.requires_grad_(False)  # or ranks would wait for its gradients
        self.optimizer = optimizer(self.parameter_groups())
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batches_seen = 0
        self.samples_seen = 0
        self.seconds = 0.0
        self.flops = 0.0  # of all batches and ranks, where `work` counts them
        self.rate = 0.0  # factor on the learning rate, 0..1
        self._clock: float | None = None
        self.bad_batches = 0
        self.bad_in_a_row = 0
        self.latest: dict[str, float] = {}
        self.throughput = Throughput()
        self.random_states: dict[str, Tensor] = {}  # of the checkpoint that a run goes on from
        self.plain: list[nn.Module] = []  # of parted parameters: the modules that will hold them in the end

    # what a subclass gives -------------------------------------------------------------------------------------

    def losses(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name (their sum is minimised) and numbers to log. May raise ArithmeticError: bad batch.

        On several ranks: the same names on each, losses whose mean over the ranks is the loss of all they hold, numbers
        that are equal on all, and no ArithmeticError on one rank alone.
        """
        raise NotImplementedError

    def parameter_groups(self) -> Iterable[Any]:
        return [p for part in (self.model, self.companions) for p in part.parameters() if p.requires_grad]

    def units(self, model: nn.Module) -> Iterable[nn.Module]:
        """Parts of the model (or of its average) that run one after another, each gathered for itself where ranks
        hold parts of it. What a step reads outside of them is read in `teach`, or after it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is parted over ranks")

    def gradients(self) -> dict[str, float]:
        """Called when gradients are there, before they are clipped; returns numbers to log."""
        return {}

    def work(self, batch: Any) -> dict[str, float]:
        """What the step on this rank's batch was made of, by name; log and bar show it per second.

        "flops": those that the model needs, shown as a share of what the hardware can do.
        """
        return {}

    def after_step(self) -> dict[str, float]:
        """Called after each good step; returns numbers to log."""
        return {}

    def before_step(self) -> None:
        """Called before each step: what a bad batch must not change may be remembered here, for `undo_step`."""

    def undo_step(self) -> None:
        """Called when a batch is skipped, before the next one: forget what its forward pass has changed."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beside model and optimizer that a resumed run needs."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        pass

    # the step --------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        return self.budget.progress(self.batches_seen, self.seconds)

    @property
    def result(self) -> nn.Module:
        """The model to keep: the averaged one where an average is taken (its buffers are the model's own)."""
        return self.model if self.averaged is None else self.averaged.module

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def training_step(self, batch: Any, batch_index: int) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
        rate = self.rate = self.budget.rate(self.batches_seen, self.progress)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.zero_grad(set_to_none=True)
        logs = self._step(batch)
        self.batches_seen += 1
        now = time.perf_counter()
        # since the end of the step before: loading and saving count too
        passed = first_rank_says(now - self._clock, self.device)
        work = _summed({"samples": float(sample_count(batch)), **self.work(batch)}, self.device)
        self.seconds += passed
        self.samples_seen += int(work.pop("samples"))
        self.flops += work.get("flops", 0.0)
        self._clock = now
        self.latest = {**logs, "rate": rate, **self.throughput.add(work, passed)}

    def _step(self, batch: Any) -> dict[str, float]:
        try:
            self.before_step()
            losses, logs = self.losses(batch)
            total = torch.stack(list(losses.values())).sum()
            values = _mean_of_ranks(losses)
            whole = float(sum_over_ranks(total.detach()) / rank_count())
            if not math.isfinite(whole):
                raise ArithmeticError(f"loss is {whole}: {values}")
            with used_alone(self.model):
                self.manual_backward(total)
            logs |= self.gradients()
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = total_norm([p.grad for p in trained if p.grad is not None])
            nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
            if not torch.isfinite(norm):
                raise ArithmeticError(f"gradient norm is {float(norm)}")
        except ArithmeticError as error:
            self._skip(error)
            return {}
        self.optimizer.step()
        self.bad_in_a_row = 0
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        logs |= {"loss": whole, **values}
        return logs | self.after_step()

    def _skip(self, error: ArithmeticError) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        forget_step(self.model)
        self.undo_step()
        self.bad_batches += 1
        self.bad_in_a_row += 1
        warnings.warn(f"batch {self.batches_seen} skipped, no weight was updated: {error}", stacklevel=2)
        if self.bad_in_a_row >= self.max_bad_batches:
            raise RuntimeError(
                f"{self.bad_in_a_row} batches in a row were not finite (last: {error}). "
                "Lower the learning rate, or look at the data. Checkpoints that were saved before are intact."
            )

    # in parts --------------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        return bool(self.plain)

    def shard(self, hardware: Hardware) -> None:
        """Part the model over the ranks, before the first step; `join` makes it whole."""
        if len(self.companions):
            raise ConfigError(
                f"strategy=fsdp: {', '.join(self.companions)} would be trained beside the model"
            )
        self.plain = [hollow(self.result)]
        whole = list(self.model.parameters())
        for model in (self.model, *([] if self.averaged is None else [self.averaged.module])):
            shard(model, self.units(model), ["teach"], hardware.device, hardware.precision == "bf16")
        replace_parameters(self.optimizer, whole, list(self.model.parameters()))

    def join(self) -> None:
        """Training is over: `result` is whole again, on the first rank and the CPU. Called on all ranks."""
        plain = self.plain.pop()
        fill(plain, self.result)
        if self.averaged is None:
            self.model = plain
        else:
            self.averaged.module = plain

    def measured(self, function: Callable[[], Any]) -> Any:
        """function(), which may run `result`; called on all ranks."""
        return run_whole(self.result, function)

    # state -----------------------------------------------------------------------------------------------------

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, entries in optimizer["state"].items():
            tensors |= {f"optimizer/{index}/{k}": torch.as_tensor(v) for k, v in entries.items()}
        tensors |= {f"companions/{k}": v for k, v in self.companions.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged/{k}": v for k, v in self.averaged.state_dict().items()}
        tensors |= {f"extra/{k}": v for k, v in self.extra_state().items()}
        tensors |= _random_states(self.device)
        return tensors, {"counters": {name: getattr(self, name) for name in COUNTERS}}

    def load_training_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        names = ("model", "companions", "averaged", "optimizer", "extra", "random")
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.model.load_state_dict(parts["model"])
        self.companions.load_state_dict(parts["companions"])
        if self.averaged is not None:
            self.averaged.load_state_dict(parts["averaged"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["optimizer"].items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.load_extra_state(parts["extra"])
        self.random_states = parts["random"]
        self.restore_random()
        for name, value in data["counters"].items():
            setattr(self, name, value)

    def empty_state(self, sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Tensors of these shapes, parted as this run parts its own: what a checkpoint is read into.

        What an optimizer keeps is parted as its parameter is, if it has its shape.
        """
        own = self.training_state()[0]
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        made = {}
        for name, (size, dtype) in sizes.items():
            place, _, rest = name.partition("/")
            like = trained[int(rest.partition("/")[0])] if place == "optimizer" else own.get(name)
            if like is not None and like.shape == size:
                made[name] = torch.empty_like(like.detach(), dtype=dtype)
            else:
                made[name] = torch.empty(size, dtype=dtype)
        return made

    def restore_random(self) -> None:
        """Random numbers go on where the saved run was. Again right before training: what was built since may draw."""
        if self.random_states:
            _set_random_states(self.random_states)


def warmed_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """For `AveragedModel`: average, new value and steps averaged so far → the next average."""

    def step(average: Tensor, value: Tensor, n: Tensor | int) -> Tensor:
        return torch.lerp(value, average, min(decay, (1 + int(n)) / (10 + int(n))))

    return step


def _mean_of_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    values = sum_over_ranks(torch.stack([loss.detach() for loss in losses.values()])) / rank_count()
    return dict(zip(losses, values.tolist(), strict=True))


def _summed(work: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over ranks; the names are equal on all."""
    if rank_count() == 1:
        return work
    total = sum_over_ranks(torch.tensor(list(work.values()), dtype=torch.float64, device=device))
    return dict(zip(work, total.tolist(), strict=True))


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of each rank: random/cpu and random/cuda of the first, random/cpu/1 … of the others."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    found = {f"random/{name}": state for name, state in states.items()}
    if rank_count() > 1:
        for name, state in states.items():
            for number, row in enumerate(rows_of_ranks(state[None].to(device)).cpu()):
                found[f"random/{name}/{number}" if number else f"random/{name}"] = row
    return found


def _set_random_states(states: dict[str, Tensor]) -> None:
    """This rank's own; a rank that the saved run did not have takes the first one's."""
    own = {name: states.get(f"{name}/{rank()}", states.get(name)) for name in ("cpu", "cuda")}
    assert own["cpu"] is not None
    torch.set_rng_state(own["cpu"].cpu().to(torch.uint8))
    if own["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"].cpu())


class Throughput:
    """Work per second since this process began, its first step (which allocates and compiles) left out."""

    def __init__(self) -> None:
        self.peak = 0.0  # floating-point operations per second of all ranks; 0: unknown
        self.total: dict[str, float] = {}
        self.seconds: float | None = None

    def add(self, work: dict[str, float], seconds: float) -> dict[str, float]:
        """Numbers to log: NAME_per_second, and mfu where "flops" is among the work and the peak is known."""
        if self.seconds is None:
            self.seconds = 0.0
            return {}
        self.seconds += seconds
        self.total = {name: self.total.get(name, 0.0) + value for name, value in work.items()}
        rates = {name: value / max(self.seconds, 1e-9) for name, value in self.total.items()}
        flops = rates.pop("flops", 0.0)
        found = {f"{name}_per_second": rate for name, rate in rates.items()}
        return found | ({"mfu": flops / self.peak} if flops and self.peak else {})


def sample_count(batch: Any) -> int:
    """Samples in a batch: its first dimension, or what it says of itself."""
    return int(batch.shape[0]) if isinstance(batch, Tensor) else int(getattr(batch, "samples", 1))


class Checkpoints:
    """`folder/batch-00000123/`: state.safetensors and state.json with its checksum; the newest `keep` stay.

    Where ranks hold parts of a model, a file for each rank in place of state.safetensors. Either is read by one process
    and by any number of ranks.

    identity: JSON that says what is trained on; a checkpoint of anything else is refused, not resumed.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any] | None = None, keep: int = 2):
        self.folder, self.identity, self.keep = Path(folder), identity or {}, keep

    def save(self, learner: Learner) -> Path:
        """Called on all ranks; the first one writes, and each its part of a model that is parted."""
        tensors, data = learner.training_state()
        data["identity"] = self.identity
        target = self.folder / f"batch-{learner.batches_seen:08d}"
        with _told(target, tensors):
            if learner.sharded:
                self._save_parts(target, tensors, data)
            elif rank() == 0:
                self._save_whole(target, tensors, data)
        if rank():
            return target
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _save_whole(self, target: Path, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        with new_folder(target) as folder:
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, str(folder / WHOLE)
            )
            write_json(folder / "state.json", sealed({**data, "sha256": sha256(folder / WHOLE)}))

    def _save_parts(self, target: Path, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        with ExitStack() as stack:
            folder = stack.enter_context(new_folder(target)) if rank() == 0 else Path()
            sums = write_shards(Path(first_rank_names(str(folder))), tensors)
            if rank() == 0:
                write_json(folder / "state.json", sealed({**data, "sha256": sums}))

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.folder.glob("batch-*/state.json"))

    def resume(self, learner: Learner) -> Path | None:
        """Load the newest checkpoint whose checksum is right; a damaged one is named and passed over."""
        if self.folder.is_dir() and rank() == 0:
            clean(self.folder)
        for path in reversed(self.all()):
            try:
                data = read_json(path / "state.json")
                whole = (path / WHOLE).is_file()
                found = sha256(path / WHOLE) if whole else checksums(path)
                if not isinstance(data, dict) or seal_is_broken(data) or data["sha256"] != found:
                    raise ValueError("checksum differs")
            except (OSError, ValueError, KeyError) as error:
                warnings.warn(f"{path} is damaged ({error}); trying the one before", stacklevel=2)
                continue
            self._check(path, data.get("identity", {}))
            try:
                tensors = _read_whole(path / WHOLE, learner) if whole else _read_parts(path, learner)
            except (SafetensorError, OSError) as error:  # a right checksum of what was never a checkpoint
                warnings.warn(f"{path} cannot be read ({error}); trying the one before", stacklevel=2)
                continue
            learner.load_training_state(tensors, data)
            return path
        return None

    def _check(self, path: Path, theirs: dict[str, Any]) -> None:
        for name in sorted(self.identity.keys() | theirs.keys()):
            old, new = theirs.get(name), self.identity.get(name)
            if old != new:
                raise ConfigError(
                    f"{path} was trained with {name} {old}, now it is {new}: "
                    "going on would mix the two. Name another out=, or restore what it was trained on."
                )


@contextmanager
def _told(target: Path, tensors: dict[str, Tensor]) -> Iterator[None]:
    """What a full or read-only disk says names neither path nor size."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(
            f"{target}: a checkpoint of {size:,} bytes could not be saved ({error}); those before it are intact"
        ) from error


def _read_whole(path: Path, learner: Learner) -> dict[str, Tensor]:
    found = load_file(str(path))
    if not learner.sharded:
        return found
    empty = learner.empty_state({name: (tensor.shape, tensor.dtype) for name, tensor in found.items()})
    return {name: own_part(tensor, empty[name]) for name, tensor in found.items()}


def _read_parts(folder: Path, learner: Learner) -> dict[str, Tensor]:
    found = learner.empty_state(shapes(folder))
    read_shards(folder, found)
    return found


class Run(L.Callback):
    """Watches one `fit`: progress on the terminal, log.jsonl, checkpoints, the end of the budget, and signals."""

    def __init__(
        self, learner: Learner, folder: Path, identity: dict[str, Any], checkpoint_minutes: float, label: str
    ):
        self.learner, self.label = learner, label
        self.log_path = folder / "log.jsonl"
        self.checkpoints = Checkpoints(folder / "checkpoints", identity)
        self.checkpoint_seconds = checkpoint_minutes * 60
        self.last_saved = time.monotonic()
        self.last_logged = -math.inf
        self.signal_seen: int | None = None
        self.bar: Any = None
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if rank() == 0:
            self.log_path.touch()
            kept = [e for e in read_log(self.log_path) if e["batch"] <= self.learner.batches_seen]
            write_text(self.log_path, "".join(json.dumps(e) + "\n" for e in kept))
            self.bar = percent(self.label)
        self.handlers = {s: signal.signal(s, self._on_signal) for s in STOPPING}
        self.learner.restore_random()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        learner = self.learner
        done = learner.progress >= 1
        if self.bar is not None:
            self.bar.update(100 * learner.progress - self.bar.n)
            self.bar.set_postfix_str(postfix(learner), refresh=False)
            if done or time.monotonic() - self.last_logged > 1.0:
                self.last_logged = time.monotonic()
                self._write_log()
        self.signal_seen = largest_over_ranks(self.signal_seen or 0, learner.device) or None
        due = time.monotonic() - self.last_saved > self.checkpoint_seconds
        if done or self.signal_seen:
            trainer.should_stop = True
        if trainer.should_stop or first_rank_says(float(due), learner.device):
            self.checkpoints.save(learner)
            self.last_saved = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal_seen:  # the second one does not wait for the step
            # not KeyboardInterrupt, of which Lightning makes an exit code of 1
            raise SystemExit(130) if number == signal.SIGINT else Interrupted
        self.signal_seen = number
        if rank() == 0:
            print(f"\n{self.label}: stopping after this step; the state will be saved", file=sys.stderr)

    def _write_log(self) -> None:
        learner = self.learner
        entry = {
            "batch": learner.batches_seen,
            "samples": learner.samples_seen,
            "minutes": learner.seconds / 60,
        }
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, **learner.latest}) + "\n")


def postfix(learner: Learner) -> str:
    latest, suffix = learner.latest, "_per_second"
    rates = {"samples": learner.samples_seen / max(learner.seconds, 1e-9)}
    rates |= {k.removesuffix(suffix): v for k, v in latest.items() if k.endswith(suffix)}
    parts = [f"{rate:.0f} {name.replace('_', ' ')}/s" for name, rate in rates.items()]
    parts += [f"MFU {latest['mfu']:.0%}"] if "mfu" in latest else []
    return f"batch {learner.batches_seen}, {', '.join(parts)}, loss {latest.get('loss', math.nan):.4f}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of log.jsonl; a last line cut short by a kill is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


class Once(DataLoader):
    """Batches `start`, `start`+1, … of a dataset whose item n is batch n."""

    def __init__(self, batches: Dataset, start: int, workers: int):
        total = len(batches)  # type: ignore[arg-type]
        # a generator of its own: otherwise each start of a run would draw a number from the one that training uses
        sampler, random = _Range(start, total), torch.Generator()
        super().__init__(batches, batch_size=None, sampler=sampler, num_workers=workers, generator=random)


class _Range(torch.utils.data.Sampler[int]):
    def __init__(self, start: int, stop: int):
        self.range = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


def fit(
    learner: Learner,
    batches: Callable[[int], Dataset],
    folder: str | Path,
    hardware: Hardware,
    label: str,
    workers: int = 0,
    checkpoint_minutes: float = 3.0,
    identity: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> bool:
    """Train until the budget is used up, from the newest checkpoint in `folder` if there is one.

    batches: total → dataset whose item n is batch n of the run. identity: JSON that says what is trained on.
    callbacks: what else watches the run; they come before ours, so that what they leave in the learner is saved.
    The learner is left on the hardware's device, its result on the CPU if it was parted (strategy=fsdp). Returns False
    if the run had been finished before.
    Several ranks (`vqlm.ranks.start`): each calls it with its share of the batches. The first one returns, alone again;
    for the others the run is over, and they exit.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came (KeyboardInterrupt: Ctrl-C); the step was finished and the state saved.
        RuntimeError: too many batches in a row were not finite.
    """
    folder = Path(folder)
    check_loading(workers, checkpoint_minutes)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(learner, folder, identity or {}, checkpoint_minutes, label)
    if hardware.strategy == "fsdp":
        learner.shard(hardware)  # on the CPU: a device may not have room for the whole model
    learner.to(hardware.device)  # before a resumed optimizer state is put beside the parameters
    found = run.checkpoints.resume(learner)
    if found and rank() == 0:
        print(f"{label}: going on from {found} ({100 * learner.progress:.0f} % done)", file=sys.stderr)
    unfinished = learner.progress < 1
    if unfinished:
        loader = Once(batches(learner.budget.batches or FOREVER), learner.batches_seen, workers)
        _train(learner, loader, hardware, [*callbacks, run])
    learner.to(hardware.device)  # Lightning leaves it on the CPU
    if learner.sharded and not run.signal_seen:
        learner.join()
    leave()
    if run.signal_seen:
        raise KeyboardInterrupt if run.signal_seen == signal.SIGINT else Interrupted
    return unfinished


def _train(learner: Learner, loader: DataLoader, hardware: Hardware, callbacks: Sequence[L.Callback]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # banners, not news
    if learner.work_has_flops:
        learner.throughput.peak = rank_count() * peak_flops(hardware)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings(
            "ignore", message=".*find_unused_parameters.*"
        )  # a batch without text needs it
        learner.train()  # a model that was loaded comes in eval mode, without its dropout
        trainer = L.Trainer(
            **hardware.lightning,  # type: ignore[arg-type]
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(learner, loader)


def check_loading(workers: int, checkpoint_minutes: float) -> None:
    """ConfigError on settings that `fit` cannot work with; commands call it before they read data."""
    if workers < 0 or checkpoint_minutes <= 0:
        raise ConfigError(
            f"workers={workers} must not be negative, checkpoint_minutes={checkpoint_minutes} be positive"
        )
