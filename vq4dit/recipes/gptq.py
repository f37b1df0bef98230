"""Error feedback: round a weight so that a layer's *outputs* stay, and what reads them minds least.

A layer sees inputs x with second moments H = E[x xᵀ], and what is behind it minds errors in its outputs by B
(`vq4dit/recipes/fisher.py`). With E = W - Ŵ the error that the noise shows is about

    tr(B E H Eᵀ)                              (the Kronecker-factored curvature of K-FAC, arXiv:1503.05671)

Column after column is rounded, and what that got wrong is corrected in the columns that still can move: GPTQ (Frantar et al.
2023, arXiv:2210.17323). Rows meet in B as columns meet in H, so a block of rows that is done corrects the rows after it in the
same way (YAQA, Tseng et al. 2025, arXiv:2505.22988). What an error costs after all corrections is a number for each row times
one for each column, and steps are small where that is large (`vq4dit/recipes/bit_allocation.py`).

Rounding to the nearest integer is the best for the column at hand, not for those to come. A beam keeps the few best of all
roundings so far, as decoders of lattices do; of a layer's error that takes an eighth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.config import EntropyCodingConfig
from vq4dit.layers.ans import LARGEST, coded_bits, estimate_levels
from vq4dit.layers.entropy_coded import nearest_step, step_size
from vq4dit.recipes.bit_allocation import RateCurve, log_t_for

LEAST_SENSITIVITY = 0.02  # of the mean of B's diagonal, added to it
BLOCK_COLUMNS = 32  # columns whose corrections wait until the block is done, as in GPTQ: one large product, not many small
BLOCK_ROWS = 16  # rows that are rounded side by side, at most; they do not correct each other
FEW_ROWS = 256  # up to which half as many are: there are few blocks, and they take little time
APART = 8.0  # octaves between column scales that each of some layers would have alone: up to here they share one
FILLED = 0.9  # of what a file's integers can be, by weights as they are: corrections need the rest


def block_rows(rows: int) -> int:
    """How many of a layer's rows are rounded side by side."""
    return BLOCK_ROWS if rows > FEW_ROWS else BLOCK_ROWS // 2


class QuantizedWeight(NamedTuple):
    """Ŵ = diag(row_scale) integers diag(column_scale)."""

    integers: Integer[Tensor, "rows columns"]
    row_scale: Float[Tensor, " rows"]
    column_scale: Float[Tensor, " columns"]

    def weight(self) -> Float[Tensor, "rows columns"]:
        return self.integers * self.row_scale.unsqueeze(1) * self.column_scale


class Correction:
    """How an error in one element of a vector is corrected in the elements after it, under a metric M.

    With M = V Vᵀ (V upper triangular) and U = V⁻¹, the least that an error e in element g can cost once all later ones are at
    their best is (e V_gg)², and the best they can do is to move by -(e V_gg) U_g,later. Elements come in the order in which
    they cost more and more: those that will be left out first are made good by those that will not.
    """

    def __init__(self, metric: Float[Tensor, "n n"]):
        self.order = metric.diagonal().argsort(stable=True)
        ordered = metric.double()[self.order][:, self.order]
        self.root = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)  # V: of elements from the last to the first

    @cached_property
    def factor(self) -> Float[Tensor, "n n"]:
        """U, for elements in their order."""
        identity = torch.eye(len(self.root), dtype=self.root.dtype, device=self.root.device)
        return torch.linalg.solve_triangular(self.root, identity, upper=True)

    def costs(self, block: int = 1) -> Float[Tensor, " n"]:
        """What an error of 1 in each element costs, in the metric's own order, if blocks are decided at a time."""
        if block == 1:
            costs = self.root.diagonal().square()
        else:
            position = torch.arange(len(self.root), device=self.root.device) // block
            costs = (self.root * (position.unsqueeze(1) == position)).square().sum(1)
        return torch.empty_like(costs).index_copy_(0, self.order, costs).float()


class ErrorFeedback:
    """Both sides of a layer's error: what corrects what, and what is left to cost something.

    Args:
        columns: how an error in one input's weights is corrected in those of others (`of_inputs`); layers that read the same
            input share it.
        sensitivity: B of the outputs, or its diagonal: then no row corrects another.
        config: how much both are damped.
    """

    def __init__(
        self,
        columns: Correction,
        sensitivity: Float[Tensor, " rows"] | Float[Tensor, "rows rows"],
        config: EntropyCodingConfig,
    ):
        self.columns = columns
        self.column_cost = columns.costs()
        self.rows: Correction | None = None
        self.block_rows = len(sensitivity)
        if sensitivity.ndim == 2:
            self.block_rows = block_rows(len(sensitivity))
            self.rows = Correction(damp_coupling(sensitivity, config.coupling_damping))
            self.row_cost = self.rows.costs(self.block_rows)
        else:
            self.row_cost = sensitivity + LEAST_SENSITIVITY * sensitivity.mean().clamp(min=1e-12)

    def rate_curve(self, weight: Float[Tensor, "rows columns"]) -> RateCurve:
        """Bits that this weight takes at each cost of an error."""
        return RateCurve((weight.square().mean(1) * self.row_cost).sqrt(), self.column_cost.sqrt())

    def balance(self, log_t: float) -> float:
        """What has to go from row scales to column scales, as a logarithm, for both to lie around 1."""
        row, column = (cost.double().log2().mean().item() / -2 for cost in (self.row_cost, self.column_cost))
        return (column - row - log_t) / 2

    def column_scale(self, balance: float) -> Float[Tensor, " columns"]:
        """Of a size that a file can tell, for steps t / sqrt(w_i d_j)."""
        return step_size(nearest_step(self.column_cost.double().rsqrt() * 2**-balance))

    def row_scale(
        self, weight: Float[Tensor, "rows columns"], column_scale: Float[Tensor, " columns"], log_t: float, balance: float
    ) -> Float[Tensor, " rows"]:
        """The same of rows; larger where the largest weight of a row would be too many steps."""
        least = (weight.abs() / column_scale).amax(1).double() / (FILLED * LARGEST)
        return step_size(nearest_step(torch.maximum(self.row_cost.double().rsqrt() * 2 ** (log_t + balance), least)))


def of_inputs(second_moments: Float[Tensor, "columns columns"], config: EntropyCodingConfig) -> Correction:
    """The side of the columns, of H of their inputs."""
    return Correction(damp(second_moments, config.damping))


class _Rows:
    """A weight on its way to integers, a block of rows after another; rows and columns are in their orders."""

    def __init__(self, feedback: ErrorFeedback, weight: Tensor, row_scale: Tensor, column_scale: Tensor):
        self.correction, self.block_rows = feedback.rows, feedback.block_rows
        device, self.column_order = weight.device, feedback.columns.order
        self.order = self.correction.order if self.correction else torch.arange(len(weight), device=device)
        self.remaining = weight.float()[self.order][:, self.column_order]
        self.row_scale, self.column_scale = row_scale[self.order], column_scale[self.column_order]
        self.found = torch.empty(self.remaining.shape, dtype=torch.int16, device=device)
        self.done = 0

    @property
    def is_done(self) -> bool:
        return self.done == len(self.found)

    @property
    def block(self) -> slice:
        return slice(self.done, min(self.done + self.block_rows, len(self.found)))

    def wanted(self) -> Float[Tensor, "rows columns"]:
        """What the next block shall be, in steps."""
        return self.remaining[self.block] / self._step

    def take(self, integers: Integer[Tensor, "rows columns"]) -> None:
        """What the next block has become; the rows after it make good what that got wrong."""
        rows, stop = self.block, self.block.stop
        self.found[rows] = integers
        if self.correction and stop < len(self.found):
            factor = self.correction.factor[rows]
            error = self.remaining[rows] - integers * self._step
            self.remaining[stop:] -= (factor[:, stop:].T @ torch.linalg.solve(factor[:, rows].T, error.double())).float()
        self.done = stop

    @property
    def _step(self) -> Float[Tensor, "rows columns"]:
        return self.row_scale[self.block].unsqueeze(1) * self.column_scale

    def integers(self) -> Integer[Tensor, "rows columns"]:
        """In the weight's own order."""
        return self.found[self.order.argsort()][:, self.column_order.argsort()]


def round_together(
    layers: Sequence[ErrorFeedback],
    weights: Sequence[Float[Tensor, "_ columns"]],
    row_scales: Sequence[Float[Tensor, " _"]],
    column_scale: Float[Tensor, " columns"],
    beam: int,
) -> list[Integer[Tensor, "_ columns"]]:
    """The integers of layers that read the same input, by feedback over both sides; of `beam` roundings of a row.

    Columns correct each other in all of them alike, so a block of rows of each is rounded side by side.
    """
    columns = layers[0].columns
    ordered = column_scale[columns.order]
    size = ordered / columns.factor.diagonal().float()
    factor = columns.factor.float() * size.unsqueeze(1) / ordered
    rounding = [_Rows(layer, w, r, column_scale) for layer, w, r in zip(layers, weights, row_scales, strict=True)]
    while left := [rows for rows in rounding if not rows.is_done]:
        wanted = [rows.wanted() for rows in left]
        found = round_rows(torch.cat(wanted), factor, size.square(), beam)
        for rows, integers in zip(left, found.split([len(block) for block in wanted]), strict=True):
            rows.take(integers)
    return [rows.integers() for rows in rounding]


def round_rows(
    wanted: Float[Tensor, "rows columns"], factor: Float[Tensor, "columns columns"], cost: Float[Tensor, " columns"], beam: int
) -> Integer[Tensor, "rows columns"]:
    """Round columns in their order, each row for itself, keeping the `beam` best roundings of the columns so far.

    In units of the steps, where row scales cancel: an error e in column j costs e² cost_j, and moves what is wanted of the
    later columns by -e factor_j,later.
    """
    rows, columns = wanted.shape
    left = wanted.unsqueeze(1).clone()  # (rows, kept, columns): what is wanted; of columns that are done, their integers
    total, one, costs = wanted.new_zeros(rows, 1), wanted.new_ones(()), cost.tolist()
    row = torch.arange(rows, device=wanted.device).unsqueeze(1)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(columns, start + BLOCK_COLUMNS)
        here = slice(start, stop)
        origin = torch.arange(left[:, :, 0].numel(), dtype=wanted.dtype, device=wanted.device)  # the rounding it continues
        state = torch.cat([left[:, :, here], origin.view(rows, -1, 1)], dim=2)
        effects = factor[here, here].triu()  # of an error on its column, which it makes an integer, and on those after it
        for column, effect in enumerate(F.pad(effects, (0, 1))):
            here_wanted = state[:, :, column]
            error = here_wanted - here_wanted.round().clamp_(1 - LARGEST, LARGEST - 1)
            if beam > 1:
                second = error - torch.copysign(one, error)  # of the second nearest integer
                errors = torch.stack([error, second], dim=1)
                totals = torch.addcmul(total.unsqueeze(1), errors, errors, value=costs[start + column]).flatten(1)
                total, best = totals.topk(min(beam, totals.shape[1]), dim=1, largest=False, sorted=False)
                error = errors.flatten(1).gather(1, best)
                parent = torch.add(best.remainder_(state.shape[1]), row, alpha=state.shape[1])
                state = state.flatten(0, 1).index_select(0, parent.flatten()).view(rows, -1, state.shape[2])
            state.addcmul_(error.unsqueeze(2), effect, value=-1)
        if beam > 1:
            left = left.flatten(0, 1).index_select(0, state[:, :, -1].flatten().long()).view(rows, -1, columns)
        integers = state[:, :, :-1].round()
        done = torch.linalg.solve_triangular(effects, left[:, :, here] - integers, upper=True, left=False, unitriangular=True)
        left[:, :, here] = integers
        left[:, :, stop:] -= done @ factor[here, stop:]
    return left[row.squeeze(1), total.argmin(1)].short()


def quantize_weights(
    weights: Sequence[Float[Tensor, "_ columns"]],
    second_moments: Float[Tensor, "columns columns"],
    sensitivities: Sequence[Float[Tensor, " _"] | Float[Tensor, "_ _"]],
    bits: Sequence[float],
    config: EntropyCodingConfig,
) -> list[QuantizedWeight]:
    """Round weights that multiply the same inputs to integers that take about so many bits, so that tr(B E H Eᵀ) is small.

    The step that the rate curve asks for is tried by rounding to the nearest; the curve is then off by a factor that is known.
    """
    weights = [weight.float() for weight in weights]
    columns = of_inputs(second_moments, config)
    layers = [ErrorFeedback(columns, sensitivity, config) for sensitivity in sensitivities]
    curves = [layer.rate_curve(weight) for layer, weight in zip(layers, weights, strict=True)]
    bits = [max(promised, 0.0) for promised in bits]
    tried = _round_at(layers, weights, [log_t_for([curve], b) for curve, b in zip(curves, bits, strict=True)], beam=1)
    taken = [coded_bits(z, *estimate_levels(z)).sum(dtype=torch.float64).item() for z, _, _ in tried]
    asked = [log_t_for([curve], b * b / max(t, 1e-9)) for curve, b, t in zip(curves, bits, taken, strict=True)]
    return _round_at(layers, weights, asked, config.beam)


def _round_at(
    layers: Sequence[ErrorFeedback], weights: Sequence[Tensor], log_t: Sequence[float], beam: int
) -> list[QuantizedWeight]:
    """With steps that cost t each; one column scale serves all, unless they are so far apart that a file could not tell it."""
    balances = [layer.balance(t) for layer, t in zip(layers, log_t, strict=True)]
    if max(balances) - min(balances) > APART:  # a layer of zeros, say
        return [_round_at([layer], [w], [t], beam)[0] for layer, w, t in zip(layers, weights, log_t, strict=True)]
    balance = sum(balances) / len(balances)
    column_scale = layers[0].column_scale(balance)
    told = zip(layers, weights, log_t, strict=True)
    row_scales = [layer.row_scale(weight, column_scale, t, balance) for layer, weight, t in told]
    found = round_together(layers, weights, row_scales, column_scale, beam)
    return [QuantizedWeight(*both, column_scale) for both in zip(found, row_scales, strict=True)]


def damp(second_moments: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H + λ mean(diag H) I."""
    diagonal = second_moments.diagonal().mean().clamp(min=1e-12)  # if all inputs were zero, all directions count the same
    identity = torch.eye(len(second_moments), dtype=second_moments.dtype, device=second_moments.device)
    return second_moments + damping * diagonal * identity


def damp_coupling(sensitivity: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """B + λ diag(B), and a little for rows that seem not to matter at all."""
    return damp(sensitivity + damping * torch.diag(sensitivity.diagonal()), LEAST_SENSITIVITY)
