"""Error feedback: round a weight so that a layer's *outputs* stay, and what reads them minds least.

A layer sees inputs x with second moments H = E[x xᵀ], and what is behind it minds errors in its outputs by B
(`vq4dit/recipes/fisher.py`). With E = W - Ŵ the error that the noise shows is about

    tr(B E H Eᵀ)                              (the Kronecker-factored curvature of K-FAC, arXiv:1503.05671)

Column after column is rounded, and what that got wrong is corrected in the columns that still can move: GPTQ (Frantar et al.
2023, arXiv:2210.17323). Rows meet in B as columns meet in H, so a block of rows that is done corrects the rows after it in the
same way (YAQA, Tseng et al. 2025, arXiv:2505.22988). What an error costs after all corrections is a number for each row times
one for each column, and steps are small where that is large (`vq4dit/recipes/bit_allocation.py`).

How a row's integers are chosen, by errors and by the bits that they take, is told in `vq4dit/recipes/rounding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.config import EntropyCodingConfig
from vq4dit.layers.entropy_coded import nearest_step, step_size
from vq4dit.layers.scale_classes import LARGEST, LEVELS_PER_OCTAVE, coded_bits, estimate_levels
from vq4dit.recipes.bit_allocation import RateCurve, log_t_for
from vq4dit.recipes.rounding import Rate, round_rows

LEAST_SENSITIVITY = 0.02  # of the mean of B's diagonal, added to it
BLOCK_ROWS = 16  # rows that are rounded side by side, at most; they do not correct each other
FEW_ROWS = 256  # up to which half as many are: there are few blocks, and they take little time
APART = 8.0  # octaves between column scales that each of some layers would have alone: up to here they share one
TRIAL_BEAMS = (1, 1, 4)  # roundings kept while the step is looked for: a wide beam that pays for bits takes a few fewer
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

    def __init__(self, feedback: ErrorFeedback, weight: Tensor, row_scale: Tensor, column_scale: Tensor, rate: Rate):
        self.correction, self.block_rows = feedback.rows, feedback.block_rows
        device, self.column_order = weight.device, feedback.columns.order
        self.order = self.correction.order if self.correction else torch.arange(len(weight), device=device)
        self.remaining = weight.float()[self.order][:, self.column_order]
        self.row_scale, self.column_scale = row_scale[self.order], column_scale[self.column_order]
        self._rate = Rate(rate.price[self.order], rate.scale_class[self.order][:, self.column_order])
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

    def rate(self) -> Rate:
        """What its bits cost."""
        return Rate(*(of_rows[self.block] for of_rows in self._rate))

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
    rates: Sequence[Rate],
    beam: int,
) -> list[Integer[Tensor, "_ columns"]]:
    """The integers of layers that read the same input, by feedback over both sides; of `beam` roundings of a row.

    Columns correct each other in all of them alike, so a block of rows of each is rounded side by side.
    """
    columns = layers[0].columns
    ordered = column_scale[columns.order]
    size = ordered / columns.factor.diagonal().float()
    factor = columns.factor.float() * size.unsqueeze(1) / ordered
    of_layers = zip(layers, weights, row_scales, rates, strict=True)
    rounding = [_Rows(layer, weight, row_scale, column_scale, rate) for layer, weight, row_scale, rate in of_layers]
    while left := [rows for rows in rounding if not rows.is_done]:
        wanted = [rows.wanted() for rows in left]
        rate = Rate(*(torch.cat(of_rows) for of_rows in zip(*(rows.rate() for rows in left), strict=True)))
        found = round_rows(torch.cat(wanted), factor, size.square(), rate, beam)
        for rows, integers in zip(left, found.split([len(block) for block in wanted]), strict=True):
            rows.take(integers)
    return [rows.integers() for rows in rounding]


def quantize_weights(
    weights: Sequence[Float[Tensor, "_ columns"]],
    second_moments: Float[Tensor, "columns columns"],
    sensitivities: Sequence[Float[Tensor, " _"] | Float[Tensor, "_ _"]],
    bits: Sequence[float],
    config: EntropyCodingConfig,
) -> list[QuantizedWeight]:
    """Round weights that multiply the same inputs to integers that take about so many bits, so that tr(B E H Eᵀ) is small.

    Secant steps: the step that the rate curve asks for is tried by greedy rounding, the next ones by beams that pay for bits
    (`TRIAL_BEAMS`); each time the curve is off by a factor that is then known.
    """
    weights = [weight.float() for weight in weights]
    columns = of_inputs(second_moments, config)
    layers = [ErrorFeedback(columns, sensitivity, config) for sensitivity in sensitivities]
    curves = [layer.rate_curve(weight) for layer, weight in zip(layers, weights, strict=True)]
    bits = [max(promised, 0.0) for promised in bits]
    log_t = [log_t_for([curve], promised) for curve, promised in zip(curves, bits, strict=True)]
    trials = [_Trial(t) for t in log_t]
    for beam in TRIAL_BEAMS:
        tried = _round_at(layers, weights, trials, config.rate_weight, min(beam, config.beam))
        trials = [_Trial.after(*of_one) for of_one in zip(tried, trials, curves, bits, strict=True)]
    return _round_at(layers, weights, trials, config.rate_weight, config.beam)


class _Trial(NamedTuple):
    """Which step to try, and what was found with another."""

    log_t: float
    tried: QuantizedWeight | None = None
    scale_classes: tuple[Tensor, ...] = ()  # of its rows and columns

    @classmethod
    def after(cls, tried: QuantizedWeight, trial: _Trial, curve: RateCurve, bits: float) -> _Trial:
        """What the curve promised there was off by a factor: ask it for as many bits more or fewer."""
        scale_classes = estimate_levels(tried.integers)
        taken = coded_bits(tried.integers, *scale_classes).sum(dtype=torch.float64).item()
        return cls(log_t_for([curve], curve.bits(trial.log_t) * bits / max(taken, 1e-9)), tried, scale_classes)

    def rate(self, weight: Tensor, row_cost: Tensor, row_scale: Tensor, column_scale: Tensor, rate_weight: float) -> Rate:
        """A bit costs as much everywhere: `rate_weight` of the squared step that an integer in balance has, t²."""
        if self.tried is None:
            return Rate.free(weight)
        price = rate_weight * 4**self.log_t / (row_cost.double() * row_scale.double().square())
        smaller = (self.tried.row_scale / row_scale).log2() + (self.tried.column_scale / column_scale).log2().mean()
        row_level, column_level = self.scale_classes  # integers of smaller steps are larger
        row_level = (row_level + (LEVELS_PER_OCTAVE * smaller).round()).clamp(0, 255).int()
        return Rate.under(price.float(), row_level, column_level)


def _round_at(
    layers: Sequence[ErrorFeedback], weights: Sequence[Tensor], trials: Sequence[_Trial], rate_weight: float, beam: int
) -> list[QuantizedWeight]:
    """With steps that cost t each; one column scale serves all, unless they are so far apart that a file could not tell it."""
    balances = [layer.balance(trial.log_t) for layer, trial in zip(layers, trials, strict=True)]
    if max(balances) - min(balances) > APART:  # a layer of zeros, say
        alone = zip(layers, weights, trials, strict=True)
        return [_round_at([layer], [weight], [trial], rate_weight, beam)[0] for layer, weight, trial in alone]
    balance = sum(balances) / len(balances)
    column_scale = layers[0].column_scale(balance)
    row_scales, rates = [], []
    for layer, weight, trial in zip(layers, weights, trials, strict=True):
        row_scales.append(layer.row_scale(weight, column_scale, trial.log_t, balance))
        rates.append(trial.rate(weight, layer.row_cost, row_scales[-1], column_scale, rate_weight))
    found = round_together(layers, weights, row_scales, column_scale, rates, beam)
    return [QuantizedWeight(*both, column_scale) for both in zip(found, row_scales, strict=True)]


def damp(second_moments: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H + λ mean(diag H) I."""
    diagonal = second_moments.diagonal().mean().clamp(min=1e-12)  # if all inputs were zero, all directions count the same
    identity = torch.eye(len(second_moments), dtype=second_moments.dtype, device=second_moments.device)
    return second_moments + damping * diagonal * identity


def damp_coupling(sensitivity: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """B + λ diag(B), and a little for rows that seem not to matter at all."""
    return damp(sensitivity + damping * torch.diag(sensitivity.diagonal()), LEAST_SENSITIVITY)
