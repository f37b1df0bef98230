"""Round columns in their order, each row for itself: a beam search over errors and bits.

Greedy rounding takes the nearest integer each time: that is GPTQ, and Babai's nearest plane on the lattice of integers. It is
best for the column at hand, not for those to come. A beam keeps the few best of all roundings so far, as K-best decoders of
lattices do. In units of the steps, where a row's scale cancels, the integers z of a row cost

    Σ_j ε_j² cost_j + price Σ_j bits(z_j)

where ε_j, the error of column j, moves what is wanted of the later columns by -ε_j factor_j,later, and bits are those that the
entropy coder takes under the integer's scale class: entropy-coded quantization by its Lagrangian (Chou, Lookabaugh and Gray
1989; in GPTQ: CERWU, arXiv:2505.18758). Then an integer is not always the nearest one: nearer to 0 it takes fewer bits.

On the CPU the search is compiled (`vq4dit/kernels/beam_search.py`); elsewhere it goes column by column through whole matrices.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.layers.scale_classes import LARGEST, code_lengths, level_rows

BLOCK_COLUMNS = 32  # columns whose corrections wait until the block is done, as in GPTQ: one large product, not many small
FEWEST_ROWS = 4  # that are worth a thread
MEANINGLESS = 1e9  # steps


class Rate(NamedTuple):
    """What the bits of integers cost."""

    price: Float[Tensor, " rows"]  # of a bit, in squared steps
    scale_class: Integer[Tensor, "rows columns"]  # the row of `code_lengths` that each integer has

    @classmethod
    def free(cls, weight: Float[Tensor, "rows columns"]) -> Rate:
        """Bits cost nothing."""
        return cls(torch.zeros(len(weight), device=weight.device), torch.zeros_like(weight, dtype=torch.uint8))

    @classmethod
    def under(cls, price: Float[Tensor, " rows"], row_level: Tensor, column_level: Tensor) -> Rate:
        """Those that the coder takes under these scale classes."""
        return cls(price, level_rows(row_level, column_level).to(torch.uint8))


def round_rows(
    wanted: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    cost: Float[Tensor, " columns"],
    rate: Rate,
    beam: int,
) -> Integer[Tensor, "rows columns"]:
    """The integers of each row that cost the least, of `beam` roundings that are kept after each column.

    Args:
        wanted: the weight in steps.
        factor: an error e in column j moves what is wanted of the later columns by -e factor_j,later.
        cost: of a squared error in each column.
    """
    on_device = _round_compiled if wanted.device.type == "cpu" else _round_by_columns
    return on_device(wanted, factor, cost, rate, beam)


def _round_compiled(wanted: Tensor, factor: Tensor, cost: Tensor, rate: Rate, beam: int) -> Integer[Tensor, "rows columns"]:
    """A few rows at a time, so that torch's threads share them and a job can be stopped; how they are cut changes nothing."""
    from vq4dit.kernels import beam_search  # numba takes half a second to import

    found = torch.empty(wanted.shape, dtype=torch.int16)
    lengths, threads = code_lengths().numpy(), torch.get_num_threads()
    of_columns = [tensor.contiguous().float().numpy() for tensor in (factor, cost)]
    of_rows = (wanted.float().clone(), rate.price.float(), rate.scale_class, found)
    rows = min(beam_search.ROWS, max(FEWEST_ROWS, math.ceil(len(wanted) / threads)))

    def work(part: tuple[Tensor, ...]) -> None:
        its_wanted, price, scale_class, its_found = (np.ascontiguousarray(tensor.numpy()) for tensor in part)
        beam_search.round_rows(its_wanted, *of_columns, price, scale_class, lengths, beam, its_found)

    parts = list(zip(*(tensor.split(rows) for tensor in of_rows), strict=True))
    if min(threads, len(parts)) == 1:
        for part in parts:
            work(part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return found


def _round_by_columns(wanted: Tensor, factor: Tensor, cost: Tensor, rate: Rate, beam: int) -> Integer[Tensor, "rows columns"]:
    """The same search, but all roundings that are kept may differ in every column, and the third integer may take more bits."""
    rows, columns = wanted.shape
    lengths, has_price = code_lengths().to(wanted.device), bool(rate.price.any())
    num_candidates = 3 if has_price else 1 if beam == 1 else 2
    # (rows, kept, columns): what is wanted, 0 where that is no number; of columns that are done, their integers
    left = wanted.where(wanted.abs() < MEANINGLESS, 0.0).unsqueeze(1)
    total, costs = wanted.new_zeros(rows, 1), cost.tolist()
    row = torch.arange(rows, device=wanted.device).unsqueeze(1)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(columns, start + BLOCK_COLUMNS)
        here = slice(start, stop)
        origin = torch.arange(left[:, :, 0].numel(), dtype=wanted.dtype, device=wanted.device)  # the rounding it continues
        state = torch.cat([left[:, :, here], origin.view(rows, -1, 1)], dim=2)
        effects = factor[here, here].triu()  # of an error on its column, which it makes an integer, and on those after it
        for column, effect in enumerate(F.pad(effects, (0, 1))):
            here_wanted = state[:, :, column]
            nearest = here_wanted.round().clamp_(1 - LARGEST, LARGEST - 1)
            side = torch.ones_like(nearest).copysign_(here_wanted - nearest)
            candidates = torch.stack([nearest, nearest + side, nearest - side][:num_candidates], dim=1)
            errors = here_wanted.unsqueeze(1) - candidates
            totals = total.unsqueeze(1) + errors.square() * costs[start + column]
            if has_price:
                scale_class = rate.scale_class[:, start + column].int().view(-1, 1, 1)
                totals += rate.price.view(-1, 1, 1) * lengths[scale_class, candidates.abs().int()]
            totals = totals.flatten(1)
            total, best = totals.topk(min(beam, totals.shape[1]), dim=1, largest=False, sorted=False)
            error = errors.flatten(1).gather(1, best)
            parent = torch.add(best.remainder_(state.shape[1]), row, alpha=state.shape[1])
            state = state.flatten(0, 1).index_select(0, parent.flatten()).view(rows, -1, state.shape[2])
            state.addcmul_(error.unsqueeze(2), effect, value=-1)
        left = left.flatten(0, 1).index_select(0, state[:, :, -1].flatten().long()).view(rows, -1, columns)
        integers = state[:, :, :-1].round()
        done = torch.linalg.solve_triangular(effects, left[:, :, here] - integers, upper=True, left=False, unitriangular=True)
        left[:, :, here] = integers
        left[:, :, stop:] -= done @ factor[here, stop:]
    return left[row.squeeze(1), total.argmin(1)].clamp(-LARGEST, LARGEST).short()
