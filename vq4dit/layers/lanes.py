"""Integers <-> bytes that decode in parallel: format version 5.

A layer is cut into *chunks*, blocks of rows and columns, and each chunk is coded by itself in up to 32 interleaved lanes of
range asymmetric numeral systems (`vq4dit/kernels/lanes.py`): threads take chunks, a processor's or a GPU's vector units take
lanes, and a few rows can be read without the others. Lanes take the integers of a row in turn, so what they find lies side by
side. What all this costs, the states of the lanes and the lengths of chunks, is kept below 1 % by the size of the chunks: a
lane is worth its 17 bits of overhead where it carries about 2,400.

What is coded are indices of values, and there are two quantizers. Of plain *integers* the value of index k is k. In a
*trellis* (entropy-coded trellis-coded quantization: Fischer and Wang 1992, Marcellin 1994) indices lead through the eight
states of Ungerboeck's code: even states have the even multiples 2k, odd ones the odd multiples and 0, 2k - sign(k), and the
parity of k leads to the next state. So steps are twice as long, and whoever quantizes chooses among the two sets by the path:
about 0.7 dB at 2 bits.
"""

from __future__ import annotations

import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from vq4dit.errors import FormatError
from vq4dit.layers.frequencies import GREATEST_PLAIN, UNITS, levels_of, tables
from vq4dit.layers.scale_classes import GREATEST_LEVEL, LARGEST, LEAST_LEVEL, Sides, code_lengths, coded_bits

HEADER = struct.Struct("<IBBBBII8sI")  # FORMAT.md, 4.1
MOST_LANES = 32
WEIGHTS_OF_THREAD = 2**20  # that are worth one: below, it waits longer for threads of torch, which still spin, than it saves
BITS_OF_LANE = 2400  # worth the 17 bits that a lane costs
TRELLIS = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))  # the next state by state and parity of the index


class Lanes(NamedTuple):
    """What the bytes of a layer hold."""

    integers: Integer[Tensor, "rows columns"]  # of a trellis, its values, not its indices
    sides: Sides  # without steps of columns where those have gains
    column_gain: Float[Tensor, " columns"] | None = None  # in place of the steps of columns


# --- integers -> bytes ---


def encode(
    integers: Integer[Tensor, "rows columns"],
    sides: Sides,
    column_gain: Float[Tensor, " columns"] | None = None,
    *,
    is_trellis: bool = False,
) -> UInt8[Tensor, " bytes"]:
    """Write sides and integers.

    Args:
        integers: those of a trellis are its indices.
        column_gain: stored in fp16 in place of the steps of columns.

    Raises:
        ValueError: if an integer is larger than `LARGEST`, a side or the gains have another length than the axis, or gains are
            no finite values of fp16.
    """
    _check_sides(integers, sides, column_gain)
    if integers.numel() and not -LARGEST <= int(integers.min()) <= int(integers.max()) <= LARGEST:
        raise ValueError(f"integers must lie in [-{LARGEST}, {LARGEST}], got {int(integers.min())} ... {int(integers.max())}")
    values = integers.cpu().short().numpy()
    row_level, column_level = (level.cpu().numpy().astype(np.int32) for level in (sides.row_level, sides.column_level))
    # in tens: how a machine adds them up shall not decide where the layer is cut
    bits = round(coded_bits(integers, sides.row_level, sides.column_level).sum(dtype=torch.float64).item(), -1)
    rows, columns = values.shape
    lanes, chunk_rows, chunk_columns = _cut(rows, columns, bits, is_trellis)
    chunks = [
        _encode_chunk(values[part], row_level[part[0]], column_level[part[1]], lanes, is_trellis)
        for part in _parts(rows, columns, chunk_rows, chunk_columns)
    ]
    coded = sides if column_gain is None else sides._replace(column_step=sides.column_step[:0])
    models = [_centre_and_level(side) for side in coded]
    told = [side.cpu().numpy().astype(np.int16) - centre for side, (centre, _) in zip(coded, models, strict=True)]
    levels = np.repeat(np.array([level for _, level in models], np.int32), [len(side) for side in told])
    of_sides = _encode_chunk(np.concatenate(told)[None], np.zeros(1, np.int32), levels, 1, is_trellis=False)
    gains = b"" if column_gain is None else column_gain.cpu().half().numpy().astype("<f2").tobytes()
    lengths = np.array([len(chunk) // 2 for chunk in chunks], "<u4")
    what = (int(is_trellis), int(column_gain is not None), lanes, 0, chunk_rows, chunk_columns)
    header = HEADER.pack(0, *what, bytes(value for model in models for value in model), len(of_sides) // 2)
    content = b"".join([header[4:], of_sides, gains, lengths.tobytes(), *chunks])
    whole = bytearray(zlib.crc32(content).to_bytes(4, "little") + content)
    return torch.frombuffer(whole, dtype=torch.uint8).to(integers.device)


def _check_sides(integers: Tensor, sides: Sides, column_gain: Tensor | None) -> None:
    rows, columns = integers.shape
    lengths = [len(side) for side in (*sides, *([] if column_gain is None else [column_gain]))]
    if lengths != [rows, rows, columns, columns, columns][: len(lengths)]:
        raise ValueError(f"sides of {rows} rows and {columns} columns are wanted, got lengths {lengths}")
    if column_gain is not None and not (column_gain.half().isfinite() & (column_gain.half() == column_gain)).all():
        raise ValueError("gains must be finite values of fp16: round them before the weight is rounded in their units")


def _centre_and_level(side: UInt8[Tensor, " n"]) -> tuple[int, int]:
    """The median of one kind of side, and the level under which what it differs by takes the fewest bits.

    In fp64, and of equal levels the first: the same bytes on every machine.
    """
    values = side.cpu().numpy().astype(np.int64)
    centre = int(np.sort(values)[(len(values) - 1) // 2]) if len(values) else 0
    lengths = code_lengths().double().numpy()[:, np.abs(values - centre)].sum(1)
    return centre, LEAST_LEVEL + int(lengths.round(3).argmin())


def _cut(rows: int, columns: int, bits: float, is_trellis: bool) -> tuple[int, int, int]:
    """How many lanes a chunk has, and how many rows and columns, so that each lane carries about `BITS_OF_LANE` or more."""
    length = rows if is_trellis else columns
    most = max(1, min(MOST_LANES, length, int(bits / BITS_OF_LANE)))
    lanes = 1 << int(math.log2(most))
    chunks = max(1, int(bits / (lanes * BITS_OF_LANE)))
    if is_trellis:
        return lanes, min(max(1, rows), math.ceil(rows / chunks / lanes) * lanes or 1), max(1, columns)
    across = math.ceil(chunks / max(1, rows))
    return lanes, max(1, math.ceil(rows / max(1, chunks // across))), max(1, math.ceil(columns / across))


def _parts(rows: int, columns: int, chunk_rows: int, chunk_columns: int) -> list[tuple[slice, slice]]:
    """Which rows and columns each chunk has, row of chunks by row of chunks."""
    tops, lefts = range(0, rows, chunk_rows), range(0, columns, chunk_columns)
    return [(slice(top, top + chunk_rows), slice(left, left + chunk_columns)) for top in tops for left in lefts]


def _encode_chunk(values: Any, row_level: Any, column_level: Any, lanes: int, is_trellis: bool) -> bytes:
    """States and words of one chunk."""
    from vq4dit.kernels import lanes as kernel  # numba takes half a second to import

    of_kind = levels_of("even" if is_trellis else "integers")
    rows = np.clip(row_level[:, None] + column_level, LEAST_LEVEL, of_kind[-1]).astype(np.int16) - np.int16(LEAST_LEVEL)
    if is_trellis:
        rows += np.int16(len(levels_of("integers")))
        kernel.tables_of_trellis(values, rows, len(of_kind), np.array(TRELLIS))
    lines, rows = (np.ascontiguousarray(part.T if is_trellis else part) for part in (values, rows))
    states, words = np.zeros(min(lanes, lines.shape[1]), np.uint32), np.empty(2 * values.size, np.uint16)
    found = tables()
    count = kernel.encode_chunk(lines, rows, found.shifts, found.frequencies, found.starts, states, words)
    return states.astype("<u4").tobytes() + words[:count][::-1].astype("<u2").tobytes()


# --- bytes -> integers ---


def check(content: UInt8[Tensor, " bytes"], rows: int, columns: int) -> None:
    """Raise `FormatError` unless the bytes are those that were written, for a layer of this shape; nothing is decoded."""
    reader = _Reader(content.cpu().contiguous().numpy(), rows, columns)
    if zlib.crc32(reader.words[2:]) != reader.checksum:
        raise damaged()


def decode(content: UInt8[Tensor, " bytes"], rows: int, columns: int) -> Lanes:
    """Undo `encode`; all on the device of the bytes (the work is done on the CPU, by torch's number of threads).

    Raises:
        FormatError: if a chunk does not end with its last integer, or the header does not fit.
    """
    reader = _Reader(content.cpu().contiguous().numpy(), rows, columns)
    sides, gain = reader.sides()
    found = reader.read(sides, np.ones(rows, np.int16), np.ones(columns, np.int16))
    device = content.device
    column_gain = None if gain is None else torch.from_numpy(gain).to(device)
    return Lanes(torch.from_numpy(found).to(device), Sides(*(torch.from_numpy(side).to(device) for side in sides)), column_gain)


def decode_weight(content: UInt8[Tensor, " bytes"], rows: int, columns: int, step_sizes: Any) -> Float[Tensor, "rows columns"]:
    """Values times steps, in fp32 on the CPU; errors as in `decode`.

    Args:
        step_sizes: (256,) fp32, of each step.
    """
    reader = _Reader(content.cpu().contiguous().numpy(), rows, columns)
    sides, gain = reader.sides()
    of_columns = step_sizes[sides[2]] if gain is None else gain
    return torch.from_numpy(reader.read(sides, step_sizes[sides[0]], of_columns))


def damaged() -> FormatError:
    return FormatError("the coded integers are damaged: download or quantize the model again")


class _Reader:
    """The bytes of a layer of (rows, columns): their header is looked at, nothing else."""

    def __init__(self, data: Any, rows: int, columns: int):
        if len(data) % 2 or len(data) < HEADER.size:
            raise damaged()
        data = data if data.ctypes.data % 2 == 0 else data.copy()  # a tensor may begin anywhere in its file
        self.shape = (rows, columns)
        self.checksum, kind, has_gain, self.lanes, zero, *cut, models, num_side = HEADER.unpack_from(memoryview(data))
        self.chunk_rows, self.chunk_columns = cut
        self.models = [(models[i], models[i + 1]) for i in range(0, len(models), 2)]
        is_known = kind <= 1 and has_gain <= 1 and zero == 0 and 1 <= self.lanes <= MOST_LANES
        is_known = is_known and all(LEAST_LEVEL <= level <= GREATEST_LEVEL for _, level in self.models)  # that of no side, too
        if not (is_known and 1 <= self.chunk_rows <= max(1, rows) and 1 <= self.chunk_columns <= max(1, columns)):
            raise damaged()
        self.is_trellis, self.has_gain = kind == 1, has_gain == 1
        self.words = data.view("<u2")
        side_at = HEADER.size // 2
        gain_at = side_at + num_side
        lengths_at = gain_at + columns * self.has_gain
        num_chunks = math.ceil(rows / self.chunk_rows) * math.ceil(columns / self.chunk_columns)
        chunks_at = lengths_at + 2 * num_chunks
        if chunks_at > len(self.words):
            raise damaged()
        lengths = self.words[lengths_at:chunks_at].view("<u4").astype(np.int64)
        self.side_starts = np.array([side_at, gain_at], np.int64)
        self.gain = self.words[gain_at:lengths_at].view("<f2").astype(np.float32) if self.has_gain else None
        self.starts = np.concatenate([[chunks_at], chunks_at + np.cumsum(lengths)])
        if (
            self.starts[-1] != len(self.words)
            or (lengths < 2 * self._lanes_of_chunks()).any()
            or num_side < 2 * min(1, rows + columns)
        ):
            raise damaged()

    def _lanes_of_chunks(self) -> Any:
        """Of each chunk: as many as the header says, or as its lines are long: its rows, or, of a trellis, its columns."""
        cuts = zip(self.shape, (self.chunk_rows, self.chunk_columns), strict=True)
        rows, columns = (np.diff(np.append(np.arange(0, size, length), size)) for size, length in cuts)
        lines = np.repeat(rows, len(columns)) if self.is_trellis else np.tile(columns, len(rows))
        return np.minimum(self.lanes, lines)

    def sides(self) -> tuple[Any, Any]:
        """Side information, four arrays of uint8, and the gains of columns, if there are any."""
        rows, columns = self.shape
        lengths = [rows, rows, 0 if self.has_gain else columns, columns]
        levels = np.repeat(np.array([level for _, level in self.models], np.int32), lengths)
        found = np.empty((1, len(levels)), np.int16)
        ones = np.ones(len(levels), np.int16)
        cut, of_row = (1, max(1, len(levels))), np.zeros(1, np.int32)
        if not self._read(self.side_starts, 1, cut, False, of_row, levels, (ones[:1], ones), found):
            raise damaged()
        values = np.split(found[0], np.cumsum(lengths)[:-1])
        sides = [value.astype(np.int32) + centre for value, (centre, _) in zip(values, self.models, strict=True)]
        if any(len(side) and not 0 <= side.min() <= side.max() <= 255 for side in sides):
            raise damaged()
        return [side.astype(np.uint8) for side in sides], self.gain

    def read(self, sides: Any, row_scale: Any, column_scale: Any) -> Any:
        """Values times the scales of their rows and columns, in the type of these."""
        found = np.empty(self.shape, row_scale.dtype)
        cut = (self.chunk_rows, self.chunk_columns)
        row_level, column_level = (sides[kind].astype(np.int32) for kind in (1, 3))
        scales = (row_scale, column_scale)
        if not self._read(self.starts, self.lanes, cut, self.is_trellis, row_level, column_level, scales, found):
            raise damaged()
        return found

    def _read(
        self,
        starts: Any,
        lanes: int,
        cut: tuple[int, int],
        is_trellis: bool,
        row_level: Any,
        column_level: Any,
        scales: tuple[Any, Any],
        found: Any,
    ) -> bool:
        from vq4dit.kernels import lanes as kernel  # numba takes half a second to import

        if found.size == 0:
            return bool(starts[0] == starts[-1])
        of_kind, all_tables = levels_of("even" if is_trellis else "integers"), tables()
        skipped = len(levels_of("integers")) if is_trellis else 0
        entries, shifts = all_tables.entries[skipped * UNITS :], all_tables.shifts[skipped:]
        classes = np.array([LEAST_LEVEL, of_kind[-1], len(of_kind), GREATEST_PLAIN])
        trellis = np.array(TRELLIS[: len(TRELLIS) * is_trellis]).reshape(-1, 2)
        num_chunks = len(starts) - 1

        def work(part: tuple[int, int]) -> bool:
            of_words = (self.words, starts, lanes, *cut)
            of_coder = (entries, shifts, row_level, column_level, classes, trellis)
            return kernel.decode_chunks(*of_words, *of_coder, *scales, *part, found)

        workers = max(1, min(torch.get_num_threads(), num_chunks, math.prod(found.shape) // WEIGHTS_OF_THREAD))
        bounds = [num_chunks * worker // workers for worker in range(workers + 1)]
        shares = list(zip(bounds[:-1], bounds[1:], strict=True))
        if workers == 1:
            return all([work(share) for share in shares])
        with ThreadPoolExecutor(workers) as pool:
            return all(pool.map(work, shares))
