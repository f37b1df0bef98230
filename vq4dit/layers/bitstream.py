"""Small integers <-> bytes: how assignments lie in a file.

Values of b bits follow each other without gaps in a little-endian bit stream: value i occupies the stream's bits
i*b ... i*b + b - 1, and bit j of the stream is bit j % 8 of byte j // 8. Eight values fill exactly b bytes, so both
directions work on groups of eight, with shifts only. For b = 8 the stream is the values themselves.

      b = 6    byte 0          byte 1          byte 2
      value    0 0 0 0 0 0 1 1 1 1 1 1 2 2 2 2 2 2 3 3 3 3 3 3      (lowest bit first)
"""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

GROUP = 8  # values; any b of them make b whole bytes


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Integer[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Write values of `bits` bits each (1 to 16) as a little-endian bit stream of ceil(n * bits / 8) bytes.

    Raises:
        ValueError: if `bits` is out of range or a value does not fit.
    """
    _check_bits(bits)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise ValueError(f"values must lie in [0, {2**bits}) to fit {bits} bits, got {values.min()} ... {values.max()}")
    groups = -(-len(values) // GROUP)
    padded = torch.zeros(groups * GROUP, dtype=torch.int32, device=values.device)
    padded[: len(values)] = values
    columns = padded.view(groups, GROUP).unbind(1)
    packed = torch.zeros(groups, bits, dtype=torch.int32, device=values.device)
    for byte in range(bits):
        for i, value in enumerate(columns):
            if -bits < (offset := bits * i - 8 * byte) < 8:
                packed[:, byte] |= value << offset if offset >= 0 else value >> -offset
    return (packed & 0xFF).to(torch.uint8).flatten()[: packed_size(len(values), bits)]


def unpack_bits(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Integer[Tensor, " n"]:
    """Undo `pack_bits`: int32 values, or the uint8 bytes themselves when `bits` is 8.

    Raises:
        ValueError: if `packed` does not hold exactly `count` values.
    """
    _check_bits(bits)
    if len(packed) != packed_size(count, bits):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, got {len(packed)}")
    if bits == 8:
        return packed
    groups = -(-count // GROUP)
    padded = torch.zeros(groups * bits, dtype=torch.int32, device=packed.device)
    padded[: len(packed)] = packed
    columns = padded.view(groups, bits).unbind(1)
    values = torch.zeros(groups, GROUP, dtype=torch.int32, device=packed.device)
    for i in range(GROUP):
        for byte, column in enumerate(columns):
            if -8 < (offset := 8 * byte - bits * i) < bits:
                values[:, i] |= column << offset if offset >= 0 else column >> -offset
    return (values & (2**bits - 1)).flatten()[:count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
