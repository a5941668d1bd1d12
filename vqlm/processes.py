"""Our own commands, run one after another, each in a process of its own. What they do is not known here."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from vqlm.errors import Interrupted

# What a user types → the module behind it.
COMMANDS = {
    "vq-train": "vq.train",
    "vq-encode": "vq.encode",
    "vq-evaluate": "vq.evaluate",
    "vq-ladder": "vq.ladder",
    "lm-train": "lm.train",
    "lm-generate": "lm.generate",
    "lm-evaluate": "lm.evaluate",
}


def run(title: str, command: str, words: Sequence[str]) -> None:
    """Print and run one command; SystemExit with its exit code if it fails, after it was told to stop if we were."""
    shown = " ".join([command, *words])
    print(f"\n=== {title}\n    {shown}", flush=True)
    # huge pages for large buffers: about 1.1 times faster training on a CPU, and nothing elsewhere
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", COMMANDS[command], *words], env=environment, preexec_fn=_told_of_our_end()
    )
    try:
        code = process.wait()
    except Interrupted:
        process.terminate()
        process.wait()  # it saves its state
        raise
    except KeyboardInterrupt:  # the terminal has sent it to both
        process.wait()
        raise
    if code:
        print(
            f"\n{shown}\nended with exit code {code}. Run the same command again to go on from here.",
            file=sys.stderr,
        )
        raise SystemExit(code if code > 0 else 128 - code)


def _told_of_our_end() -> Callable[[], object] | None:
    """What the new process does first: ask to be stopped, as a signal would stop it, when this one is killed and can
    tell it nothing. Linux alone knows that."""
    if sys.platform != "linux":
        return None
    prctl, PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1  # looked up here: little is safe after a fork
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # killed before we could ask
            os._exit(1)

    return ask
