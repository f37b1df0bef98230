"""Integers come back, take about as many bits as their probabilities say, and always have the same bytes."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from coded_models import separable_integers

from vq4dit.errors import FormatError
from vq4dit.layers.ans import (
    GREATEST_LEVEL,
    GUARD,
    LARGEST,
    LEAST_LEVEL,
    LEVEL_OF_ONE,
    LEVELS_PER_OCTAVE,
    UNIT,
    Sides,
    _model,
    code_lengths,
    coded_bits,
    encode,
    estimate_levels,
    expected_bits,
    probabilities,
)
from vq4dit.layers.ans_decoding import decode

GOLDEN = "8533b6c1dc0f82da6fec39f1ec8b4103"
GOLDEN_MODELS = [[121, 30], [14, 40], [121, 33], [18, 50]]
GOLDEN_DIGEST = "6dca4800b68eb091883fb3bc52ccae1f3de4e7f418d2746c1ddb2c7475855f4e"


def levels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def with_levels(row: torch.Tensor, column: torch.Tensor) -> Sides:
    """Sides of these levels, and of steps that differ."""
    return Sides(*(side for level in (row, column) for side in ((120 + torch.arange(len(level)) % 17).to(torch.uint8), level)))


def check_round_trip(integers: torch.Tensor, sides: Sides) -> None:
    found, found_sides = decode(*encode(integers, sides), *integers.shape)
    assert torch.equal(found, integers) and found.dtype == torch.int16
    assert all(torch.equal(one, other) for one, other in zip(found_sides, sides, strict=True))


def num_bytes(integers: torch.Tensor, sides: Sides) -> int:
    return len(encode(integers, sides)[0])


def ideal_bits(integers: torch.Tensor, spread: torch.Tensor) -> float:
    """Of rounded Gaussians whose standard deviations are known exactly."""
    below, above = ((integers.double().abs() + side) / spread / 2**0.5 for side in (-0.5, 0.5))
    return -((torch.special.erfc(below) - torch.special.erfc(above)) / 2).log2().sum().item()


# --- there and back ---


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (8, 24), (256, 96)], ids=str)
def test_integers_come_back(shape, generator):
    integers, _ = separable_integers(*shape, generator)
    sides = with_levels(*estimate_levels(integers))
    stream, models = encode(integers, sides)
    assert stream.dtype == torch.uint8 and len(stream) % 4 == 0 and models.shape == (4, 2)
    check_round_trip(integers, sides)


@pytest.mark.parametrize("level", [0, LEAST_LEVEL, 20, LEVEL_OF_ONE, 50, GREATEST_LEVEL, 100, 255])
def test_any_integers_come_back_at_any_level(level, generator):
    """However unlikely they are: a level only says what is short."""
    integers = torch.randint(-LARGEST, LARGEST + 1, (6, 10), generator=generator).short()
    integers[0, :4] = torch.tensor([LARGEST, -LARGEST, 0, 1])
    check_round_trip(integers, with_levels(torch.full((6,), level, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)))


def test_any_sides_come_back(generator):
    """However far from their median they are."""
    sides = Sides(*(torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (6, 6, 10, 10)))
    sides.row_step[:2], sides.column_level[:2] = torch.tensor([0, 255]).byte(), torch.tensor([255, 0]).byte()
    check_round_trip(torch.randint(-3, 4, (6, 10), generator=generator).short(), sides)


@pytest.mark.parametrize("value", [0, 1, -1, LARGEST, -LARGEST])
def test_integers_that_are_all_the_same_come_back(value):
    integers = torch.full((5, 12), value, dtype=torch.int16)
    check_round_trip(integers, with_levels(*estimate_levels(integers)))


def test_zeros_cost_nearly_nothing():
    integers = torch.zeros(256, 512, dtype=torch.int16)
    sides = Sides(*(torch.full((n,), 128, dtype=torch.uint8) for n in (256, 256, 512, 512)))
    row, column = estimate_levels(integers)
    assert num_bytes(integers, sides._replace(row_level=row, column_level=column)) < 256 * 512 / 8 / 1000


@pytest.mark.parametrize("value", [LARGEST + 1, -LARGEST - 1, 32767, -32768])
def test_larger_integers_are_refused(value):
    integers = torch.zeros(2, 3, dtype=torch.int16)
    integers[1, 2] = value
    with pytest.raises(ValueError, match=r"must lie in \[-1022, 1022\]"):
        encode(integers, with_levels(levels(16, 16), levels(16, 16, 16)))


def test_default_devices_and_inference_leave_no_trace(generator):
    """Probabilities are made once in a process, wherever that happens."""
    integers, _ = separable_integers(8, 16, generator)
    sides = with_levels(*estimate_levels(integers))
    for make in (probabilities, code_lengths, expected_bits, _model):
        make.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        check_round_trip(integers, sides)
    check_round_trip(integers, sides)
    assert [side.tolist() for side in estimate_levels(integers)] == [side.tolist() for side in (sides[1], sides[3])]


# --- as short as it should be ---


@pytest.mark.parametrize("shape", [(64, 256), (384, 128)], ids=str)
def test_a_stream_is_as_long_as_its_integers_are_surprising(shape, generator):
    integers, spread = separable_integers(*shape, generator)
    sides = with_levels(*estimate_levels(integers))
    length = 8 * num_bytes(integers, sides)
    assert length <= 1.01 * ideal_bits(integers, spread) + 64 + 12 * sum(shape)
    uniform = Sides(*(side.clone().fill_(128) for side in (*sides[:2], *sides[2:])))
    alone = 8 * num_bytes(torch.zeros_like(integers), sides) - 8 * num_bytes(torch.zeros_like(integers), uniform)
    assert alone < 12 * sum(shape)  # two numbers of eight bits each, in less


def test_coded_bits_tell_the_length_of_the_stream(generator):
    """What is beyond that of zeros with the same sides."""
    integers, _ = separable_integers(96, 128, generator)
    sides, zeros = with_levels(*(levels := estimate_levels(integers))), torch.zeros_like(integers)
    told = (coded_bits(integers, *levels) - coded_bits(zeros, *levels)).sum(dtype=torch.float64).item()
    assert 8 * (num_bytes(integers, sides) - num_bytes(zeros, sides)) == pytest.approx(told, rel=1e-3, abs=64)


def test_estimated_levels_are_about_the_best_there_are(generator):
    """Against a search that goes on until no level of a row or a column can be better."""
    integers, _ = separable_integers(24, 40, generator)
    row, column = (side.int() for side in estimate_levels(integers))
    estimated = coded_bits(integers, row, column).sum().item()
    assert abs(row.float().mean() - 16) < 12 and abs(column.float().mean() - 16) < 4
    every = torch.arange(61, dtype=torch.int32)
    for _ in range(10):
        row = torch.stack([coded_bits(integers, level.expand(24), column).sum(1) for level in every]).argmin(0).int()
        column = torch.stack([coded_bits(integers, row, level.expand(40)).sum(0) for level in every]).argmin(0).int()
    assert estimated <= 1.005 * coded_bits(integers, row, column).sum().item()


# --- probabilities ---


def test_probabilities_are_those_of_rounded_gaussians():
    found = probabilities()
    assert found.shape == (GREATEST_LEVEL - LEAST_LEVEL + 1, GUARD + 1)
    assert torch.equal(2 * found.sum(1) - found[:, 0], torch.ones(len(found), dtype=torch.float64))
    assert torch.equal(found / UNIT, (found / UNIT).round()) and found.min() == UNIT
    for level, z in [(LEVEL_OF_ONE, 0), (LEVEL_OF_ONE, 2), (LEVEL_OF_ONE + 10, 5), (LEVEL_OF_ONE - 4, 1)]:
        spread = 2 ** ((level - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE)
        wanted = (math.erf((z + 0.5) / spread / 2**0.5) - math.erf((z - 0.5) / spread / 2**0.5)) / 2
        assert found[level - LEAST_LEVEL, z] == pytest.approx(wanted, abs=1100 * 2 * UNIT)  # what the least units take from 0


def test_no_machine_rounds_a_probability_to_another_unit():
    """Before rounding none lies so near to the middle of two units that the last digits of erfc could decide."""
    spread = torch.exp2((torch.arange(LEAST_LEVEL, GREATEST_LEVEL + 1).double() - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE)
    tail = torch.special.erfc((torch.arange(1, GUARD + 2).double() - 0.5) / (spread.unsqueeze(1) * 2**0.5)) / 2
    units = (tail[:, :-1] - tail[:, 1:]) / UNIT
    assert (units.frac() - 0.5).abs().min() > 1e-6  # erfc is right to 1e-15, which is 1e-8 units


def test_code_lengths_and_their_means_follow_from_probabilities():
    assert torch.equal(code_lengths(), -probabilities().log2().float())
    eight = LEVEL_OF_ONE + 3 * LEVELS_PER_OCTAVE - LEAST_LEVEL
    assert expected_bits()[eight] == pytest.approx(3 + math.log2(2 * math.pi * math.e) / 2, abs=0.01)
    assert (expected_bits().diff()[:-1] >= 0).all()  # at the last, σ = 512, all beyond `GUARD` is told to be 0


# --- always the same bytes ---


def golden_integers() -> torch.Tensor:
    """A bell of sorts, without a random number."""
    i = torch.arange(64 * 48)
    return ((i * 7919 % 9 + i * 104729 % 9 + i * 1299709 % 9 - 12) * (1 + i % 5) // 2).view(64, 48).short()


def test_bytes_never_change():
    integers = torch.tensor([[0, 1, -1, 2], [5, -7, 0, 1022], [0, 0, -3, -1022]], dtype=torch.int16)
    sides = with_levels(levels(10, 20, 14), levels(18, 22, 16, 60))
    stream, models = encode(integers, sides)
    assert stream.numpy().tobytes().hex() == GOLDEN and models.tolist() == GOLDEN_MODELS
    golden = torch.frombuffer(bytearray.fromhex(GOLDEN), dtype=torch.uint8)
    assert torch.equal(decode(golden, torch.tensor(GOLDEN_MODELS, dtype=torch.uint8), 3, 4)[0], integers)
    sides = with_levels(levels(*range(64)), levels(*range(8, 56)))
    stream, models = encode(golden_integers(), sides)
    assert hashlib.sha256(stream.numpy().tobytes() + models.numpy().tobytes()).hexdigest() == GOLDEN_DIGEST
    check_round_trip(golden_integers(), sides)


# --- damage ---


@pytest.fixture
def coded(generator):
    integers, _ = separable_integers(64, 96, generator)
    return encode(integers, with_levels(*estimate_levels(integers)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda stream: stream[:-4],
        lambda stream: stream[4:],
        lambda stream: stream[: len(stream) // 8 * 4],
        lambda stream: stream[:0],
        lambda stream: stream[:-1],
        lambda stream: torch.cat([stream, stream[-4:]]),
        lambda stream: torch.cat([stream[:4], stream]),
        lambda stream: torch.cat([stream, torch.zeros(4, dtype=torch.uint8)]),
        torch.zeros_like,
        lambda stream: torch.full_like(stream, 255),
        lambda stream: stream.flip(0),
    ],
    ids=["end", "start", "half", "all", "a byte", "more", "more before", "zeros behind", "zeros", "ones", "backwards"],
)
def test_a_damaged_stream_is_refused(coded, damage):
    stream, models = coded
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(damage(stream), models, 64, 96)


def test_nearly_every_changed_bit_is_noticed(coded, generator):
    """Of those in the words read first; a stream has no checksum, and a change near its end changes little."""
    stream, models = coded
    noticed = 0
    for _ in range(100):
        changed, place = stream.clone(), torch.randint(len(stream) // 2, len(stream), (1,), generator=generator)
        changed[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        try:
            decode(changed, models, 64, 96)
        except FormatError:
            noticed += 1
    assert noticed >= 90


@pytest.mark.parametrize("kind, what", [(0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1)])
def test_other_models_of_sides_do_not_decode_it(coded, kind, what):
    """Another centre of steps does: it is only another size of the weight."""
    stream, models = coded
    models[kind, what] += 90
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(stream, models, 64, 96)


@pytest.mark.parametrize("rows, columns", [(64, 95), (64, 97), (63, 96), (96, 64)])
def test_other_shapes_do_not_decode_it(coded, rows, columns):
    with pytest.raises(FormatError, match="the coded integers are damaged"):
        decode(*coded, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_layers_without_integers_come_back_too(rows, columns):
    sides = with_levels(torch.full((rows,), 16, dtype=torch.uint8), torch.full((columns,), 16, dtype=torch.uint8))
    check_round_trip(torch.zeros(rows, columns, dtype=torch.int16), sides)


def test_several_threads_may_read_at_once(generator):
    integers = torch.randn(64, 96, generator=generator).mul(3).round().short()
    sides = with_levels(*estimate_levels(integers))
    coded = encode(integers, sides)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: decode(*coded, 64, 96)[0], range(16))
    assert all(torch.equal(one, integers) for one in found)
