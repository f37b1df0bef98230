"""Error feedback: choose assignments so that a layer's *outputs* stay, not its weights.

A layer sees inputs x with second moments H = E[x xᵀ]; replacing W by Ŵ costs  tr((W - Ŵ) H (W - Ŵ)ᵀ), the mean squared
error of its outputs. Inputs are far from white, so this is a very different metric from || W - Ŵ ||². Column group after
column group takes its codewords, and what that group got wrong is corrected in the columns that still can move: GPTQ
(Frantar et al. 2023, arXiv:2210.17323) with vector codewords, as in GPTVQ (van Baalen et al. 2024, arXiv:2402.15319).

A feedback pass decides each group once, before it knows what comes after. So it is followed by cyclic coordinate descent
(QuantEase, Behdin et al. 2023, arXiv:2309.01885, with vector codewords): group after group is decided again, all others held.
Both alternate with a better codebook for the assignments (`least_squares_codebook`) and the best scale for every output row
(`least_squares_scale`), which lets rows of different size share one codebook. Where rows meet, in the codebook, each counts
by its sensitivity (`vq4dit/sensitivity.py`). From the first descent on no step can raise the error. On layers of a small
trained DiT descent lowered it by a fifth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.codebook import nearest_codewords, reconstruct, split_subvectors, sum_by_codeword
from vq4dit.kmeans import fit_codebook

DAMPING = 0.01  # of the mean of H's diagonal, added to it: directions never seen must not cost nothing (as in GPTQ)
BLOCK_COLUMNS = 128  # columns whose corrections wait until the block is done, as in GPTQ: one large product, not many small
CONJUGATE_GRADIENT_STEPS = 5  # in each round, which goes on where the one before stopped: 30 end no lower
LEAST_SENSITIVITY = 0.02  # of the mean of all rows: no row may cost nothing
FEEDBACK_ROUNDS = 3
DESCENT_ROUNDS = 6  # quantizing a layer takes about a third longer; more change nothing


class QuantizedWeight(NamedTuple):
    """Ŵ = diag(row_scale) codebook[assignments]."""

    codebook: Float[Tensor, "k d"]
    assignments: Integer[Tensor, " n"]
    row_scale: Float[Tensor, " rows"]

    def weight(self, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        return reconstruct(self.codebook, self.assignments, shape) * self.row_scale.unsqueeze(1)


def quantize_weight(
    weight: Float[Tensor, "rows columns"],
    second_moments: Float[Tensor, "columns columns"],
    num_codewords: int,
    subvector_dim: int,
    *,
    sensitivity: Float[Tensor, " rows"] | None = None,
    feedback_rounds: int = FEEDBACK_ROUNDS,
    descent_rounds: int = DESCENT_ROUNDS,
    generator: torch.Generator,
) -> QuantizedWeight:
    """Minimise tr(R (W - Ŵ) H (W - Ŵ)ᵀ) over assignments, codebook and scales in turn: first with feedback, then descending.

    R = diag(r) is the `sensitivity` of the rows (None: all count the same). Assignments and scale of a row do not depend on it.
    """
    weight = weight.float()
    shape = (weight.shape[0], weight.shape[1])
    damped = damp(second_moments.float())
    scale = weight.square().mean(1).sqrt().clamp(min=1e-8)
    normalised = weight / scale.unsqueeze(1)
    row_weight = torch.ones_like(scale) if sensitivity is None else sensitivity.clamp(min=LEAST_SENSITIVITY)
    importance = damped.diagonal().view(-1, subvector_dim).mean(1) * (row_weight * scale.square()).unsqueeze(
        1
    )  # (rows, groups)
    codebook = fit_codebook(
        split_subvectors(normalised, subvector_dim), num_codewords, weights=importance.reshape(-1), generator=generator
    )
    correction = Correction(damped, subvector_dim)
    assignments = torch.empty(0, dtype=torch.uint8)
    for round_number in range(feedback_rounds + descent_rounds):
        if round_number < feedback_rounds:
            assignments = assign_with_feedback(weight / scale.unsqueeze(1), codebook, correction)
        else:
            assignments = descend(weight, QuantizedWeight(codebook, assignments, scale), damped)
        codebook = least_squares_codebook(weight, scale, row_weight, assignments, codebook, damped)
        scale = least_squares_scale(weight, reconstruct(codebook, assignments, shape), damped)
    return QuantizedWeight(codebook, assignments, scale)


def damp(second_moments: Float[Tensor, "n n"], damping: float = DAMPING) -> Float[Tensor, "n n"]:
    """H + λ mean(diag H) I."""
    diagonal = second_moments.diagonal().mean().clamp(min=1e-12)  # if all inputs were zero, all directions count the same
    identity = torch.eye(len(second_moments), dtype=second_moments.dtype, device=second_moments.device)
    return second_moments + damping * diagonal * identity


class Correction:
    """How the error of one column group is corrected in the columns after it.

    With H⁻¹ = Uᵀ U (U upper triangular), the least that an error (w - q) of group g can cost once all later columns are at
    their best is || (w - q) U_gg⁻¹ ||², and the best they can do is to move by -(w - q) U_gg⁻¹ U_g,later.
    """

    def __init__(self, damped: Float[Tensor, "columns columns"], dim: int):
        self.dim = dim
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
        factor = torch.linalg.cholesky(inverse, upper=True)
        blocks = torch.stack([factor[i : i + dim, i : i + dim] for i in range(0, len(factor), dim)])
        self.metrics = torch.linalg.inv(blocks).float()  # U_gg⁻¹ of every group
        self.factor = factor.float()


def assign_with_feedback(
    weight: Float[Tensor, "rows columns"], codebook: Float[Tensor, "k d"], correction: Correction
) -> Integer[Tensor, " n"]:
    """One pass of vector GPTQ over the columns of a (row-scaled) weight; returns the assignments, row by row."""
    rows, columns = weight.shape
    dim = correction.dim
    remaining = weight.clone()
    chosen = []
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(columns, start + BLOCK_COLUMNS)
        errors = torch.empty(rows, stop - start, device=weight.device)
        for left in range(start, stop, dim):
            right = left + dim
            metric = correction.metrics[left // dim]
            wanted = remaining[:, left:right]
            _, nearest = nearest_codewords(wanted @ metric, codebook @ metric)
            chosen.append(nearest[:, 0])
            error = (wanted - codebook.index_select(0, nearest[:, 0].int())) @ metric
            errors[:, left - start : right - start] = error
            remaining[:, right:stop] -= error @ correction.factor[left:right, right:stop]
        remaining[:, stop:] -= errors @ correction.factor[start:stop, stop:]
    return torch.stack(chosen, dim=1).flatten()


def descend(
    weight: Float[Tensor, "rows columns"], quantized: QuantizedWeight, damped: Float[Tensor, "columns columns"]
) -> Integer[Tensor, " n"]:
    """One pass of coordinate descent: the assignments, each in turn the best while the others are held.

    With the error E = W - Ŵ, the best real-valued sub-vector of group g is ŵ_g + (E H)_g H_gg⁻¹, and a codeword q costs
    || (that - q) L ||² more, where H_gg = L Lᵀ.
    """
    rows, columns = weight.shape
    dim = quantized.codebook.shape[1]
    scale = quantized.row_scale.unsqueeze(1)
    current = quantized.weight((rows, columns))
    error = weight - current
    chosen = []
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(columns, start + BLOCK_COLUMNS)
        image = error @ damped[:, start:stop]  # E H, kept up to date within the block
        for left in range(start, stop, dim):
            group, here = slice(left, left + dim), slice(left - start, left - start + dim)
            factor = torch.linalg.cholesky(damped[group, group])
            best = current[:, group] + torch.cholesky_solve(image[:, here].T.contiguous(), factor).T
            _, nearest = nearest_codewords((best / scale) @ factor, quantized.codebook @ factor)
            moved = quantized.codebook.index_select(0, nearest[:, 0].int()) * scale - current[:, group]
            error[:, group] -= moved
            image -= moved @ damped[group, start:stop]
            chosen.append(nearest[:, 0])
    return torch.stack(chosen, dim=1).flatten()


def least_squares_codebook(
    weight: Float[Tensor, "rows columns"],
    scale: Float[Tensor, " rows"],
    sensitivity: Float[Tensor, " rows"] | Float[Tensor, "rows rows"],
    assignments: Integer[Tensor, " n"],
    codebook: Float[Tensor, "k d"],
    damped: Float[Tensor, "columns columns"],
    steps: int = CONJUGATE_GRADIENT_STEPS,
) -> Float[Tensor, "k d"]:
    """`steps` of conjugate gradients to the codebook that minimises tr(R (W - Ŵ) H (W - Ŵ)ᵀ) at given assignments and scales.

    The normal equations are Σ over the sub-vectors of a codeword of (s R Ŵ H) = the same of (s R W H); codewords meet in them
    because H couples columns. Starts from `codebook`, so the error never rises. R is given whole (`vq4dit/joint_descent.py`)
    or by its diagonal.
    """
    k, dim = codebook.shape
    shape = (weight.shape[0], weight.shape[1])
    column_scale = scale.unsqueeze(1)

    def gradient(matrix: Tensor) -> Tensor:
        image = matrix @ damped
        weighted = sensitivity @ image if sensitivity.ndim == 2 else sensitivity.unsqueeze(1) * image
        return sum_by_codeword(split_subvectors(weighted * column_scale, dim), assignments, k)

    def normal_matrix(c: Tensor) -> Tensor:
        return gradient(reconstruct(c.float(), assignments, shape) * column_scale)

    target = gradient(weight)
    solution = codebook.double()
    residual = target - normal_matrix(solution)
    direction = residual.clone()
    power = residual.square().sum()
    enough = 1e-10 * target.square().sum()
    for _ in range(steps):
        if power <= enough:
            break
        image = normal_matrix(direction)
        step = power / (direction * image).sum()
        solution = solution + step * direction
        residual = residual - step * image
        power, previous = residual.square().sum(), power
        direction = residual + (power / previous) * direction
    return solution.float()


def least_squares_scale(
    weight: Float[Tensor, "rows columns"],
    unscaled: Float[Tensor, "rows columns"],
    damped: Float[Tensor, "columns columns"],
) -> Float[Tensor, " rows"]:
    """The scale of each row that minimises its output error: s = (w H q) / (q H q)."""
    image = unscaled @ damped
    scale = (weight * image).sum(1) / (unscaled * image).sum(1).clamp(min=1e-20)
    return scale.clamp(min=1e-8)


def output_error(
    weight: Float[Tensor, "rows columns"],
    quantized: Float[Tensor, "rows columns"],
    second_moments: Float[Tensor, "columns columns"],
) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ): the squared error of the layer's outputs over their power."""
    error = weight.float() - quantized.float()
    power = ((weight.float() @ second_moments) * weight.float()).sum()
    return (((error @ second_moments) * error).sum() / power).item()
