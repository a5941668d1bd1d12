"""Several processes of one run (torch.distributed): sums and rows of all ranks, and how the processes come to be.

Alone, everything passes unchanged.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import TCPStore

from vqlm.errors import ConfigError


def rank_count() -> int:
    """Processes of this run; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the first one and for one that is alone."""
    return dist.get_rank() if rank_count() > 1 else 0


def processes_here(count: int) -> int:
    """How many of a run's `count` processes share this machine: what torchrun says, else all."""
    return min(count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


def first_rank_says(value: float, device: torch.device) -> float:
    """The first rank's number, on each rank."""
    if rank_count() == 1:
        return value
    told = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)


def first_rank_has(x: Tensor, device: torch.device) -> Tensor:
    """The first rank's tensor, on each rank and on the device that ranks send from; `x` itself is left alone."""
    if rank_count() == 1:
        return x
    told = x.detach().to(device, copy=True)
    dist.broadcast(told, 0)
    return told


def first_rank_names(name: str) -> str:
    """The first rank's text, on each rank."""
    if rank_count() == 1:
        return name
    told = [name]
    dist.broadcast_object_list(told, 0)
    return told[0]


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, on each rank."""
    if rank_count() == 1:
        return value
    largest = torch.tensor([value], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's tensor (any shape, equal on all ranks), on each rank; `x` itself is left alone."""
    if rank_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's tensor, for a term of a loss that all ranks compute from it.

    The gradient is that of the rank's own `x`, as if it were the mean: once gradients are averaged over ranks, as in
    data-parallel training, that is the gradient of the term over everything that the ranks hold together.
    """
    if rank_count() == 1:
        return x
    return x + (sum_over_ranks(x.detach()) / rank_count() - x.detach())


def rows_of_ranks(x_ND: Tensor) -> Tensor:
    """Every rank's rows below each other, in the order of ranks; ranks may bring unequal numbers of rows."""
    if rank_count() == 1:
        return x_ND
    count = torch.tensor([len(x_ND)], device=x_ND.device)
    counts = [torch.zeros_like(count) for _ in range(rank_count())]
    dist.all_gather(counts, count)
    longest = max(int(n) for n in counts)
    padded = torch.cat([x_ND, x_ND.new_zeros(longest - len(x_ND), *x_ND.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(rank_count())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


# --- the processes themselves ---------------------------------------------------------------------------------------

OWN = "VQLM_STARTED_RANKS"  # set for processes that `start` has started, not torchrun
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", OWN)
HOST = "127.0.0.1"

_others: list[subprocess.Popen] = []  # that this process has started


def start(count: int, device: torch.device) -> None:
    """Make this process one of `count` that train together; a command calls it before it reads data.

    Under torchrun the others are there already. Otherwise this process becomes rank 0 and starts the others as it was
    started itself, with the same arguments; they learn from the environment who they are, as under torchrun. Ranks
    other than 0 print nothing, and draw other random numbers. `leave` ends it.

    Raises:
        ConfigError: torchrun started another number of processes, or a sweep (-m) was asked for.
        RuntimeError: one of the others ended before it joined.
    """
    there = os.environ.get("WORLD_SIZE")
    if there is not None and int(there) != count:
        raise ConfigError(f"devices={count}, but {there} processes were started together: make them equal")
    if count == 1:
        return
    if there is None and _sweeps():
        raise ConfigError(f"devices={count}: not in a sweep (-m), start one run for each value instead")
    number = int(os.environ.get("RANK", "0"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if there is not None and OWN not in os.environ:
        dist.init_process_group(backend)  # torchrun's own meeting point
    else:
        store = _meet(number, count) if number else _start_others(count)
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if number:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        torch.manual_seed(torch.initial_seed() + number)


def leave() -> None:
    """The ranks part: the first one goes on alone, the others exit with 0. Alone: nothing happens."""
    if rank_count() == 1:
        return
    number = rank()
    dist.barrier()
    dist.destroy_process_group()
    if number:
        raise SystemExit(0)
    _end_others()
    for name in PLACE:
        os.environ.pop(name, None)


def _sweeps() -> bool:
    """Whether the program's arguments ask for a sweep; `python -m NAME` is no sweep."""
    arguments = sys.orig_argv[3:] if sys.orig_argv[1:2] == ["-m"] else sys.orig_argv[2:]
    return bool({"-m", "--multirun"} & set(arguments))


def _start_others(count: int) -> TCPStore:
    """Start ranks 1 … and wait until each has come to the meeting point that is returned."""
    store = TCPStore(HOST, 0, count, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // count)  # or they would fight for the cores
    torch.set_num_threads(threads)
    place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), OWN: "1"}
    place |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port)}
    atexit.register(_end_others)
    place = {**os.environ, **place}
    place.pop("HYDRA_FULL_ERROR", None)  # set while a command runs; in the others it would ask for tracebacks
    for number in range(1, count):
        own = {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, *sys.orig_argv[1:]]
        _others.append(subprocess.Popen(command, env={**place, **own}))
    os.environ |= {name: place[name] for name in PLACE if name in place} | {"RANK": "0", "LOCAL_RANK": "0"}
    while store.add("here", 0) < count - 1:
        for number, process in enumerate(_others, 1):
            if process.poll() is not None:
                raise RuntimeError(
                    f"process {number} of {count} ended with {process.returncode} at its start"
                )
        time.sleep(0.05)
    return store


def _meet(number: int, count: int) -> TCPStore:
    store = TCPStore(HOST, int(os.environ["MASTER_PORT"]), count, is_master=False)
    store.add("here", 1)
    return store


def _end_others() -> None:
    """They end by themselves, soon after this process has left them; what has not after some seconds is ended."""
    limit = time.monotonic() + 10
    while _others:
        process = _others.pop()
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
