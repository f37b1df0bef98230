"""Assignments as bytes: invertible, gapless, little-endian, the same for ever."""

import numpy as np
import pytest
import torch

from vq4dit.layers.bitstream import pack_bits, packed_size, unpack_bits

ALL_BITS = pytest.mark.parametrize("bits", range(1, 17), ids="{}bit".format)


def random_values(bits: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2**bits, (count,), generator=generator)


def numpy_bit_stream(values: torch.Tensor, bits: int) -> list[int]:
    """The layout of packing.py's docstring, written down a second time."""
    stream = values.numpy()[:, None] >> np.arange(bits) & 1
    return np.packbits(stream.astype(np.uint8).ravel(), bitorder="little").tolist()


@ALL_BITS
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_unpack_undoes_pack(bits, count, generator):
    values = random_values(bits, count, generator)
    assert unpack_bits(pack_bits(values, bits), bits, count).tolist() == values.tolist()


@ALL_BITS
@pytest.mark.parametrize("count", [1, 8, 13])
def test_bytes_are_a_little_endian_bit_stream(bits, count, generator):
    values = random_values(bits, count, generator)
    assert pack_bits(values, bits).tolist() == numpy_bit_stream(values, bits)


@pytest.mark.parametrize(
    "bits, values, packed",
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b1000_0001, 0b1]),
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (6, [1, 2, 3, 63], [0b10_000001, 0b0011_0000, 0b111111_00]),
        (8, [0, 128, 255], [0, 128, 255]),
        (12, [0xABC, 0x123], [0xBC, 0x3A, 0x12]),
        (16, [0x1234], [0x34, 0x12]),
    ],
    ids=lambda value: f"{value}bit" if isinstance(value, int) else "",
)
def test_packed_bytes_never_change(bits, values, packed):  # files that exist depend on this layout
    assert pack_bits(torch.tensor(values), bits).tolist() == packed


@ALL_BITS
def test_the_largest_value_fits(bits):
    values = torch.full((9,), 2**bits - 1)
    assert unpack_bits(pack_bits(values, bits), bits, 9).tolist() == values.tolist()


@ALL_BITS
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_packed_size_is_the_number_of_bytes(bits, count):
    assert len(pack_bits(torch.zeros(count, dtype=torch.int32), bits)) == packed_size(count, bits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_bytes_do_not_depend_on_the_integer_type(dtype, generator):
    values = random_values(6, 21, generator)
    assert pack_bits(values.to(dtype), 6).tolist() == numpy_bit_stream(values, 6)


@pytest.mark.parametrize("values", [[0, 4], [-1, 0]], ids=["too large", "negative"])
def test_a_value_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError, match=r"\[0, 4\) to fit 2 bits"):
        pack_bits(torch.tensor(values), bits=2)


@pytest.mark.parametrize("num_bytes", [5, 7], ids=["truncated", "too long"])
def test_bytes_that_do_not_hold_the_count_are_refused(num_bytes):
    with pytest.raises(ValueError, match=f"8 values of 6 bits take 6 bytes, got {num_bytes}"):
        unpack_bits(torch.zeros(num_bytes, dtype=torch.uint8), bits=6, count=8)


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_out_of_range_are_refused_both_ways(bits):
    with pytest.raises(ValueError, match=f"bits must be 1 to 16, got {bits}"):
        pack_bits(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match=f"bits must be 1 to 16, got {bits}"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, count=1)
