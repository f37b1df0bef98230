"""Joint descent: let the errors of different outputs of a layer cancel each other.

Error feedback (`vq4dit/error_feedback.py`) takes every output of a layer for itself. But what is behind the layer sees all of
them at once, and most directions of its output hardly matter: a DiT reads a few numbers per token out of a wide residual
stream. With E = W - Ŵ, input moments H = E[x xᵀ] and output moments B = E[g gᵀ] of the gradients g of the guided noise
(`vq4dit/sensitivity.py`), the error that the noise shows is about

    tr(B E H Eᵀ)                              (the Kronecker-factored curvature of K-FAC, arXiv:1503.05671)

and what one output gets wrong can be made good by others that are read along with it (YAQA, arXiv:2505.22988, does so by
feedback, with scalars and trellises). Here assignments are decided by coordinate descent. All sub-vectors on an anti-diagonal,
one per row and each of another column group, are decided at a time; they hardly meet, and where they do, the wave is split in
two until the error falls. Codebook and row scales are the least squares of the same error, so no step can raise it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.codebook import argmax_of_rows, assignment_dtype, reconstruct
from vq4dit.error_feedback import QuantizedWeight, damp, least_squares_codebook, quantize_weight

COUPLING_DAMPING = 0.2  # of the mean of B's diagonal: B is known from few latents, and 0.02 follows their noise
SEPARATE_DESCENT_ROUNDS = 2  # outputs each for itself, as a start
JOINT_ROUNDS = 4


def quantize_jointly(
    weight: Float[Tensor, "rows columns"],
    second_moments: Float[Tensor, "columns columns"],
    coupling: Float[Tensor, "rows rows"],
    num_codewords: int,
    subvector_dim: int,
    *,
    generator: torch.Generator,
) -> QuantizedWeight:
    """Minimise tr(B (W - Ŵ) H (W - Ŵ)ᵀ) over assignments, codebook and scales in turn, from where `quantize_weight` ends.

    Args:
        coupling: B, the second moments of the gradients of the layer's outputs.
    """
    weight = weight.float()
    shape = (weight.shape[0], weight.shape[1])
    quantized = quantize_weight(
        weight,
        second_moments,
        num_codewords,
        subvector_dim,
        sensitivity=coupling.diagonal() / coupling.diagonal().mean(),
        descent_rounds=SEPARATE_DESCENT_ROUNDS,
        generator=generator,
    )
    damped, coupling = damp(second_moments.float()), damp(coupling.float(), COUPLING_DAMPING)
    for _ in range(JOINT_ROUNDS):
        assignments = JointDescent(weight, quantized, damped, coupling).run()
        codebook = least_squares_codebook(weight, quantized.row_scale, coupling, assignments, quantized.codebook, damped)
        scale = joint_scale(weight, reconstruct(codebook, assignments, shape), damped, coupling)
        quantized = QuantizedWeight(codebook, assignments, scale if (scale > 0).all() else quantized.row_scale)
    return quantized


class JointDescent:
    """One pass over all sub-vectors of a weight, and what must be kept up to date on the way."""

    def __init__(
        self,
        weight: Float[Tensor, "rows columns"],
        quantized: QuantizedWeight,
        damped: Float[Tensor, "columns columns"],
        coupling: Float[Tensor, "rows rows"],
    ):
        rows, columns = weight.shape
        self.codebook, self.scale, self.coupling = quantized.codebook, quantized.row_scale.unsqueeze(1), coupling
        dim = self.codebook.shape[1]
        self.rows, self.groups = rows, columns // dim
        self.current = quantized.weight((rows, columns)).view(rows, self.groups, dim)
        self.chosen = quantized.assignments.long().view(rows, self.groups).clone()
        error = weight - self.current.view(rows, columns)
        self.image = (coupling @ error @ damped).view(rows, self.groups, dim)  # B E H
        self.moments = damped.view(self.groups, dim, columns)  # H, the rows of each group
        every = torch.arange(self.groups, device=weight.device)
        self.own_moments = self.moments.view(self.groups, dim, self.groups, dim)[every, :, every]  # H_gg
        codeword_power = torch.einsum("kd,gde,ke->gk", self.codebook, self.own_moments, self.codebook)
        self.half_power = codeword_power / 2

    def run(self) -> Integer[Tensor, " n"]:
        """Decide every sub-vector once; the assignments, row by row."""
        for diagonal in range(self.rows + self.groups - 1):
            first, stop = max(0, diagonal - self.rows + 1), min(self.groups, diagonal + 1)
            group = torch.arange(first, stop, device=self.chosen.device)
            self._decide(diagonal - group, group)
        return self.chosen.flatten().to(assignment_dtype(len(self.codebook)))

    def _decide(self, row: Integer[Tensor, " w"], group: Integer[Tensor, " w"]) -> None:
        """Give sub-vectors of different rows and groups their best codeword, as if all others stayed.

        The best real-valued sub-vector is ŵ + (B E H)_rg H_gg⁻¹ / B_rr; a codeword q costs || (that - s q) H_gg^½ ||² more.
        """
        scale, own = self.scale[row], self.own_moments[group]
        before = self.current[row, group]
        pull = self.image[row, group]
        wanted = torch.bmm(before.unsqueeze(1), own)[:, 0] + pull / self.coupling[row, row].unsqueeze(1)
        best = argmax_of_rows((wanted / scale) @ self.codebook.T - self.half_power[group])
        changed = (best != self.chosen[row, group]).nonzero()[:, 0]
        if not len(changed):
            return
        row, group, best = row[changed], group[changed], best[changed]
        after = self.codebook[best] * self.scale[row]
        moved = after - before[changed]
        spread = torch.bmm(moved.unsqueeze(1), self.moments[group])[:, 0]  # (w, columns): each move times H
        meeting = spread.view(len(row), self.groups, -1)[:, group].mul(moved).sum(2) * self.coupling[row][:, row]
        gain = 2 * (moved * pull[changed]).sum()  # the error falls by this much less `meeting`, of which the diagonal
        alone, together = gain - meeting.diagonal().sum(), gain - meeting.sum()  # is what each move costs by itself
        if len(row) > 1 and together < alone / 2:
            self._decide(row[::2], group[::2])
            self._decide(row[1::2], group[1::2])
            return
        self.chosen[row, group] = best
        self.current[row, group] = after
        self.image.view(self.rows, -1).addmm_(self.coupling[:, row], spread, alpha=-1)


def joint_scale(
    weight: Float[Tensor, "rows columns"],
    unscaled: Float[Tensor, "rows columns"],
    damped: Float[Tensor, "columns columns"],
    coupling: Float[Tensor, "rows rows"],
) -> Float[Tensor, " rows"]:
    """The scales s of all rows that minimise tr(B E H Eᵀ): (B ∘ Q H Qᵀ) s = diag(B W H Qᵀ), with Ŵ = diag(s) Q."""
    normal_matrix = (coupling * (unscaled @ damped @ unscaled.T)).double()
    target = (coupling @ (weight @ damped) * unscaled).sum(1).double()
    return torch.linalg.solve(damp(normal_matrix, 1e-6), target).float()
