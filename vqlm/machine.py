"""What a number must say of the machine that it was measured on. Does not import torch, or know what was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(threads: int, *packages: str, device: str = "cpu") -> dict[str, Any]:
    """What a table must say of its machine; the load is that before the run. packages: whose versions matter."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", *packages)},
    }


def processor() -> str:
    """The CPU's model, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or "unknown")
