"""Which device does the work, and what it cannot do.

A person says `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes the fastest that is there. Everything else follows the
pipeline: tensors are made where its weights are. Two things are the same everywhere. Randomness is drawn on the CPU, so that a
seed means the same noise on every device. And sums that need float64 get it: where a device has none (MPS), on the CPU.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vq4dit.errors import VQ4DiTError

WITHOUT_FLOAT64 = {"mps"}
DEVICE = re.compile(r"auto|cpu|mps|cuda(:(0|[1-9]\d{0,2}))?", re.ASCII)


def resolve(wanted: str = "auto") -> torch.device:
    """The device of a name: `auto` is CUDA if there is one, else MPS, else the CPU.

    Raises:
        ValueError: if it is no name of a device.
        VQ4DiTError: if this machine, or this build of torch, does not have it.
    """
    if not DEVICE.fullmatch(wanted):
        raise ValueError(f"a device is auto, cpu, cuda, cuda:0 (a number for each GPU) or mps, got {wanted!r:.60}")
    there = {str(device): device for device in available()}  # by name: torch takes cuda:256 for cuda:0
    if wanted == "auto":
        return next(iter(there.values()))
    device = there.get("cuda:0" if wanted == "cuda" else wanted)
    if device is None:
        choice = " or ".join(there)
        raise VQ4DiTError(f"there is no device {wanted} here{_why_not(wanted)}: choose {choice}, or leave --device out")
    return device


def available() -> list[torch.device]:
    """What this machine has, the fastest first; the CPU is always there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    metal = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [*(torch.device("cuda", number) for number in range(count)), *metal, torch.device("cpu")]


def describe(device: torch.device) -> str:
    """For people: "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _why_not(wanted: str) -> str:
    if wanted == "mps":
        return "" if torch.backends.mps.is_built() else " (this build of torch has no MPS)"
    if torch.cuda.is_available():
        return ""  # there are others
    return " (torch finds no GPU, or no driver for it)" if torch.version.cuda else " (this build of torch has no CUDA)"


def exact_device(device: torch.device) -> torch.device:
    """Where float64 of a device's values can be: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(values: Tensor) -> Tensor:
    """The values in float64, on `exact_device`."""
    return values.to(exact_device(values.device)).double()
