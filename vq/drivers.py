"""Who calls `encode_shard`, and how often: this process, several beside it, or the actors of a Ray cluster.

A driver is given the shards that are this process's share and yields what became of each. Shards do not know each
other and writing one twice leaves the same file, so no driver keeps a plan, and one that dies is started again.
It does not know what a shard holds.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from vq.store.writer import Outcome, StoreWriter, Work
from vqlm.errors import ConfigError

PATIENCE = 1.0  # seconds between looks at whether the processes still live


class Driver(Protocol):
    def run(
        self,
        writer: StoreWriter,
        indices: Sequence[int],
        tokenizer: Path,
        advance: Callable[[int], Any],
    ) -> Iterator[Outcome]:
        """Write these shards.

        Args:
            writer: begun; its tokenizer is on its device.
            tokenizer: folder from which other processes load it.
            advance: called with numbers of pictures done.
        """
        ...


class Local:
    """This machine.

    Args:
        processes: 1: this process alone. More: so many beside it, which share its CPU threads, or its GPUs if the
            tokenizer is on one.

    Raises:
        ConfigError: fewer than 1.
    """

    def __init__(self, processes: int = 1) -> None:
        if processes < 1:
            raise ConfigError(f"encode.processes={processes}: at least 1")
        self.processes = processes

    def run(
        self,
        writer: StoreWriter,
        indices: Sequence[int],
        tokenizer: Path,
        advance: Callable[[int], Any],
    ) -> Iterator[Outcome]:
        if self.processes == 1 or len(indices) < 2:
            return (writer.write_shard(index, advance) for index in indices)
        return self._beside(writer.work, indices, tokenizer, device_of(writer.tokenizer), advance)

    def _beside(
        self, work: Work, indices: Sequence[int], tokenizer: Path, device: str, advance: Callable[[int], Any]
    ) -> Iterator[Outcome]:
        """RuntimeError if one of the processes ends before its work is done; what it finished stays."""
        context = multiprocessing.get_context("spawn")  # forked processes would share threads and CUDA state
        told = context.Queue()
        count = min(self.processes, len(indices))
        threads = max(1, torch.get_num_threads() // count)
        beside = [
            context.Process(
                target=_write_all,
                args=(work, list(indices[n::count]), tokenizer, _one_of(device, n), threads, told),
                daemon=True,
            )
            for n in range(count)
        ]
        try:
            for process in beside:
                process.start()
            for _ in indices:
                yield _next_outcome(told, beside, advance)
        finally:
            for process in beside:
                process.terminate()
                process.join()


def _next_outcome(told: Any, beside: Sequence[Any], advance: Callable[[int], Any]) -> Outcome:
    while True:
        try:
            news = told.get(timeout=PATIENCE)
        except queue.Empty:
            dead = [process.exitcode for process in beside if process.exitcode]
            if dead:
                raise RuntimeError(
                    f"a process that was encoding ended with {dead[0]}; run the same command again to go on"
                ) from None
            continue
        if isinstance(news, Outcome):
            return news
        if isinstance(news, Exception):
            raise news
        advance(news)


def _write_all(
    work: Work, indices: Sequence[int], tokenizer: Path, device: str, threads: int, told: Any
) -> None:
    """What a process beside ours does: pictures done and outcomes go into the queue, and so does an error."""
    torch.set_num_threads(threads)
    try:
        model = _load(tokenizer, device)
        for index in indices:
            told.put(work.write(index, model, advance=told.put))
    except Exception as error:
        told.put(error)


class Ray:
    """The actors of a Ray Data pool, on this machine or on a cluster. Needs the extra `scale`.

    Ray starts an actor anew where one dies, and gives its shard to another. Everything that is named must be reachable
    from every machine: the pictures, the tokenizer's folder, the store.

    Args:
        actors: how many encode at once, each with a tokenizer of its own.
        cpus: CPU cores of each.
        gpus: of each; a fraction lets several share one.
        address: of a cluster, "auto" for the one of this machine; null: one that lasts as long as this command.

    Raises:
        ConfigError: numbers out of range.
    """

    def __init__(self, actors: int = 2, cpus: float = 1, gpus: float = 0, address: str | None = None) -> None:
        if actors < 1 or cpus <= 0 or gpus < 0:
            raise ConfigError(
                f"encode.actors={actors} encode.cpus={cpus} encode.gpus={gpus}: at least one actor, more than 0 CPU "
                "cores for each, and no fewer than 0 GPUs"
            )
        self.actors, self.cpus, self.gpus, self.address = actors, cpus, gpus, address

    def run(
        self,
        writer: StoreWriter,
        indices: Sequence[int],
        tokenizer: Path,
        advance: Callable[[int], Any],
    ) -> Iterator[Outcome]:
        ray = _import_ray()
        ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False if self.address is None else None)
        if not indices:
            return
        rows = ray.data.from_items([{"index": index} for index in indices], override_num_blocks=len(indices))
        device = "cuda" if self.gpus else "cpu"
        written = rows.map_batches(
            Encoder,
            fn_constructor_args=(writer.work, str(tokenizer.resolve()), device, max(1, int(self.cpus))),
            batch_size=1,
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(self.actors, len(indices))),
        )
        for row in written.iter_rows():
            advance(row["candidates"])
            yield Outcome(row["state"], row["why"])


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f'encode=ray needs the package {error.name!r}: pip install "vqlm[scale]"'
        ) from error
    return ray


class Encoder:
    """What a Ray actor holds: a tokenizer, loaded once, and a job. Batches of one shard's number come in."""

    def __init__(self, work: Work, tokenizer: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.work, self.tokenizer = work, _load(Path(tokenizer), device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts: list[int] = []
        done = [
            self.work.write(int(index), self.tokenizer, advance=counts.append) for index in batch["index"]
        ]
        candidates = [sum(counts), *[0] * (len(done) - 1)]
        return {
            "state": [each.state for each in done],
            "why": [each.why for each in done],
            "candidates": candidates,
        }


def _load(folder: Path, device: str) -> Any:
    from vq.tokenizer import ImageTokenizer

    return ImageTokenizer.from_pretrained(folder).to(device)


def device_of(tokenizer: Any) -> str:
    """Where a tokenizer's weights are: "cpu", "cuda:1" …"""
    return str(next(tokenizer.parameters()).device)


def _one_of(device: str, n: int) -> str:
    """The n-th process's device: GPUs are dealt out in turn."""
    return f"cuda:{n % torch.cuda.device_count()}" if device.startswith("cuda") else device


def share_of(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """This process's number, and how many encode one store together: as given, or as torchrun says.

    ConfigError if one is given without the other, or they do not fit.
    """
    if (rank is None) != (ranks is None):
        raise ConfigError(f"rank={rank} ranks={ranks}: give both, or neither")
    if rank is None or ranks is None:
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank={rank} ranks={ranks}: rank must be from 0 to {max(ranks, 1) - 1}")
    return rank, ranks
