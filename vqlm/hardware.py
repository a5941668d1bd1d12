"""What this machine computes with: device, precision, memory layout. Measured, not assumed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import torch

from vqlm.errors import ConfigError
from vqlm.ranks import processes_here

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal[
    "auto", "bf16", "fp32", "fp16"
]  # fp16 is known, so that it can be refused with the reason
Strategy = Literal["auto", "ddp", "fsdp"]

# Dense bf16 operations per second from the makers' data sheets, without sparsity; by what torch calls the device.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Hardware:
    """Where and how a model runs. devices: processes that train together, each with a device (or threads) of its own.

    strategy: how they share the work. "ddp": each holds the whole model, and gradients are averaged. "fsdp": each holds
    a part of every parameter (`vqlm.shards`).
    """

    device: torch.device
    precision: Literal["bf16", "fp32"]
    devices: int = 1
    strategy: Literal["single", "ddp", "fsdp"] = "single"

    @property
    def lightning(self) -> dict[str, object]:
        """Arguments for `lightning.Trainer`."""
        precision = "bf16-mixed" if self.precision == "bf16" else "32-true"
        found: dict[str, object] = {"accelerator": self.device.type, "devices": 1, "precision": precision}
        if self.devices == 1:
            return found
        if self.strategy == "fsdp":  # the model itself gathers and sends; Lightning sees one process alone
            from lightning.pytorch.strategies import SingleDeviceStrategy

            devices = [self.device.index] if self.device.type == "cuda" else 1
            return {**found, "devices": devices, "strategy": SingleDeviceStrategy(self.device)}
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

        # a batch without pictures, or one of them, leaves parameters without a gradient
        strategy = "ddp_find_unused_parameters_true"
        plugins = [TorchElasticEnvironment()]  # who is who stands in the environment (`vqlm.ranks.start`)
        here = processes_here(self.devices)
        shape = {"devices": here, "num_nodes": self.devices // here}
        return {**found, **shape, "strategy": strategy, "plugins": plugins}

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        many = f", {self.devices} processes ({self.strategy})" if self.devices > 1 else ""
        return f"{self.device.type} ({name}), {self.precision}{many}"


def detect(
    device: Device = "auto", precision: Precision = "auto", devices: int = 1, strategy: Strategy = "auto"
) -> Hardware:
    """The fastest device there is, and bf16 where it is faster; of several processes, this one's device.

    Raises:
        ConfigError: the device that was asked for is not there or there are fewer, the precision is fp16, or the
            strategy does not fit.
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
    sharing = _sharing(device, devices, strategy)
    if device == "cuda" and devices > 1:
        return Hardware(
            torch.device(device, int(os.environ.get("LOCAL_RANK", 0))), precision, devices, sharing
        )
    return Hardware(torch.device(device), precision, devices, sharing)


def _sharing(device: str, devices: int, strategy: Strategy) -> Literal["single", "ddp", "fsdp"]:
    """How `devices` processes share the work."""
    if devices < 1:
        raise ConfigError(f"devices={devices}: at least 1")
    if devices == 1:
        if strategy != "auto":
            raise ConfigError(f"strategy={strategy} with devices=1: it needs several; give devices=2 or more")
        return "single"
    if device == "mps":
        raise ConfigError(f"devices={devices}: device=mps is a single one; use devices=1, or device=cpu")
    if device == "cuda" and torch.cuda.device_count() < processes_here(devices):
        raise ConfigError(f"devices={devices}: there are {torch.cuda.device_count()} CUDA devices here")
    if strategy == "fsdp":
        from vqlm.shards import check_shards

        check_shards()
        return "fsdp"
    return "ddp"


def peak_flops(hardware: Hardware) -> float:
    """Floating-point operations per second of one process's device: from BF16_PEAKS, or measured.

    What is measured, a matrix product, is no ceiling but what the library reaches; larger ones may be faster.
    """
    name = torch.cuda.get_device_name(hardware.device) if hardware.device.type == "cuda" else ""
    known = [peak for part, peak in BF16_PEAKS.items() if part in name]
    if known and hardware.precision == "bf16":
        return known[0]
    size = 8192 if hardware.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    return 2 * size**3 / _matmul_seconds(dtype, size, hardware.device)


def _bf16_pays(device: str) -> bool:
    """On a GPU: it has bf16. On a CPU: a matrix product in bf16 is at least 1.3 times faster (it may be far slower)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if device == "mps":
        return False
    return _matmul_seconds(torch.float32) > 1.3 * _matmul_seconds(torch.bfloat16)


def _matmul_seconds(
    dtype: torch.dtype,
    size: int = 512,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
