"""How fast are codes found and averaged in training, and how much memory does it take? Ours, the library, the limit.

    python benchmarks/quantizer.py [--out [FILE]]

Prediction, to be held against the table that it prints: with a codebook of K = 8,192 `vq.quantizers.ResidualQuantizer`
is at least 5 times faster than vector-quantize-pytorch *with huge pages*, and takes at most 64 MB over import; its
codes are the library's. Exit code 1 if codes disagree; speed is printed and never fails.

It measures one training-mode forward pass of N = 16,384 vectors of 16 numbers, codebook update included, on the CPU.
Each contestant lives in a process of its own, because memory settings must stand before torch is imported. The
processes take turns, so that they share the weather of the machine; times are medians of rounds, ratios medians of
the ratios within a round. How to read the table: benchmarks/README.md.

Legend: N vectors, D width, K codebook size, Q depth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import record
from record import Table

if TYPE_CHECKING:  # torch is imported in the workers, after their environment is set
    from torch import Tensor

Job = tuple[Callable[[], Any], Callable[[], None]]  # what is timed (returns codes), what precedes each call

N, D = 16384, 16
PICTURES = 64  # the N vectors come as a batch of 16x16 latents
TIE = 1e-5  # relative difference of two distances that count as equal
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
PREDICTED_SPEED, PREDICTED_MB, PREDICTED_K = 5.0, 64, 8192


@dataclass(frozen=True)
class Case:
    K: int
    Q: int

    def __str__(self) -> str:
        return f"K={self.K} Q={self.Q}"


CASES = [Case(1024, 1), Case(8192, 1), Case(16384, 1), Case(1024, 4)]


@dataclass(frozen=True)
class Contestant:
    name: str
    kind: str  # a key of BUILDERS
    huge_pages: bool
    slow: bool = False  # takes part in the first rounds only


OURS, LIMIT = "ours", "limit: addmm"
CONTESTANTS = [
    Contestant(OURS, "ours", huge_pages=False),
    Contestant("library", "library", huge_pages=True),
    Contestant("library as called", "as_called", huge_pages=True),
    Contestant("library as called, 4K pages", "as_called", huge_pages=False, slow=True),
    Contestant(LIMIT, "limit", huge_pages=False),
]
PEERS = ("library", "library as called")


# --- in a worker ----------------------------------------------------------------------------------------------


def made_state(case: Case) -> dict[str, Tensor]:
    """Equal in every worker: z (PICTURES,D,h,w), whose positions are the N vectors, and codebooks (Q,K,D)."""
    import torch

    random = torch.Generator().manual_seed(case.K + case.Q)
    side = int((N // PICTURES) ** 0.5)
    z_BDhw = torch.randn(PICTURES, D, side, side, generator=random)
    # each depth's codebook is smaller, as residuals are
    scale = torch.tensor([0.7**q for q in range(case.Q)])[:, None, None]
    return {"z": z_BDhw, "books": torch.randn(case.Q, case.K, D, generator=random) * scale}


def fill_codebooks(residual_vq: Any, books_QKD: Tensor) -> None:
    """All buffers of the library's codebooks as if each code had been used once: every call starts from here."""
    for layer, book_KD in zip(residual_vq.layers, books_QKD, strict=True):
        book = layer._codebook
        book.embed[0].copy_(book_KD)
        book.embed_avg[0].copy_(book_KD)
        book.cluster_size.fill_(1)


def build_ours(case: Case, state: dict[str, Tensor]) -> Job:
    from vq.quantizers.residual import ResidualQuantizer

    return _build_adapter(ResidualQuantizer(D, case.K, case.Q), state)


def build_library(case: Case, state: dict[str, Tensor]) -> Job:
    """The library's forward pass, through the same adapter: no replacement of unused codes, as ours."""
    from vq.quantizers.residual import LibraryResidualQuantizer

    return _build_adapter(LibraryResidualQuantizer(D, case.K, case.Q), state)


def _build_adapter(quantizer: Any, state: dict[str, Tensor]) -> Job:
    z_BDhw = state["z"].requires_grad_()
    return lambda: quantizer(z_BDhw).codes_BhwQ, lambda: fill_codebooks(quantizer.vq, state["books"])


def build_as_called(case: Case, state: dict[str, Tensor]) -> Job:
    """The library with the argument that its users give it: unused codes are replaced."""
    from vector_quantize_pytorch import ResidualVQ

    vq = ResidualVQ(dim=D, num_quantizers=case.Q, codebook_size=case.K, threshold_ema_dead_code=2)
    z_BND = state["z"].flatten(2).transpose(1, 2).contiguous().requires_grad_()
    return lambda: vq(z_BND)[1], lambda: fill_codebooks(vq, state["books"])


def build_limit(case: Case, state: dict[str, Tensor]) -> Job:
    """Only the multiplications that distances need, in chunks in one buffer: no minimum, no update, no codes."""
    import torch

    from vq.quantizers.nearest import CHUNK_BYTES

    x_ND = state["z"].permute(0, 2, 3, 1).reshape(N, D).contiguous()
    books = [(book.square().sum(1), book.T.contiguous()) for book in state["books"]]
    rows = max(1, min(N, CHUNK_BYTES // (4 * case.K)))
    buffer = torch.empty(rows, case.K)

    def multiply() -> None:
        for bias_K, book_DK in books:
            for x in x_ND.split(rows):
                torch.addmm(bias_K, x, book_DK, alpha=-2, out=buffer[: len(x)])

    return multiply, lambda: None


BUILDERS = {"ours": build_ours, "library": build_library, "as_called": build_as_called, "limit": build_limit}


def memory_mb(field: str) -> float | None:
    """VmRSS or VmHWM (its highest value) of this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """VmHWM := VmRSS. False where the system does not let us: then memory is not measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def work(kind: str, threads: int, pipe: Connection) -> None:
    """A worker: a Case comes in, one measured call goes out; None ends it."""
    import torch

    torch.set_num_threads(threads)
    current = Case(64, 1)
    run, prepare = BUILDERS[kind](current, made_state(current))
    run()  # the code of the libraries is in memory from here on
    base = memory_mb("VmRSS")
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        if case != current:
            run, prepare = BUILDERS[kind](case, made_state(case))
            current = case
        prepare()
        peaks = reset_peak()
        start = time.perf_counter()
        codes = run()
        ms = 1000 * (time.perf_counter() - start)
        peak = memory_mb("VmHWM") if peaks else None
        rise = None if peak is None or base is None else peak - base
        pipe.send((ms, rise, None if codes is None else codes.reshape(N, case.Q).numpy()))
        del codes


# --- in the parent --------------------------------------------------------------------------------------------


@contextmanager
def workers(threads: int) -> Iterator[dict[str, Connection]]:
    """A live process for each contestant."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for each in CONTESTANTS:
        here, there = spawn.Pipe()
        os.environ.pop(HUGE_PAGES, None)
        if each.huge_pages:
            os.environ[HUGE_PAGES] = "1"  # a spawned process inherits it
        process = spawn.Process(target=work, args=(each.kind, threads, there), daemon=True)
        process.start()
        there.close()  # so that a worker that dies is an end of file, not a wait
        pipes[each.name] = here
        processes.append(process)
    try:
        for pipe in pipes.values():
            pipe.recv()
        yield pipes
        for pipe in pipes.values():
            pipe.send(None)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def measure(case: Case, pipes: dict[str, Connection], rounds: int, slow_rounds: int) -> dict[str, Any]:
    """Rounds in turn, the order reversed each time. Round 0 warms up: it gives codes and memory, no time."""
    times: dict[str, dict[int, float]] = {each.name: {} for each in CONTESTANTS}
    rises: dict[str, list[float]] = {each.name: [] for each in CONTESTANTS}
    codes: dict[str, Any] = {}
    for number in range(rounds + 1):
        order = CONTESTANTS if number % 2 else CONTESTANTS[::-1]
        for each in order:
            if each.slow and not 1 <= number <= slow_rounds:
                continue
            pipes[each.name].send(case)
            ms, rise, made = pipes[each.name].recv()
            if number:
                times[each.name][number] = ms
            if rise is not None:
                rises[each.name].append(rise)
            codes.setdefault(each.name, made)
    return {
        "case": asdict(case),
        "contestants": {name: summary(times[name], times[OURS], rises[name]) for name in times},
        "codes": {name: compare(case, codes[OURS], codes[name]) for name in PEERS},
    }


def summary(own: dict[int, float], ours: dict[int, float], rises: list[float]) -> dict[str, Any]:
    """rounds: times of each; ratio: how many times longer than ours, within a round."""
    ratios = [own[number] / ours[number] for number in own]
    return {
        "ms": median(own.values()),
        "ms_all": [own[number] for number in sorted(own)],
        "times_ours": median(ratios),
        "times_ours_range": [min(ratios), max(ratios)],
        "peak_mb": max(rises) if rises else None,
    }


def compare(case: Case, ours_NQ: Any, theirs_NQ: Any) -> dict[str, Any]:
    """Share of vectors with equal codes; the others must differ first where two codes are equally near.

    Behind a tie the residuals differ, and so may all deeper codes. Distances are taken in float64.
    """
    import torch

    state = made_state(case)
    books_QKD = state["books"].double()
    x_ND = state["z"].permute(0, 2, 3, 1).reshape(N, D).double()
    ours, theirs = torch.from_numpy(ours_NQ), torch.from_numpy(theirs_NQ)
    differ = (ours != theirs).any(1).nonzero()[:, 0].tolist()
    worst = 0.0
    for n in differ:
        depth = int((ours[n] != theirs[n]).nonzero()[0, 0])
        residual_D = x_ND[n] - sum(books_QKD[q, theirs[n, q]] for q in range(depth))
        mine, other = (float((residual_D - books_QKD[depth, c[n, depth]]).norm()) for c in (ours, theirs))
        worst = max(worst, abs(mine - other) / max(mine, other))
    return {"equal": 1 - len(differ) / N, "differ": len(differ), "worst_gap": worst, "agree": worst <= TIE}


def table(results: list[dict[str, Any]]) -> Table:
    rows = []
    for result in results:
        for name, row in result["contestants"].items():
            low, high = row["times_ours_range"]
            peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            times = [f"{row['ms']:.1f}", f"{row['times_ours']:.2f}", f"{low:.2f}-{high:.2f}", peak]
            rows.append([f"{Case(**result['case'])}, {name}", *times, agreement(result["codes"].get(name))])
    return Table("", ["case", "ms", "x ours", "range", "peak MB", "codes"], rows)


def agreement(codes: dict[str, Any] | None) -> str:
    if codes is None:
        return ""
    ties = f", {codes['differ']} ties" if codes["differ"] and codes["agree"] else ""
    return f"{codes['equal']:.4%} equal" + ties + ("" if codes["agree"] else ", DISAGREE")


def verdict(results: list[dict[str, Any]]) -> str:
    """The prediction beside what was measured, against the faster of the two ways to call the library."""
    found = next(each for each in results if each["case"]["K"] == PREDICTED_K)["contestants"]
    ratio, peak = min(found[name]["times_ours"] for name in PEERS), found[OURS]["peak_mb"]
    memory = "memory not measured on this system" if peak is None else f"in {peak:.0f} MB"
    holds = ratio >= PREDICTED_SPEED and (peak is None or peak <= PREDICTED_MB)
    return (
        f"K = {PREDICTED_K:,}: {ratio:.1f} times as fast as the library with huge pages "
        f"(predicted {PREDICTED_SPEED:g}), {memory} (at most {PREDICTED_MB}): "
        f"{'it holds' if holds else 'it does NOT hold in this run'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantizer in training: ours, the library, the limit.")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case (default 5)")
    parser.add_argument("--slow-rounds", type=int, default=2, help="of them with 4K pages (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if min(asked.rounds, asked.slow_rounds, asked.threads) < 1:
        parser.error("--rounds, --slow-rounds and --threads: at least 1")
    about = record.machine(asked.threads, "vector-quantize-pytorch")
    print(record.told(about), flush=True)
    results = []
    with workers(asked.threads) as pipes:
        for case in CASES:
            print(f"measuring {case} ...", file=sys.stderr, flush=True)
            results.append(measure(case, pipes, asked.rounds, min(asked.slow_rounds, asked.rounds)))
    made, found = table(results), verdict(results)
    print(f"\n{made}\n\n{found}", flush=True)
    record.keep(asked.out, __doc__, about, found, [made])
    return 0 if all(codes["agree"] for each in results for codes in each["codes"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
