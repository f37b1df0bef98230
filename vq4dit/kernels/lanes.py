"""Interleaved asymmetric numeral systems: up to 32 lanes that take words from one stream in turn. Compiled, for the CPU.

A lane is a coder of its own, with 32 bits of state. The lowest 12 of them lie in the range of one symbol, which has as many
values as its frequency; the rest of the state, times the frequency, plus how far into the range they lie, is the state before
that symbol was written. Where it falls below 2^16, the next 16-bit word follows. (Duda, arXiv:1311.2540; interleaved: Giesen,
arXiv:1402.3392; FORMAT.md, section 4.) Lanes do not wait for each other, so a processor works at many of them at once.

Which symbol a number of 12 bits belongs to is looked up: an entry of a table is symbol | frequency - 1 | how far into its
range. Symbol 0 is the escape: what is so unlikely that it has no range follows in 12 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vq4dit.kernels.compiling import compiled

PRECISION = 12  # bits of a frequency
ENTRIES = 1 << PRECISION
ORIGIN = 128  # the symbol of 0
RAW_ORIGIN = 2048  # is added to what follows an escape
LEAST = np.uint32(1 << 16)  # of a state
BITS, HALF = np.uint32(PRECISION), np.uint32(16)
LOW_BYTE, LOW_BITS, LOW_HALF = np.uint32(255), np.uint32(ENTRIES - 1), np.uint32(65535)
FREQUENCY_AT, OFFSET_AT = np.uint32(8), np.uint32(20)  # in an entry
FULL_AT = np.uint64(20)  # a state of this many bits more than the frequency has gives a word away before it takes a symbol
ONE = np.uint32(1)
NOTHING = np.int16(-ORIGIN)  # symbol 0, read as a value


@compiled
def encode_chunk(  # pragma: no cover  compiled
    values: Any, tables: Any, shifts: Any, frequencies: Any, starts: Any, states: Any, words: Any
) -> int:
    """Write one chunk, its last value first; returns how many words.

    Args:
        values: (lines, length) int16: read line by line, and each as many values at a time as there are lanes.
        tables: (lines, length) int16: by which table each is coded.
        shifts: of each table, how many low bits of a value are told as they are.
        frequencies, starts: (tables, 256) uint32: of each symbol; a frequency of 0 is that of a symbol that needs an escape.
        states: (lanes,) uint32, written here: where a reader begins.
        words: (>= 2 x values,) uint16, written here, those that are read last first.
    """
    lines, length = values.shape
    lanes = len(states)
    states[:] = LEAST
    count = 0
    for line in range(lines - 1, -1, -1):
        for place in range(length - 1, -1, -1):
            lane = place % lanes
            state, value, table = states[lane], np.int64(values[line, place]), tables[line, place]
            high = value >> shifts[table]
            symbol = high + ORIGIN if abs(high) < ORIGIN else 0
            symbol = 0 if frequencies[table, symbol] == 0 else symbol
            num_raw = PRECISION if symbol == 0 else shifts[table]
            if num_raw > 0:
                raw = value + RAW_ORIGIN if symbol == 0 else value - (high << shifts[table])
                if np.uint64(state) >> np.uint64(32 - num_raw) > 0:
                    words[count] = np.uint16(state & LOW_HALF)
                    count += 1
                    state >>= HALF
                state = np.uint32((np.uint64(state) << np.uint64(num_raw)) | np.uint64(raw))
            frequency = frequencies[table, symbol]
            if np.uint64(state) >= np.uint64(frequency) << FULL_AT:
                words[count] = np.uint16(state & LOW_HALF)
                count += 1
                state >>= HALF
            whole, rest = state // frequency, state % frequency
            states[lane] = np.uint32((whole << BITS) + starts[table, symbol] + rest)
    return count


@compiled
def _read_raw(state: Any, num_raw: int, words: Any, at: int, end: int) -> Any:  # pragma: no cover  compiled
    """The low bits of a state, the state without them, and where the words go on."""
    raw = state & ((ONE << np.uint32(num_raw)) - ONE)
    state >>= np.uint32(num_raw)
    if state < LEAST and at < end:
        state = (state << HALF) | np.uint32(words[at])
        at += 1
    return raw, state, at


@compiled
def _refill(  # pragma: no cover  compiled
    states: Any, line: Any, first: int, bases: Any, shifts: Any, count: int, words: Any, at: int, end: int
) -> int:
    """Words for the lanes that need one, lane by lane; what follows an escape, or is told as it is, is read on the way."""
    for lane in range(count):
        state = states[lane]
        if state < LEAST and at < end:
            state = (state << HALF) | np.uint32(words[at])
            at += 1
        shift = np.int64(shifts[bases[lane] >> PRECISION])
        if line[first + lane] == NOTHING:
            raw, state, at = _read_raw(state, PRECISION, words, at, end)
            line[first + lane] = np.int16(raw) - RAW_ORIGIN
        elif shift > 0:
            raw, state, at = _read_raw(state, shift, words, at, end)
            line[first + lane] = np.int16((np.int64(line[first + lane]) << shift) + np.int64(raw))
        states[lane] = state
    return at


@compiled
def _read_line(  # pragma: no cover  compiled
    states: Any,
    level: Any,
    levels: Any,
    paths: Any,
    entries: Any,
    shifts: Any,
    classes: Any,
    words: Any,
    at: int,
    end: int,
    memory: Any,
    line: Any,
) -> int:
    """As many values at a time as there are lanes; returns where the words go on.

    Args:
        level, levels: whose sum is the scale class: of the line, and (length,) int32 across it.
        paths: (length,) int64: of a trellis, the state of each; or none.
        memory: an entry and a base of a table for each lane.
        line: (length,) int16, written here.
    """
    looked_up, bases = memory
    lanes, low, high = len(states), np.int32(classes[0] << PRECISION), np.int32(classes[1] << PRECISION)
    is_plain = level + levels.max() <= classes[3]
    for first in range(0, len(levels), lanes):
        count, least = min(lanes, len(levels) - first), np.int16(0)
        here, of_here = line[first : first + count], levels[first : first + count]
        for lane in range(count):  # loops without branches become vector instructions
            bases[lane] = min(max((level + of_here[lane]) << PRECISION, low), high) - low
        if len(paths) > 0:
            for lane in range(count):
                bases[lane] += np.int32((paths[first + lane] & 1) * classes[2] << PRECISION)
        for lane in range(count):
            looked_up[lane] = entries[np.uint32(bases[lane]) + (states[lane] & LOW_BITS)]
        for lane in range(count):
            entry, state = looked_up[lane], states[lane]
            value = np.int16(entry & LOW_BYTE) - np.int16(ORIGIN)
            least = min(least, value)
            here[lane] = value
            states[lane] = (((entry >> FREQUENCY_AT) & LOW_BITS) + ONE) * (state >> BITS) + (entry >> OFFSET_AT)
        if least == NOTHING or not is_plain or at + count > end:
            at = _refill(states, line, first, bases, shifts, count, words, at, end)
        else:
            for lane in range(count):
                state = states[lane]
                is_low = np.uint32(state < LEAST)
                word = np.uint32(words[np.uint64(at)])  # no branch here either: half of them would be foreseen wrongly
                states[lane] = (state << (is_low << np.uint32(4))) | (word * is_low)
                at += np.int64(is_low)
    return at


@compiled
def _follow(trellis: Any, paths: Any, line: Any) -> None:  # pragma: no cover  compiled
    """Values in place of indices, and the states after them."""
    for place in range(len(line)):
        index, path = np.int64(line[place]), paths[place]
        sign = (index > 0) - (index < 0) if path & 1 else 0
        line[place] = 2 * index - sign
        paths[place] = trellis[path, index & 1]


@compiled
def decode_chunks(  # pragma: no cover  compiled
    words: Any,
    starts: Any,
    lanes: int,
    chunk_rows: int,
    chunk_columns: int,
    entries: Any,
    shifts: Any,
    row_level: Any,
    column_level: Any,
    classes: Any,
    trellis: Any,
    row_scale: Any,
    column_scale: Any,
    first: int,
    last: int,
    found: Any,
) -> bool:
    """Read the chunks from `first` up to `last`; False if one of them is damaged.

    The lines of a chunk are its rows; those of a trellis are its columns, because its paths go along the rows.

    Args:
        words: (words,) uint16.
        starts: (chunks + 1,) int64: where each begins: the states of its lanes, two words each, and its words.
        entries: (tables x 4096,) uint32; `shifts`: see `encode_chunk`.
        row_level, column_level: (rows,) and (columns,) int32, whose sum is a value's scale class.
        classes: the least and the greatest that has a table, how many tables each kind of quantizer has, and the greatest class
            whose integers have no low bits that are told as they are.
        trellis: (states, 2) the state after each state and parity of an index, or (0, 2) for integers.
        row_scale, column_scale: (rows,) and (columns,), by which values are multiplied, in the type of the result.
        found: (rows, columns), written here.
    """
    rows, columns = found.shape
    across, is_trellis = max(1, -(-columns // chunk_columns)), len(trellis) > 0
    all_states, memory = np.empty(lanes, np.uint32), (np.empty(lanes, np.uint32), np.empty(lanes, np.int32))
    longest = np.empty(chunk_rows if is_trellis else chunk_columns, np.int16)
    is_whole = True
    for chunk in range(first, last):
        top, left = chunk // across * chunk_rows, chunk % across * chunk_columns
        bottom, right = min(top + chunk_rows, rows), min(left + chunk_columns, columns)
        at, end = starts[chunk], starts[chunk + 1]
        line = longest[: bottom - top if is_trellis else right - left]
        states = all_states[: min(lanes, len(line))]
        for lane in range(len(states)):
            states[lane] = (np.uint32(words[at + 1]) << HALF) | np.uint32(words[at])
            is_whole = is_whole and states[lane] >= LEAST
            at += 2
        if is_trellis:
            levels, scales, paths = row_level[top:bottom], row_scale[top:bottom], np.zeros(bottom - top, np.int64)
            for column in range(left, right):
                level = column_level[column]
                at = _read_line(states, level, levels, paths, entries, shifts, classes, words, at, end, memory, line)
                _follow(trellis, paths, line)
                for row in range(len(line)):
                    found[top + row, column] = line[row] * scales[row] * column_scale[column]
        else:
            levels, scales, paths = column_level[left:right], column_scale[left:right], np.zeros(0, np.int64)
            for row in range(top, bottom):
                level, scale, row_found = row_level[row], row_scale[row], found[row, left:right]
                at = _read_line(states, level, levels, paths, entries, shifts, classes, words, at, end, memory, line)
                for column in range(len(line)):
                    row_found[column] = line[column] * scale * scales[column]
        is_whole = is_whole and at == end
        for lane in range(len(states)):
            is_whole = is_whole and states[lane] == LEAST
    return is_whole


@compiled
def tables_of_trellis(indices: Any, tables: Any, num_tables: int, trellis: Any) -> None:  # pragma: no cover  compiled
    """Add to each table what leads to that of the state in which an index is; all rows begin in state 0."""
    for row in range(len(indices)):
        path = 0
        for column in range(indices.shape[1]):
            tables[row, column] += (path & 1) * num_tables
            path = trellis[path, indices[row, column] & 1]
