"""A command that runs others: none of them is left alone."""

import os
import signal
import subprocess
import sys
import time

import pytest

STARTER = """
import sys
from vqlm import processes

processes.COMMANDS["sleeper"] = "sleeper"
processes.run("a long training", "sleeper", [sys.argv[1]])
"""
SLEEPER = """
import os, signal, sys, time

def save(*_):
    open(sys.argv[1] + ".saved", "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_command_leaves_no_training_behind(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    told = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(told)], env=environment)
    wait_for(lambda: told.exists() and told.read_text())
    pid = int(told.read_text())
    assert alive(pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not alive(pid))
    assert (tmp_path / "pid.saved").exists()  # it was told to stop, as by a signal
