"""How long does it take until a command says something: its help, a mistyped key, a value of the wrong type?

    python benchmarks/startup.py [--rounds 3] [--commands vq-train lm-serve] [--out [FILE]]

Prediction, to be held against the table that it prints: help, and each mistake, take every command less CPU time than
`import torch` alone, since what is heavy is imported when a configuration has been found right.

Each start is a process of its own, with one thread. Commands take turns, so that they share the weather of the
machine; figures are medians of rounds, in CPU seconds of the process, so that other programs on the machine count
little; one round before warms up the disk's cache. The exit code is 1 where a command does not end with 0 after
`--help` and with 2 after a mistake.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from statistics import median

import record
from record import ROOT, Table

HELP, KEY, TYPE = "--help", "a mistyped key", "a wrong type"
# What each command is told besides: what it cannot do without, and one value of a type that it does not take.
WRONG = {
    "vq-train": "batch_size=many",
    "vq-encode": "tokenizer=nowhere batch_size=many",
    "vq-evaluate": "tokenizer=nowhere batch_size=many",
    "vq-import": "source=taming path=nowhere image_size=many",
    "vq-ladder": "pictures=many",
    "lm-train": "store=nowhere row_ends=many",
    "lm-generate": "model=nowhere prompt=x n=many",
    "lm-evaluate": "model=nowhere store=nowhere train_captions=many",
    "lm-serve": "model=nowhere port=many",
    "vqlm-demo": "size=7",
    "vqlm-claim": "seeds=many",
}
YARDSTICKS = {"python -c pass": "pass", "import torch": "import torch"}


def commands() -> dict[str, str]:
    """Name → module of each command of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: target.partition(":")[0] for name, target in project["scripts"].items()}


def starts(name: str, module: str) -> dict[str, tuple[list[str], int]]:
    """What is tried with a command → its words, and the exit code that they must have."""
    found = {HELP: (["-m", module, "--help"], 0), KEY: (["-m", module, "outt=x"], 2)}
    if name in WRONG:
        found[TYPE] = (["-m", module, *WRONG[name].split()], 2)
    return found


def start(words: list[str]) -> tuple[float, int]:
    """CPU seconds, exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, cwd=ROOT, stdout=quiet, stderr=quiet
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode


def measure(
    tried: dict[tuple[str, str], tuple[list[str], int]], rounds: int
) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Median CPU seconds of each start, and what ended with another exit code than it must."""
    seconds: dict[tuple[str, str], list[float]] = {each: [] for each in tried}
    wrong = []
    for turn in range(rounds + 1):
        for each, (words, expected) in list(tried.items())[:: 1 if turn % 2 else -1]:
            taken, code = start(words)
            if turn:
                seconds[each].append(taken)
            elif code != expected:
                wrong.append(f"{' '.join(words)}: exit code {code} instead of {expected}")
    return {each: median(taken) for each, taken in seconds.items()}, wrong


def tables(seconds: dict[tuple[str, str], float]) -> list[Table]:
    names = [name for name in dict.fromkeys(name for name, _ in seconds) if name not in YARDSTICKS]
    ways = (HELP, KEY, TYPE)
    rows = [
        [name, *(f"{seconds[name, way]:.2f}" if (name, way) in seconds else "–" for way in ways)]
        for name in names
    ]
    yardsticks = [[name, f"{seconds[name, '']:.2f}"] for name in YARDSTICKS]
    return [
        Table("CPU seconds", ["command", *ways], rows),
        Table("beside", ["process", "CPU seconds"], yardsticks),
    ]


def verdict(seconds: dict[tuple[str, str], float]) -> str:
    limit, said = seconds["import torch", ""], []
    for way in (HELP, KEY, TYPE):
        taken = [each for (_, tried), each in seconds.items() if tried == way]
        late = sum(each >= limit for each in taken)
        said.append(
            f"{way} {min(taken):.2f} to {max(taken):.2f} s ({f'NOT for {late} of {len(taken)}' if late else 'holds'})"
        )
    return f"predicted below the {limit:.2f} s of `import torch`: {'; '.join(said)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Start-up time of each command.")
    parser.add_argument("--rounds", type=int, default=3, help="timed starts of each (default 3)")
    known = commands()
    parser.add_argument(
        "--commands", nargs="+", choices=known, default=list(known), help="default: all of them"
    )
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds: at least 1")
    about = record.machine(1, "hydra-core", "lightning", "transformers")
    print(record.told(about), flush=True)
    tried = {(name, ""): (["-c", code], 0) for name, code in YARDSTICKS.items()}
    tried |= {(name, way): each for name in asked.commands for way, each in starts(name, known[name]).items()}
    seconds, wrong = measure(tried, asked.rounds)
    made, found = tables(seconds), verdict(seconds)
    print("", *made, found, *wrong, sep="\n\n", flush=True)
    record.keep(asked.out, __doc__, about, found, made)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
