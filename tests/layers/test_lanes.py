"""Integers come back from their lanes, take about as many bits as their probabilities say, and always have the same bytes."""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from coded_models import damages, separable_integers, with_levels

from vq4dit.errors import FormatError
from vq4dit.kernels import lanes as kernel
from vq4dit.layers import lanes
from vq4dit.layers.entropy_coded import STEP_SIZES
from vq4dit.layers.frequencies import ESCAPE, GREATEST_PLAIN, KINDS, ORIGIN, UNITS, frequencies, tables
from vq4dit.layers.scale_classes import (
    GREATEST_LEVEL,
    LARGEST,
    LEAST_LEVEL,
    LEVEL_OF_ONE,
    Sides,
    coded_bits,
    estimate_levels,
)

GOLDEN = "af14af400000010002000000030000007826122680290f1e04000000da280100728ea20903000000df060100393b"
GOLDEN_DIGEST = "9009ffda1440995667ff2c89c6b9fc919858808d6f7a8d619e740ff7f5baaa84"
DAMAGED = "the coded integers are damaged"


def levels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def check_round_trip(integers: torch.Tensor, sides: Sides) -> torch.Tensor:
    content = lanes.encode(integers, sides)
    lanes.check(content, *integers.shape)
    found = lanes.decode(content, *integers.shape)
    assert torch.equal(found.integers, integers) and found.integers.dtype == torch.int16 and found.column_gain is None
    assert all(torch.equal(one, other) for one, other in zip(found.sides, sides, strict=True))
    return content


def num_bits(integers: torch.Tensor, sides: Sides) -> int:
    return 8 * len(lanes.encode(integers, sides))


# --- there and back ---


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (8, 24), (33, 1000), (256, 96), (300, 700)], ids=str)
def test_integers_come_back(shape, generator):
    integers, _ = separable_integers(*shape, generator)
    content = check_round_trip(integers, with_levels(*estimate_levels(integers)))
    assert content.dtype == torch.uint8 and len(content) % 2 == 0


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_layers_without_integers_come_back_too(rows, columns):
    sides = with_levels(torch.full((rows,), 16, dtype=torch.uint8), torch.full((columns,), 16, dtype=torch.uint8))
    check_round_trip(torch.zeros(rows, columns, dtype=torch.int16), sides)


@pytest.mark.parametrize("level", [0, LEAST_LEVEL, 20, LEVEL_OF_ONE, 50, 52, 53, 54, 57, 60, 65, GREATEST_LEVEL, 100, 255])
def test_any_integers_come_back_at_any_level(level, generator):
    """However unlikely they are: a level only says what is short."""
    integers = torch.randint(-LARGEST, LARGEST + 1, (40, 50), generator=generator).short()
    integers[0, :4] = torch.tensor([LARGEST, -LARGEST, 0, 1])
    check_round_trip(integers, with_levels(torch.full((40,), level, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)))


def test_any_sides_come_back(generator):
    """However far from their median they are."""
    sides = Sides(*(torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (6, 6, 10, 10)))
    sides.row_step[:2], sides.column_level[:2] = torch.tensor([0, 255]).byte(), torch.tensor([255, 0]).byte()
    check_round_trip(torch.randint(-3, 4, (6, 10), generator=generator).short(), sides)


@pytest.mark.parametrize("value", [0, 1, -1, LARGEST, -LARGEST])
def test_integers_that_are_all_the_same_come_back(value):
    integers = torch.full((5, 12), value, dtype=torch.int16)
    check_round_trip(integers, with_levels(*estimate_levels(integers)))


@pytest.mark.parametrize("value", [LARGEST + 1, -LARGEST - 1, 32767, -32768])
def test_larger_integers_are_refused(value):
    integers = torch.zeros(2, 3, dtype=torch.int16)
    integers[1, 2] = value
    with pytest.raises(ValueError, match=r"must lie in \[-1022, 1022\]"):
        lanes.encode(integers, with_levels(levels(16, 16), levels(16, 16, 16)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_finds_the_same(threads, generator, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(lanes, "WEIGHTS_OF_THREAD", 1000)
    integers, _ = separable_integers(700, 800, generator)
    content = check_round_trip(integers, with_levels(*estimate_levels(integers)))
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda _: lanes.decode(content, 700, 800).integers, range(6))
    assert all(torch.equal(one, integers) for one in found)


def test_weights_are_values_times_steps(generator):
    integers, _ = separable_integers(48, 72, generator)
    sides = with_levels(*estimate_levels(integers))
    step = torch.from_numpy(STEP_SIZES)
    wanted = integers * step[sides.row_step.long()].unsqueeze(1) * step[sides.column_step.long()]
    assert torch.equal(lanes.decode_weight(lanes.encode(integers, sides), 48, 72, STEP_SIZES), wanted)


# --- gains and the trellis ---


def values_of(indices: torch.Tensor) -> torch.Tensor:
    """What the indices of a trellis mean, each row from state 0 on."""
    found = torch.zeros_like(indices)
    for row, of_row in enumerate(indices.tolist()):
        state = 0
        for column, index in enumerate(of_row):
            found[row, column] = 2 * index - (state % 2) * ((index > 0) - (index < 0))
            state = lanes.TRELLIS[state][index % 2]
    return found


def test_gains_take_the_place_of_steps_of_columns(generator):
    integers, _ = separable_integers(40, 60, generator)
    sides, gain = with_levels(*estimate_levels(integers)), torch.rand(60, generator=generator).half().float()
    found = lanes.decode(content := lanes.encode(integers, sides, gain), 40, 60)
    assert torch.equal(found.integers, integers) and torch.equal(found.column_gain, gain)
    assert [len(side) for side in found.sides] == [40, 40, 0, 60]
    wanted = integers * torch.from_numpy(STEP_SIZES)[sides.row_step.long()].unsqueeze(1) * gain
    assert torch.equal(lanes.decode_weight(content, 40, 60, STEP_SIZES), wanted)


@pytest.mark.parametrize("shape", [(1, 9), (40, 60), (48, 900)], ids=str)
def test_a_trellis_gives_the_values_of_its_indices(shape, generator):
    indices, _ = separable_integers(*shape, generator)
    sides = with_levels(*estimate_levels(indices))
    content = lanes.encode(indices, sides, is_trellis=True)
    lanes.check(content, *shape)
    assert lanes._cut(*shape, coded_bits(indices, sides.row_level, sides.column_level).sum().item(), True)[2] == shape[1]
    assert torch.equal(lanes.decode(content, *shape).integers, values_of(indices))


def beam_search(weight: torch.Tensor, step: float, price: float, is_trellis: bool, beam: int = 8) -> tuple[torch.Tensor, ...]:
    """Indices and values of rows, of white weights, by squared errors in steps and the bits that a coder of one class takes."""
    spread = weight.square().mean().sqrt().item() / step
    level = round(LEVEL_OF_ONE + 4 * math.log2(spread))
    lengths = {}
    for kind in KINDS:
        of_indices, escape = frequencies(kind, level)
        lengths[kind] = torch.tensor([*of_indices] + [escape / UNITS] * (LARGEST + 2 - len(of_indices))).div(UNITS).log2().neg()
    rows = len(weight)
    total, state = torch.zeros(rows, 1), torch.zeros(rows, 1, dtype=torch.long)
    indices, values = (torch.zeros(rows, 1, 0, dtype=torch.long) for _ in range(2))
    next_state = torch.tensor(lanes.TRELLIS)
    for column in weight.T / step:
        odd = state % 2 == 1 if is_trellis else torch.zeros_like(state, dtype=torch.bool)
        wanted = column.unsqueeze(1)
        nearest = torch.where(
            odd, (wanted.abs() + 1).div(2).round() * wanted.sign(), (wanted / (2 if is_trellis else 1)).round()
        )
        candidates = (nearest.unsqueeze(2) + torch.tensor([-1.0, 0.0, 1.0])).long()
        of_candidates = candidates * (2 if is_trellis else 1) - odd.unsqueeze(2).long() * candidates.sign()
        plain = "even" if is_trellis else "integers"
        bits = torch.where(odd.unsqueeze(2), lengths["odd"][candidates.abs()], lengths[plain][candidates.abs()])
        costs = (total.unsqueeze(2) + (wanted.unsqueeze(2) - of_candidates).square() + price * bits).flatten(1)
        total, best = costs.topk(min(beam, costs.shape[1]), dim=1, largest=False)
        parent = best // 3
        chosen = candidates.flatten(1).gather(1, best)
        state = next_state[state.gather(1, parent), chosen % 2] if is_trellis else state.gather(1, parent)
        indices, values = (
            torch.cat([past.gather(1, parent.unsqueeze(2).expand(-1, -1, past.shape[2])), new.unsqueeze(2)], dim=2)
            for past, new in ((indices, chosen), (values, of_candidates.flatten(1).gather(1, best)))
        )
    least = total.argmin(1)
    return tuple(found[torch.arange(rows), least].short() for found in (indices, values))


def rate_and_error(weight: torch.Tensor, step: float, is_trellis: bool) -> tuple[float, float]:
    """Bits a weight of a layer as it is stored, and its mean squared error, in which the steps are as good as they can be."""
    indices, values = beam_search(weight, step, 0.1 * (4 if is_trellis else 1), is_trellis)
    rows, columns = weight.shape
    steps = torch.full((rows,), 128, dtype=torch.uint8), torch.full((columns,), 128, dtype=torch.uint8)
    spread = values.float().square().mean().sqrt().item()
    level = round(LEVEL_OF_ONE + 4 * math.log2(spread))
    row_level = torch.full((rows,), level, dtype=torch.uint8)
    sides = Sides(steps[0], row_level, steps[1], torch.zeros(columns, dtype=torch.uint8))
    tried = [sides._replace(row_level=row_level + nearby) for nearby in (-1, 0, 1)]
    content = min((lanes.encode(indices, sides, is_trellis=is_trellis) for sides in tried), key=len)
    assert torch.equal(lanes.decode(content, rows, columns).integers, values)
    scale = (weight * values).sum() / values.float().square().sum()
    return 8 * len(content) / weight.numel(), (weight - scale * values).square().mean().item()


def test_a_trellis_is_better_than_integers_at_equal_bits():
    """By 0.6 dB or more at about 2 bits, on white weights: FORMAT.md has room for who quantizes so."""
    weight, step = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), 0.6
    bits, error = rate_and_error(weight, 1.0, is_trellis=False)
    for _ in range(3):
        bits_of_trellis, error_of_trellis = rate_and_error(weight, step, is_trellis=True)
        step *= 2 ** (bits_of_trellis - bits)
    assert abs(bits_of_trellis - bits) < 0.03 and 1.5 < bits < 2.5
    more = max(0.0, bits_of_trellis - bits)  # a bit is worth 6.02 dB at most
    assert 10 * math.log10(error / error_of_trellis) - 6.02 * more > 0.6


# --- as short as it should be ---


@pytest.mark.parametrize("scale", [0.5, 1.0, 16.0], ids=["about a bit", "about two", "about six"])
def test_lanes_cost_at_most_a_hundredth(scale, generator):
    """More than what the integers and the sides take by themselves."""
    _, spread = separable_integers(512, 768, generator)
    integers = (torch.randn(512, 768, generator=generator, dtype=torch.float64) * spread * scale).round().short()
    sides = with_levels(*estimate_levels(integers.clamp(-LARGEST, LARGEST)))
    integers = integers.clamp(-LARGEST, LARGEST)
    alone = coded_bits(integers, sides.row_level, sides.column_level).sum(dtype=torch.float64).item()
    assert num_bits(integers, sides) < 1.01 * alone + 12 * sum(integers.shape)


def test_zeros_cost_nearly_nothing():
    integers = torch.zeros(256, 512, dtype=torch.int16)
    sides = Sides(*(torch.full((n,), 128, dtype=torch.uint8) for n in (256, 256, 512, 512)))
    row, column = estimate_levels(integers)
    assert num_bits(integers, sides._replace(row_level=row, column_level=column)) / 8 < 256 * 512 / 8 / 100


def test_small_layers_have_few_lanes_and_large_ones_many():
    """The last chunks are smaller, never larger; those of a trellis hold whole rows."""
    assert lanes._cut(8, 24, 400.0, False) == (1, 8, 24)
    assert lanes._cut(256, 256, 2.0 * 256 * 256, False) == (32, 256, 256)
    assert lanes._cut(1152, 1152, 2.0 * 1152 * 1152, False) == (32, 34, 1152)
    assert lanes._cut(4, 10**6, 2.0 * 4 * 10**6, False) == (32, 1, 38462)
    assert lanes._cut(1152, 1152, 2.0 * 1152 * 1152, True) == (32, 64, 1152)
    assert lanes._cut(0, 3, 0.0, False) == lanes._cut(0, 3, 0.0, True) == (1, 1, 3)


# --- tables ---


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_gaussians_that_are_rounded(kind):
    for level in range(LEAST_LEVEL, GREATEST_PLAIN + 1):
        found, escape = frequencies(kind, level)
        assert 2 * sum(found) - found[0] + escape == UNITS and min(*found, escape) >= 1
        spread = 2 ** ((level - LEVEL_OF_ONE) / 4)
        edge = {"integers": 0.5, "even": 1.0, "odd": 0.125}[kind]
        assert found[0] == pytest.approx(UNITS * math.erf(edge / spread / 2**0.5), abs=1 + len(found))


def test_tables_and_loops_mean_the_same_by_a_symbol():
    """The loops import nothing of layers, and the tables no numba: each has these by itself."""
    assert (kernel.ENTRIES, kernel.ORIGIN, kernel.NOTHING) == (UNITS, ORIGIN, ESCAPE - ORIGIN)


def test_every_number_of_twelve_bits_belongs_to_the_symbol_in_whose_range_it_lies():
    found = tables()
    entries = found.entries.reshape(-1, UNITS)
    for table in range(0, len(entries), 7):
        symbol, frequency, offset = entries[table] & 255, (entries[table] >> 8 & 4095) + 1, entries[table] >> 20
        assert (found.frequencies[table][symbol] == frequency).all() and (offset < frequency).all()
        assert (found.starts[table][symbol] + offset == range(UNITS)).all()


# --- always the same bytes ---


def golden_integers() -> torch.Tensor:
    """A bell of sorts, without a random number."""
    i = torch.arange(64 * 48)
    return ((i * 7919 % 9 + i * 104729 % 9 + i * 1299709 % 9 - 12) * (1 + i % 5) // 2).view(64, 48).short()


def test_bytes_never_change():
    integers = torch.tensor([[0, 1, -2], [3, 0, 0]], dtype=torch.int16)
    sides = Sides(levels(120, 124), levels(18, 22), levels(128, 129, 120), levels(16, 14, 15))
    assert lanes.encode(integers, sides).numpy().tobytes().hex() == GOLDEN
    sides = with_levels(levels(*range(64)), levels(*range(8, 56)))
    content = check_round_trip(golden_integers(), sides)
    assert hashlib.sha256(content.numpy().tobytes()).hexdigest() == GOLDEN_DIGEST


# --- damage ---


@pytest.fixture(scope="module")
def coded() -> torch.Tensor:
    integers, _ = separable_integers(64, 96, torch.Generator().manual_seed(0))
    return lanes.encode(integers, with_levels(*estimate_levels(integers)))


def with_checksum(content: bytes) -> torch.Tensor:
    """As somebody makes it who wants it to be read."""
    return torch.frombuffer(bytearray(zlib.crc32(content[4:]).to_bytes(4, "little") + content[4:]), dtype=torch.uint8)


@pytest.mark.parametrize("damage", damages(2).values(), ids=damages(2))
def test_damaged_bytes_are_refused(coded, damage):
    with pytest.raises(FormatError, match=DAMAGED):
        lanes.check(damage(coded), 64, 96)
    with pytest.raises(FormatError, match=DAMAGED):
        lanes.decode(damage(coded), 64, 96)


def test_every_changed_bit_is_noticed(coded):
    for place in range(len(coded)):
        changed = coded.clone()
        changed[place] ^= 1 << place % 8
        with pytest.raises(FormatError, match=DAMAGED):
            lanes.check(changed, 64, 96)


FIELDS = {4: 1, 5: 1, 6: 1, 7: 1, 8: 4, 12: 4, **dict.fromkeys(range(16, 24), 1), 24: 4}  # of the header: where, how many bytes


def hostile(content: torch.Tensor, rows: int, columns: int) -> Iterator[torch.Tensor]:
    """Every field of the header and every length of a chunk: 0, one less, one more, the most there can be; and any bytes."""
    whole = content.numpy().tobytes()
    lengths_at = 28 + 2 * int.from_bytes(whole[24:28], "little")
    chunk_rows, chunk_columns = (int.from_bytes(whole[at : at + 4], "little") for at in (8, 12))
    num_chunks = math.ceil(rows / chunk_rows) * math.ceil(columns / chunk_columns)
    assert num_chunks > 3
    for at, size in (FIELDS | {lengths_at + 4 * chunk: 4 for chunk in range(num_chunks)}).items():
        was, most = int.from_bytes(whole[at : at + size], "little"), 256**size - 1
        for value in {0, 1, max(was - 1, 0), min(was + 1, most), most // 2, most} - {was}:
            yield with_checksum(whole[:at] + value.to_bytes(size, "little") + whole[at + size :])
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(4, len(whole), (200,), generator=generator).tolist():
        value = int(torch.randint(256, (1,), generator=generator))
        yield with_checksum(whole[:at] + bytes([value]) + whole[at + 1 :])


def check_hostile(is_trellis: bool) -> float:
    """What part is refused; none does anything else but being refused or read."""
    rows, columns, generator = 512, 700, torch.Generator().manual_seed(0)
    integers, _ = separable_integers(rows, columns, generator)
    found = 0
    contents = list(
        hostile(lanes.encode(integers, with_levels(*estimate_levels(integers)), is_trellis=is_trellis), rows, columns)
    )
    for content in contents:
        try:
            assert lanes.decode(content, rows, columns).integers.shape == (rows, columns)
        except FormatError as error:
            found += DAMAGED in str(error)
    return found / len(contents)


@pytest.mark.parametrize("is_trellis", [False, True], ids=["integers", "trellis"])
def test_bytes_that_were_made_to_be_read_do_no_harm(is_trellis):
    """With a checksum that fits: they are refused, or read as other integers."""
    assert check_hostile(is_trellis) > 0.8


def test_nothing_is_read_beyond_the_bytes():
    """Compiled with a look at every index, in a process of its own: one out of bounds is an IndexError there."""
    paths = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]
    calls = "print(test_lanes.check_hostile(False), test_lanes.check_hostile(True))"
    program = f"import sys; sys.path[:0] = {paths!r}; import test_lanes; {calls}"
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": tempfile.mkdtemp()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and all(float(part) > 0.8 for part in done.stdout.split()), done.stderr


def test_a_file_of_many_empty_chunks_is_refused_before_anything_is_made_of_it(coded):
    """What is made of them takes a few times their own bytes."""
    header = bytearray(coded.numpy().tobytes()[:28])
    header[8:16], header[24:28] = b"\x01\0\0\0\x01\0\0\0", (2).to_bytes(4, "little")
    content = with_checksum(bytes(header) + b"\0\0\x01\0" + bytes(4 * 2000 * 1000))
    tracemalloc.start()
    with pytest.raises(FormatError, match=DAMAGED):
        lanes.decode(content, 2000, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(content)


def test_bytes_may_begin_anywhere(coded):
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), coded])[1:]
    assert torch.equal(lanes.decode(moved, 64, 96).integers, lanes.decode(coded, 64, 96).integers)


@pytest.mark.parametrize("what", ["a short side", "large gains", "fine gains", "gains that are no numbers"])
def test_what_cannot_be_written_is_refused(what, generator):
    integers, _ = separable_integers(8, 24, generator)
    sides, gain = with_levels(*estimate_levels(integers)), torch.ones(24)
    if what == "a short side":
        sides = sides._replace(row_level=sides.row_level[:-1])
    else:
        gain[3] = {"large gains": 1e6, "fine gains": 0.1, "gains that are no numbers": math.nan}[what]
    with pytest.raises(ValueError, match="sides of 8 rows and 24 columns|finite values of fp16"):
        lanes.encode(integers, sides, gain)


@pytest.mark.parametrize("rows, columns", [(64, 95), (64, 97), (63, 96), (96, 64)])
def test_other_shapes_do_not_decode_it(coded, rows, columns):
    with pytest.raises(FormatError, match=DAMAGED):
        lanes.decode(coded, rows, columns)
