"""The input Hessian: what a layer must know of its inputs.

The squared error of a linear layer with a bias is tr(E H Eᵀ) with E = W - Ŵ and H the covariance of its inputs: what a mean
input makes wrong, the bias absorbs. Without a bias H = E[x xᵀ], as in GPTQ. H is a mean over tokens, over all recorded calls; a
token that attention masks out (padding of a prompt) is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vq4dit.devices import exact, exact_device
from vq4dit.layers.linear_maps import is_linear_map, matrix_shape
from vq4dit.models.denoiser_calls import DenoiserCall, tensors_of

DAMPINGS = torch.logspace(-3, 0, 13, dtype=torch.float64)  # that are tried, of the mean diagonal
MOST_COLUMNS = 4096  # of a layer whose damping is found by eigenvalues, which take columns³


class InputStatistics(NamedTuple):
    """What a layer must know of its inputs x (teacher) and x̃ (student)."""

    covariance: Float[Tensor, "columns columns"]  # Cov(x̃, x̃)
    mismatch: Float[Tensor, "columns columns"]  # Cov(x - x̃, x̃)
    teacher_mean: Float[Tensor, " columns"]
    student_mean: Float[Tensor, " columns"]
    damping: float = 0.0  # of the covariance's mean diagonal, that other conditions than these ask for

    def to(self, device: torch.device) -> InputStatistics:
        covariance, mismatch, teacher_mean, student_mean = (values.to(device) for values in self[:4])
        return InputStatistics(covariance, mismatch, teacher_mean, student_mean, self.damping)

    def about_zero(self) -> tuple[Float[Tensor, "columns columns"], Float[Tensor, "columns columns"]]:
        """E[x̃ x̃ᵀ] and E[(x - x̃) x̃ᵀ]: what counts where no bias makes a mean error good."""
        mean = self.student_mean
        return self.covariance + torch.outer(mean, mean), self.mismatch + torch.outer(self.teacher_mean - mean, mean)


def input_statistics(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    row_weights: Sequence[Float[Tensor, " _"]] | None = None,
    halves: Sequence[Bool[Tensor, " _"]] | None = None,
) -> InputStatistics:
    """Means over all rows of all calls, one call after the other: no copy of them all is made.

    Means first, then products of what differs from them: a difference of large products would lose a small covariance.

    Args:
        teacher, student: a linear's inputs by call, (..., columns).
        row_weights: how much each row of each call counts; all the same by default.
        halves: of each call's rows, which belong to one half of the conditions: `damping` is what this half needs to tell the
            other one.
    """
    columns, device = student[0].shape[-1], student[0].device
    shares = [every_row(x) for x in student] if row_weights is None else row_weights
    total = torch.stack([share.sum() for share in shares]).sum()
    if not total > 0:  # none of them counts
        return input_statistics(teacher, student)
    teacher_mean, student_mean = (
        (sum(share @ exact(x.reshape(-1, columns)) for share, x in zip(shares, steps, strict=True)) / total).float().to(device)
        for steps in (teacher, student)
    )
    covariance = torch.zeros(columns, columns, device=device)
    mismatch = covariance.clone()
    half = Half(torch.zeros_like(covariance), torch.zeros_like(student_mean), 0.0)
    for number, (share, *pair) in enumerate(zip(shares, teacher, student, strict=True)):
        x, seen = (
            rows.reshape(-1, columns).float() - mean for rows, mean in zip(pair, (teacher_mean, student_mean), strict=True)
        )
        weighted = seen * (share / total).float().to(device).unsqueeze(1)
        covariance.addmm_(weighted.T, seen)
        if teacher is not student:
            mismatch.addmm_((x - seen).T, weighted)
        if halves is not None:
            of_half = halves[number].to(device)
            half = half.with_rows(seen[of_half], weighted[of_half], (share / total).to(device)[of_half].sum().item())
    damping = half.damping_for(covariance) if halves is not None and columns <= MOST_COLUMNS else 0.0
    return InputStatistics(covariance, mismatch, teacher_mean, student_mean, damping)


class Half(NamedTuple):
    """Second moments about the mean of all rows, of half the conditions; their sum, and what part of the weight they have."""

    moments: Float[Tensor, "columns columns"]
    total: Float[Tensor, " columns"]
    share: float

    def with_rows(self, rows: Float[Tensor, "n columns"], weighted: Float[Tensor, "n columns"], share: float) -> Half:
        return Half(self.moments.addmm_(weighted.T, rows), self.total + weighted.sum(0), self.share + share)

    def damping_for(self, covariance: Float[Tensor, "columns columns"]) -> float:
        """What the covariance of this half needs to tell the second moments of the other one."""
        if not 0.01 < self.share < 0.99:
            return 0.0
        mean, other_mean = self.total / self.share, -self.total / (1 - self.share)
        known = self.moments / self.share - torch.outer(mean, mean)
        other = (covariance - self.moments) / (1 - self.share) - torch.outer(other_mean, other_mean)
        return cross_validated_damping(known, other + torch.outer(other_mean - mean, other_mean - mean))


def every_row(inputs: Tensor) -> Float[Tensor, " n"]:
    """All rows of a call's inputs count the same."""
    return torch.ones(inputs.numel() // inputs.shape[-1], dtype=torch.float64, device=exact_device(inputs.device))


def by_halves(inputs: Tensor, weights: Float[Tensor, "2"]) -> Float[Tensor, " n"]:
    """A call's first half of rows counts by one number, the other by another: those with a condition and those with none."""
    count = inputs.numel() // inputs.shape[-1]
    return weights.to(exact_device(inputs.device)).double().repeat_interleave((count + 1) // 2)[:count]


def without_padding(inputs: Tensor, call: DenoiserCall) -> Float[Tensor, " n"]:
    """Tokens that a mask of this call leaves out count nothing: zeros and ones, a number for each of these tokens."""
    rows = every_row(inputs)
    for mask in tensors_of((call.positional, call.named)):
        if mask.ndim == 2 and inputs.ndim == 3 and mask.shape == inputs.shape[:2] and _is_mask(mask):
            rows = rows * mask.flatten().to(rows)
    return rows


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def halves_by_condition(inputs: Tensor, call: DenoiserCall) -> Bool[Tensor, " n"]:
    """Rows in two halves that have no condition in common: every second sample, or where there is one, every second step."""
    rows = inputs.numel() // inputs.shape[-1]
    if call.num_samples == 1 or len(inputs) % call.num_samples:
        return torch.full((rows,), call.step % 2 == 0, device=exact_device(inputs.device))
    first = torch.arange(len(inputs), device=exact_device(inputs.device)) % call.num_samples % 2 == 0
    return first.repeat_interleave(rows // len(inputs))


def cross_validated_damping(covariance: Float[Tensor, "n n"], held_out: Float[Tensor, "n n"]) -> float:
    """λ / mean(diag H) at which H + λ I, known of some conditions, tells most of the second moments of others.

    A few prompts span few directions, and an error is pushed into those that they do not show. A Gaussian of covariance
    H + λ I finds inputs of second moments H' as likely as exp(-½ Σ_i (log(l_i + λ) + q_iᵀ H' q_i / (l_i + λ))) with
    eigenvalues l_i and eigenvectors q_i of H.
    """
    values, vectors = torch.linalg.eigh(covariance)
    moments = ((held_out @ vectors) * vectors).sum(0).double()
    mean = values.double().mean().clamp(min=1e-30)
    spread = values.double().clamp(min=0) + mean * DAMPINGS.to(values.device).unsqueeze(1)
    best = (spread.log() + moments / spread).sum(1).argmin()
    return DAMPINGS[best].item()


def no_statistics(linear: nn.Module) -> InputStatistics:
    """Of a layer that never runs: all inputs count the same."""
    assert is_linear_map(linear)
    device, columns = linear.weight.device, matrix_shape(linear)[1]
    zeros = torch.zeros(columns, device=device)
    return InputStatistics(torch.eye(columns, device=device), torch.zeros(columns, columns, device=device), zeros, zeros)
