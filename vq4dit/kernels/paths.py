"""One column after the other: continue the kept paths of a row by integers, and keep the few of least cost. Compiled.

A path may take the nearest integer of what it wants, the second nearest, and if neither of them lies nearer to 0, the next one
that does: it takes fewer bits. Loops are short and without branches where they can be: then they become vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vq4dit.kernels.compiling import compiled

MEANINGLESS = np.float32(1e9)  # steps


@compiled
def memory_of_paths(columns: int, beam: int) -> Any:  # pragma: no cover  compiled
    """What `continue_paths` works in.

    Of each column and path, which path it continues, its integer and its error; of each candidate its cost, parent and integer,
    and which are kept; of each path what it wants, and the nearest integer of that.
    """
    count = 3 * beam + 1
    return (
        np.empty((columns, beam), np.int32),
        np.empty((columns, beam), np.int16),
        np.empty((columns, beam), np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.int32),
        np.empty(count, np.float32),
        np.empty(count, np.int32),
        np.empty(beam, np.float32),
        np.empty(beam, np.float32),
    )


@compiled
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


@compiled
def _branch(  # pragma: no cover  compiled
    total: Any, weight: Any, price: Any, length: Any, paths: int, is_greedy: bool, trace: Any
) -> int:
    """The integers that each path may take, and what it costs then; returns how many there are, nearest ones first.

    Args:
        weight: what a squared error costs.
        length: bits of |z|.
    """
    cost, parent, integer, wanted, nearest = trace[3], trace[4], trace[5], trace[7], trace[8]
    one, limit = np.float32(1.0), np.float32(len(length) - 3)  # the next integer must have a length, too
    for path in range(paths):
        nearest[path] = min(max(np.rint(wanted[path]), -limit), limit)
    for path in range(paths):
        error = wanted[path] - nearest[path]
        cost[path] = total[path] + error * error * weight
    for path in range(paths):
        second = nearest[path] + np.copysign(one, wanted[path] - nearest[path])
        integer[paths + path] = second
        cost[paths + path] = total[path] + (wanted[path] - second) * (wanted[path] - second) * weight
    for path in range(paths):
        integer[path] = nearest[path]
        parent[path] = path
        parent[paths + path] = path
    if price == 0:
        return paths if is_greedy else 2 * paths
    count = 2 * paths
    for candidate in range(count):
        cost[candidate] += price * length[abs(np.int32(integer[candidate]))]
    for path in range(paths):
        if nearest[path] * (integer[paths + path] - nearest[path]) > 0:  # the second lies farther from 0
            third = nearest[path] - np.copysign(one, nearest[path])
            integer[count] = third
            parent[count] = path
            cost[count] = total[path] + (wanted[path] - third) * (wanted[path] - third) * weight
            cost[count] += price * length[abs(np.int32(third))]
            count += 1
    return count


@compiled
def continue_paths(  # pragma: no cover  compiled
    state: Any, effects: Any, cost: Any, price: Any, lengths: Any, levels: Any, beam: int, total: Any, paths: int, trace: Any
) -> int:
    """Go through one block of columns of one row; returns how many paths are kept.

    Args:
        state: what the paths want of these columns, twice: read from one, written into the other.
        effects: how an error in a column moves each of them (itself by 1).
        total: what each path costs; changed in place.
        trace: see `memory_of_paths`; its first three are the result.
    """
    parents, integers, errors, candidate_cost, candidate_parent, candidate_integer, kept, wanted, nearest = trace
    codes = candidate_cost.view(np.int32)
    zero = np.float32(0.0)
    old, new = 0, 1
    for column in range(len(cost)):
        for path in range(paths):
            value = state[old, path, column]
            wanted[path] = value if abs(value) < MEANINGLESS else zero  # NaN, too: integers of it would be read out of bounds
        count = _branch(total, cost[column], price, lengths[levels[column]], paths, beam == 1, trace)
        high = 0
        for candidate in range(count if paths < beam else paths):  # the nearest integers alone are as many as are kept
            high = max(high, codes[candidate])
        paths = _keep(codes, count, high, beam, kept)
        effect = effects[column]
        for path in range(paths):
            chosen = kept[path]
            parent, integer = candidate_parent[chosen], candidate_integer[chosen]
            error = wanted[parent] - integer
            parents[column, path], integers[column, path], errors[column, path] = parent, integer, error
            total[path] = candidate_cost[chosen]
            before, after = state[old, parent], state[new, path]
            for j in range(len(after)):
                after[j] = before[j] - error * effect[j]
        old, new = new, old
    return paths
