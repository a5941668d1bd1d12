"""A process that saves, to be killed, or to be given a full disk: one JSON order a line on stdin, one answer a line.

{"order": "kill", "by": "ours" | "torch.save" | "Lightning", "folder", "tmp": TMPDIR, "first", "delay": seconds}
→ saves state first - 1 (if there is such a one); a child saves first, first + 1, … and is killed by SIGKILL after
`delay`. {"done": the last state whose save returned, "seconds": of one save}
{"order": "full", "by", "folder", "tmp", "way": "quota" | "full" | "read-only"}
→ saves state 1; the disk has no room for state 2, which is twice as large (an optimizer's averages have come).
{"error": what the save said, "found": the state that is then loaded}
{"order": "mounts"} → {"mounts": whether this process can mount: it can where it is started by unshare -rm}

A process of its own with one thread, so that it may fork without torch's threads. State n is a set of tensors that all
hold the number n; what is read back is judged by that. Knows no pytest.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vqlm.training import Budget, Checkpoints, Learner

TENSORS, NUMBERS = 16, 1 << 16  # 4 MB of fp32 in all
ROOM = 6 << 20  # bytes of a small disk: for one state, not for one of twice the size


class State(Learner):
    """A learner whose weights all hold the number n, the batches that it has seen."""

    def __init__(self, n=0, numbers=NUMBERS):
        weights = torch.nn.ParameterList([torch.full((numbers,), float(n)) for _ in range(TENSORS)])
        super().__init__(weights, lambda parameters: torch.optim.SGD(parameters, 0.1), Budget(batches=10**6))
        self.batches_seen = n

    def load_training_state(self, tensors, data):
        super().load_training_state(tensors, data)
        found = {float(value) for weight in self.model for value in weight.detach().aminmax()}
        assert found == {float(self.batches_seen)}, found


def save(by, folder, n, numbers=NUMBERS):
    """Save state n as each of them is commonly used."""
    state = State(n, numbers)
    if by == "ours":
        Checkpoints(folder).save(state)
        return
    last, tensors = Path(folder, "last.ckpt"), state.training_state()[0]
    if by == "torch.save":
        torch.save(tensors, last)
    else:
        TorchCheckpointIO().save_checkpoint(tensors, last)


def load(by, folder, numbers=NUMBERS):
    """The number of the state that is found; None: there is none; "lost": something is there that cannot be read."""
    if by == "ours":
        state = State(0, numbers)
        try:
            return state.batches_seen if Checkpoints(folder).resume(state) else None
        except Exception:
            return "lost"
    last = Path(folder, "last.ckpt")
    if not last.exists():
        return None
    try:
        tensors = torch.load(last, weights_only=True)
        state = State()
        state.load_training_state(tensors, {"counters": {"batches_seen": int(tensors["model/0"][0])}})
        return state.batches_seen
    except Exception:
        return "lost"


def child(order, progress):
    """Saves until it is killed; tells the number of each save that has returned."""
    tempfile.tempdir = order["tmp"]
    for n in range(order["first"], order["first"] + 1000):
        save(order["by"], order["folder"], n)
        os.write(progress, f"{n}\n".encode())


def killed(order):
    save_seconds = timed(order) if order["first"] else 0.0
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(order, write)
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(order["delay"])
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(read) as told:
        done = [int(line) for line in told]
    return {"done": done[-1] if done else order["first"] - 1, "seconds": save_seconds}


def timed(order):
    """Save the state before the first one, whole; seconds."""
    tempfile.tempdir = order["tmp"]
    began = time.perf_counter()
    save(order["by"], order["folder"], order["first"] - 1)
    return time.perf_counter() - began


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def full(order):
    """In a child, whose limits and mounts end with it or are undone."""
    folder, way = order["folder"], order["way"]
    if way != "quota":
        assert mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder)
    try:
        answer = in_child(lambda: no_room(order))
    finally:
        if way != "quota":
            subprocess.run(["umount", folder], check=True)
    return answer


def no_room(order):
    tempfile.tempdir = order["tmp"]
    save(order["by"], order["folder"], 1)
    if order["way"] == "quota":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    elif order["way"] == "read-only":
        assert mount("-o", "remount,ro", order["folder"])
    error = ""
    try:
        save(order["by"], order["folder"], 2, 2 * NUMBERS)
    except Exception as said:
        error = f"{type(said).__name__}: {said}"
    if order["way"] == "read-only":
        assert mount("-o", "remount,rw", order["folder"])
    return {"error": error, "found": load(order["by"], order["folder"])}


def in_child(work):
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:
            os.write(write, json.dumps({"fault": repr(error)}).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        answer = json.loads(told.read())
    os.waitpid(process, 0)
    return answer


def can_mount(_):
    with tempfile.TemporaryDirectory() as folder:
        if not mount("-t", "tmpfs", "tmpfs", folder):
            return {"mounts": False}
        subprocess.run(["umount", folder], check=True)
    return {"mounts": True}


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"kill": killed, "full": full, "mounts": can_mount}[order["order"]](order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
