"""What this machine computes with: device, precision, memory layout. Measured, not assumed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from vqlm.errors import ConfigError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal[
    "auto", "bf16", "fp32", "fp16"
]  # fp16 is known, so that it can be refused with the reason


@dataclass(frozen=True)
class Hardware:
    """Where and how a model runs."""

    device: torch.device
    precision: Literal["bf16", "fp32"]

    @property
    def lightning(self) -> dict[str, object]:
        """Arguments for `lightning.Trainer`."""
        precision = "bf16-mixed" if self.precision == "bf16" else "32-true"
        return {"accelerator": self.device.type, "devices": 1, "precision": precision}

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        return f"{self.device.type} ({name}), {self.precision}"


def detect(device: Device = "auto", precision: Precision = "auto") -> Hardware:
    """The fastest device there is, and bf16 where it is faster.

    Raises:
        ConfigError: the device that was asked for is not there, or the precision is fp16.
    """
    if precision == "fp16":
        raise ConfigError(
            "precision=fp16: not supported. Small gradients vanish in it unless losses are scaled, which this loop "
            "does not do; with a discriminator, its logits overflow, and the adaptive weight would compare "
            "scaled with unscaled gradients. precision=bf16 is as fast and has the range of fp32"
        )
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])  # type: ignore[assignment]
    if not available[device]:
        raise ConfigError(
            f"device={device} is not available here; available: {[n for n, ok in available.items() if ok]}"
        )
    if precision == "auto":
        precision = "bf16" if _bf16_pays(device) else "fp32"
    return Hardware(torch.device(device), precision)


def _bf16_pays(device: str) -> bool:
    """On a GPU: it has bf16. On a CPU: a matrix product in bf16 is at least 1.3 times faster (it may be far slower)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if device == "mps":
        return False
    return _matmul_seconds(torch.float32) > 1.3 * _matmul_seconds(torch.bfloat16)


def _matmul_seconds(dtype: torch.dtype) -> float:
    a = torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
