"""What packed tensors say after somebody cast them.

A model that is prepared for training has all its vectors cast to fp32, one that shall be small has its parameters cast to
something else, and neither asks what a parameter holds. Bytes are still bytes in any type that has room for 256 of them, and
fp16 values in any that has fp16's precision. In other types numbers are lost, and that is said instead of computed with.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vq4dit.errors import FormatError

LARGEST_EPS_OF_BYTES = 2**-7  # bf16 still holds every integer from 0 to 256
LARGEST_EPS_OF_SCALES = 2**-10  # fp16's own


def as_bytes(values: Tensor, name: str) -> UInt8[Tensor, "..."]:
    """Packed bytes as bytes again.

    Raises:
        FormatError: if they are of a type that does not hold every byte, or are no bytes any more.
    """
    if values.dtype == torch.uint8:
        return values
    if torch.finfo(values.dtype).eps <= LARGEST_EPS_OF_BYTES if values.is_floating_point() else values.dtype.itemsize > 1:
        found = values.clamp(0, 255).to(torch.uint8)
        if values.device.type == "meta" or torch.equal(found.to(values.dtype), values):
            return found
    raise FormatError(
        f"{name} must hold bytes, and was cast to {values.dtype} or changed, which loses some of them: load the model again, "
        "and leave packed tensors (those of type uint8) as they are"
    )


def as_scales(values: Tensor, name: str) -> Float[Tensor, "..."]:
    """A codebook or scales in fp32.

    Raises:
        FormatError: if they are of a type that does not hold fp16 values.
    """
    if values.is_floating_point() and torch.finfo(values.dtype).eps <= LARGEST_EPS_OF_SCALES:
        return values.float()
    raise FormatError(
        f"{name} must hold fp16 values, and was cast to {values.dtype}, which rounds them: load the model again, and choose "
        "its type with `dtype` of from_pretrained"
    )


def check_finite(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Raise `FormatError` if a tensor of a file holds NaN or infinity, or would once it is of the type it is loaded in."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest = float(tensor.float().abs().max())  # NaN if there is one
    if not math.isfinite(largest):
        raise FormatError(
            f"{name} holds values that are not finite (NaN or infinity): the file is damaged, download or quantize it again"
        )
    if dtype is not None and dtype.is_floating_point and largest > torch.finfo(dtype).max:
        raise FormatError(
            f"{name} holds {largest:.6g}, more than {dtype} can: load the model with dtype=torch.bfloat16 or torch.float32"
        )
