"""Scalar quantization of one weight matrix, for comparison: round to nearest, and GPTQ. None of them has a packed format here.

Each takes a weight (rows, columns), bits and what gives E[x xᵀ] of its inputs, and returns the rounded weight and its bits per
weight: b bits for each, and an fp16 scale and offset for each row or group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vq4dit.config import EntropyCodingConfig
from vq4dit.recipes.gptq import damp


def round_to_grid(weight: Tensor, bits: int) -> Tensor:
    """Nearest of 2^bits equally spaced values between the smallest and the largest of each row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / (2**bits - 1)
    return ((weight - low) / step).round() * step + low


def rtn_per_row(weight: Tensor, bits: int, moments: Callable[[], Tensor]) -> tuple[Tensor, float]:
    return round_to_grid(weight, bits), bits + 32 / weight.shape[1]


def rtn_per_group(weight: Tensor, bits: int, moments: Callable[[], Tensor]) -> tuple[Tensor, float]:
    return round_to_grid(weight.reshape(-1, 64), bits).view_as(weight), bits + 32 / 64


def gptq(weight: Tensor, bits: int, moments: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """GPTQ (arXiv:2210.17323) with one grid per row: column after column, errors corrected in the columns to come."""
    damped = damp(moments(), EntropyCodingConfig().damping).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    low, high = weight.amin(1), weight.amax(1)
    step = (high - low).clamp(min=1e-12) / (2**bits - 1)
    remaining, rounded = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = ((remaining[:, j] - low) / step).round().clamp(0, 2**bits - 1) * step + low
        error = (remaining[:, j] - rounded[:, j]) / factor[j, j]
        remaining[:, j:] -= error.unsqueeze(1) * factor[j, j:]
    return rounded, bits + 32 / weight.shape[1]


SCALAR = {"round to nearest, per row": rtn_per_row, "round to nearest, groups of 64": rtn_per_group, "GPTQ, per row": gptq}
