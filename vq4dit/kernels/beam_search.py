"""Round the columns of a weight one after the other, and keep the few best roundings: compiled, for the CPU.

A rounding is a path through a tree: each column is an integer, and what that got wrong moves what is wanted of the columns
after it. `beam` paths of a row are kept. A path costs the sum of its squared errors, each times the cost of its column, and
the price of the bits that its integers take.

Two things make it fast. An error corrects at once only what is wanted inside its block of columns. And paths that differ now
have nearly always the same past: when a block is done, the one that was done `OPEN` blocks before it is decided as the cheapest
path has it, and paths that disagree end. So all paths of a row share what is wanted of the columns behind, and a decided block
corrects it once, not once for each path; only what the open blocks did is worked out path by path.

Sums are taken in a fixed order and products are not fused, so every processor finds the same integers.
"""

from __future__ import annotations

import inspect
from typing import Any

import numba
import numpy as np

BLOCK = 64  # columns that are corrected at once
OPEN = 2  # blocks that are not decided yet: one misses 2 % of what a beam of 32 finds on correlated columns, two 0.1 %
ROWS = 16  # rows that share what they read of the factor
MEANINGLESS = np.float32(1e9)  # steps


def _compiled(function: Any) -> Any:
    """Run without Python's lock, and kept on disk where there is a place for it."""
    compiled = numba.njit(nogil=True)(inspect.unwrap(function))  # the checks of types that tests add cannot be compiled
    try:
        compiled.enable_caching()
    except RuntimeError:  # neither the package's folder nor the user's can be written
        pass
    return compiled


@_compiled
def _keep(codes: Any, count: int, high: int, beam: int, kept: Any) -> int:  # pragma: no cover  compiled
    """The positions of the `beam` least of so many costs, in order of position; of equal ones the first.

    Costs are no less than 0, so their bits read as integers (`codes`) are in the same order: halve the interval in which the
    greatest code that is kept lies. At least `beam` of them are <= high.
    """
    if count <= beam:
        for i in range(count):
            kept[i] = i
        return count
    low = high
    for i in range(count):
        low = min(low, codes[i])
    low -= 1  # fewer than `beam` are <= low
    up_to_high = 0
    while high - low > 1 and up_to_high != beam:
        middle = np.int32(low + (high - low) // 2)
        up_to_middle = np.int32(0)
        for i in range(count):
            up_to_middle += np.int32(codes[i] <= middle)
        is_enough = up_to_middle >= beam  # no branch: it would be foreseen wrongly half of the time
        low, high = (low, middle) if is_enough else (middle, high)
        up_to_high = up_to_middle if is_enough else up_to_high
    found = 0
    threshold = np.int32(high)
    if up_to_high == beam:  # nearly always: costs differ
        for i in range(count):
            kept[found] = i
            found += np.int32(codes[i] <= threshold)
        return beam
    equal = beam
    for i in range(count):
        equal -= np.int32(codes[i] < threshold)
    for i in range(count):
        is_kept = codes[i] < threshold or (codes[i] == threshold and equal > 0)
        equal -= np.int32(codes[i] == threshold)
        kept[found] = i
        found += np.int32(is_kept)
    return beam


@_compiled
def _search(  # pragma: no cover  compiled
    state: Any, effects: Any, cost: Any, price: Any, lengths: Any, levels: Any, beam: int, total: Any, paths: int, trace: Any
) -> int:
    """Go through one block of columns of one row; returns how many paths are kept.

    Args:
        state: what the paths want of these columns, twice: read from one, written into the other.
        effects: how an error in a column moves each of them (itself by 1).
        total: what each path costs; changed in place.
        trace: of each column and path, which path it continues, its integer and its error.
    """
    parents, integers, errors, candidate_cost, candidate_parent, candidate_integer, kept, wanted, nearest = trace
    codes = candidate_cost.view(np.int32)
    limit = np.float32(lengths.shape[1] - 3)  # the next integer must have a length, too
    zero = np.float32(0.0)
    old, new = 0, 1
    for column in range(len(cost)):
        length, weight = lengths[levels[column]], cost[column]
        high = 0
        for path in range(paths):
            value = state[old, path, column]
            wanted[path] = value if abs(value) < MEANINGLESS else zero  # NaN, too: integers of it would be read out of bounds
        for path in range(paths):  # loops as short as these become vector instructions
            nearest[path] = min(max(np.rint(wanted[path]), -limit), limit)
        for path in range(paths):
            error = wanted[path] - nearest[path]
            candidate_cost[path] = total[path] + error * error * weight
        for path in range(paths):
            error = wanted[path] - nearest[path]
            second = nearest[path] + np.copysign(np.float32(1.0), error)
            candidate_integer[paths + path] = second
            candidate_cost[paths + path] = total[path] + (wanted[path] - second) * (wanted[path] - second) * weight
        for path in range(paths):
            candidate_integer[path] = nearest[path]
            candidate_parent[path] = path
            candidate_parent[paths + path] = path
        count = 2 * paths
        if price > 0:
            for path in range(count):
                candidate_cost[path] += price * length[abs(np.int32(candidate_integer[path]))]
            for path in range(paths):
                if nearest[path] * (candidate_integer[paths + path] - nearest[path]) > 0:  # the second takes more bits
                    third = nearest[path] - np.copysign(np.float32(1.0), nearest[path])
                    error = wanted[path] - third
                    candidate_integer[count] = third
                    candidate_parent[count] = path
                    candidate_cost[count] = total[path] + error * error * weight + price * length[abs(np.int32(third))]
                    count += 1
        elif beam == 1:
            count = paths
        for path in range(count if paths < beam else paths):  # the nearest integers alone are as many as are kept
            high = max(high, codes[path])
        paths = _keep(codes, count, high, beam, kept)
        effect = effects[column]
        for path in range(paths):
            chosen = kept[path]
            parent, integer = candidate_parent[chosen], candidate_integer[chosen]
            error = wanted[parent] - integer
            parents[column, path] = parent
            integers[column, path] = integer
            errors[column, path] = error
            total[path] = candidate_cost[chosen]
            before, after = state[old, parent], state[new, path]
            for j in range(len(after)):
                after[j] = before[j] - error * effect[j]
        old, new = new, old
    return paths


@_compiled
def round_rows(  # pragma: no cover  compiled
    wanted: Any, factor: Any, cost: Any, price: Any, levels: Any, lengths: Any, beam: int, found: Any
) -> None:
    """Round each row for itself, columns in their order.

    Args:
        wanted: (rows, columns) in steps, float32; it is overwritten.
        factor: (columns, columns) float32: an error e in column j moves what is wanted of column l > j by -e factor[j, l].
        cost: (columns,) float32: an error e in column j costs e² cost[j].
        price: (rows,) float32: of a bit.
        levels: (rows, columns) uint8: the row of `lengths` that holds the bits of an integer there.
        lengths: (levels, symbols) float32: bits of |z|.
        beam: paths that are kept.
        found: (rows, columns) int16: the integers, written here.
    """
    num_rows, num_columns = wanted.shape
    trace = (
        np.empty((BLOCK, beam), np.int16),
        np.empty((BLOCK, beam), np.int16),
        np.empty((BLOCK, beam), np.float32),
        np.empty(3 * beam, np.float32),
        np.empty(3 * beam, np.int16),
        np.empty(3 * beam, np.float32),
        np.empty(3 * beam + 1, np.int16),
        np.empty(beam, np.float32),
        np.empty(beam, np.float32),
    )
    parents, integers, errors = trace[:3]
    state = np.zeros((2, beam, BLOCK), np.float32)
    here, across = np.zeros((BLOCK, BLOCK), np.float32), np.zeros((OPEN * BLOCK, BLOCK), np.float32)
    block_errors, block_integers = np.zeros((beam, BLOCK), np.float32), np.zeros((beam, BLOCK), np.int16)
    total, origin = np.zeros(beam, np.float32), np.empty(beam, np.int16)
    paths, totals = np.empty(ROWS, np.int64), np.empty((ROWS, beam), np.float32)
    # of the blocks that are not decided yet, the oldest first: the ring's place of a block is its number modulo OPEN
    open_errors = np.zeros((2, ROWS, beam, OPEN * BLOCK), np.float32)
    open_integers = np.zeros((2, ROWS, beam, OPEN * BLOCK), np.int16)
    decided = np.zeros((ROWS, BLOCK), np.float32)
    for first in range(0, num_rows, ROWS):
        rows = min(ROWS, num_rows - first)
        paths[:] = 1
        totals[:] = 0
        open_errors[:] = 0
        now, next_ = 0, 1
        for start in range(0, num_columns, BLOCK):
            width = min(BLOCK, num_columns - start)
            place = start % (OPEN * BLOCK)
            oldest = start - OPEN * BLOCK
            for j in range(width):
                for c in range(width):
                    here[j, c] = factor[start + j, start + c] if c >= j else 0
            for at in range(max(oldest, 0), start, BLOCK):
                across[at % (OPEN * BLOCK) : at % (OPEN * BLOCK) + BLOCK, :width] = factor[
                    at : at + BLOCK, start : start + width
                ]
            undecided = min(start, OPEN * BLOCK)
            for i in range(rows):
                row = first + i
                for path in range(paths[i]):
                    total[path] = totals[i, path]
                    one = state[0, path]
                    one[:width] = wanted[row, start : start + width]
                    past = open_errors[now, i, path]
                    for j in range(0, undecided, 4):
                        a, b, c, d = past[j], past[j + 1], past[j + 2], past[j + 3]
                        fa, fb, fc, fd = across[j], across[j + 1], across[j + 2], across[j + 3]
                        for at in range(len(one)):
                            one[at] -= (a * fa[at] + b * fb[at]) + (c * fc[at] + d * fd[at])
                stop = start + width
                count = _search(
                    state, here, cost[start:stop], price[row], lengths, levels[row, start:stop], beam, total, paths[i], trace
                )
                for path in range(count):
                    origin[path] = path
                for j in range(width - 1, -1, -1):
                    for path in range(count):
                        at = origin[path]
                        block_errors[path, j], block_integers[path, j] = errors[j, at], integers[j, at]
                        origin[path] = parents[j, at]
                best = np.argmin(total[:count])
                if oldest >= 0:
                    found[row, oldest : oldest + BLOCK] = open_integers[now, i, origin[best], place : place + BLOCK]
                    decided[i] = open_errors[now, i, origin[best], place : place + BLOCK]
                agreeing = 0
                for path in range(count):
                    is_same = True
                    if oldest >= 0 and origin[path] != origin[best]:
                        for j in range(place, place + BLOCK):
                            if open_integers[now, i, origin[path], j] != open_integers[now, i, origin[best], j]:
                                is_same = False
                                break
                    if is_same:
                        new_errors, new_integers = open_errors[next_, i, agreeing], open_integers[next_, i, agreeing]
                        new_errors[:] = open_errors[now, i, origin[path]]
                        new_integers[:] = open_integers[now, i, origin[path]]
                        new_errors[place : place + BLOCK] = block_errors[path]
                        new_integers[place : place + BLOCK] = block_integers[path]
                        totals[i, agreeing] = total[path] - total[best]
                        agreeing += 1
                paths[i] = agreeing
            now, next_ = next_, now
            if oldest >= 0:  # the oldest block is decided: correct what is wanted of the columns after this one
                _correct(wanted[first : first + rows], decided, factor[oldest : oldest + BLOCK], start + width)
        last = (num_columns - 1) // BLOCK * BLOCK
        for i in range(rows):
            best = np.argmin(totals[i, : paths[i]])
            for start in range(max(0, last - (OPEN - 1) * BLOCK), num_columns, BLOCK):
                place = start % (OPEN * BLOCK)
                width = min(BLOCK, num_columns - start)
                found[first + i, start : start + width] = open_integers[now, i, best, place : place + width]


@_compiled
def _correct(wanted: Any, errors: Any, factor: Any, first: int) -> None:  # pragma: no cover  compiled
    """wanted[:, first:] -= errors @ factor[:, first:], a strip of columns at a time: it stays in the nearest cache."""
    columns = wanted.shape[1]
    for start in range(first, columns, 256):
        stop = min(start + 256, columns)
        for j in range(0, BLOCK, 4):
            fa, fb = factor[j][start:stop], factor[j + 1][start:stop]
            fc, fd = factor[j + 2][start:stop], factor[j + 3][start:stop]
            for i in range(len(wanted)):
                a, b, c, d = errors[i, j], errors[i, j + 1], errors[i, j + 2], errors[i, j + 3]
                row = wanted[i][start:stop]
                for at in range(stop - start):
                    row[at] -= (a * fa[at] + b * fb[at]) + (c * fc[at] + d * fd[at])
