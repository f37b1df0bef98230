"""The Kronecker ratio: how far B ⊗ H is from the Fisher of a layer's weights.

An error E of a weight changes the guided prediction by Σ_t g_tᵀ E x_t, over all tokens t (g and v as in `fisher.py`). Its
square is that of the inner product of E with the weight's gradient G = Σ_t g_t x_tᵀ, and is tr(B E H Eᵀ) on average if tokens
have nothing to do with each other. They have: what all tokens of an image share makes their errors add up (values of attention,
above all in the first block), and other layers' errors cancel. Error feedback leaves errors that are white where B and H are,
so of those, with D the diagonal of B,

    ρ = E ‖D^-½ G H^-½‖² / (E Σ_t g_tᵀ D⁻¹ g_t · mean_t x_tᵀ H⁻¹ x_t)

times as much is seen as tr(B E H Eᵀ) says. ρ is 1 where tokens are independent; on the bundled DiT it lies between .7 and 13.

G is as large as the model, so it is not kept, but a few random combinations of its rows are, y = Gᵀ D^-½ u with signs u:
‖H^-½ y‖² is on average what is asked for, and H may come later. What is known of D so far will do: both parts see the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vq4dit.devices import exact, exact_device
from vq4dit.recipes.gptq import LEAST_SENSITIVITY, damp

SKETCHES = 4  # combinations of rows for each v


class _Sketch(NamedTuple):
    """Of one step and v, as far as it is known: a layer may run more than once in a step."""

    of: tuple[int, int]
    combination: Float[Tensor, "rows sketches"]  # √weight D^-½ u
    gradients: Float[Tensor, "sketches width"]  # Σ_t (uᵀ D^-½ g_t) (x_t, 1)
    power: Float[Tensor, ""]  # Σ_t (uᵀ D^-½ g_t)², over all u


class GradientSketches:
    """What is kept of the gradients of one layer's weight."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.finished: list[Tensor] = []
        self.power: Tensor | float = 0.0
        self._last: _Sketch | None = None

    def hear(
        self,
        inputs: Float[Tensor, "tokens columns"],
        gradient: Float[Tensor, "tokens rows"],
        of: tuple[int, int],
        weight: float,
        diagonal: Float[Tensor, " rows"],
    ) -> None:
        """Inputs and output gradients of one step and v after another.

        Args:
            weight: of this step and v.
            diagonal: D, as far as it is known before.
        """
        last = self._last
        if last is None or last.of != of:
            self._finish()
            signs = torch.randint(2, (len(diagonal), SKETCHES), generator=self.generator).to(gradient) * 2 - 1
            combination = math.sqrt(weight) * white(diagonal).to(signs).unsqueeze(1) * signs
            last = _Sketch(of, combination, gradient.new_zeros(()), gradient.new_zeros(()))
        combined = gradient @ last.combination
        seen = torch.cat([combined.T @ inputs, combined.sum(0).unsqueeze(1)], 1)
        self._last = last._replace(gradients=last.gradients + seen, power=last.power + combined.square().sum())

    def _finish(self) -> None:
        if self._last is not None:
            self.finished.append(self._last.gradients)
            self.power = self.power + self._last.power
        self._last = None

    def found(self) -> Float[Tensor, "n width"] | None:
        """Combinations of rows of G, and then of Σ_t g_t, for Σ_t g_tᵀ D⁻¹ g_t = 1: of width columns + 1.

        None if there are none, or none to trust.
        """
        self._finish()
        if not self.finished:
            return None
        found = torch.cat(self.finished) / torch.as_tensor(self.power).sqrt()
        return found if torch.isfinite(found).all() else None


def white(diagonal: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """D^-½, for a D that is 1 on average, so that the first samples count no more than the last."""
    mean = diagonal.mean()
    return (diagonal / mean + LEAST_SENSITIVITY).rsqrt() if mean > 0 else torch.ones_like(diagonal)


def kronecker_ratio(
    sketches: Float[Tensor, "n width"],
    second_moments: Float[Tensor, "columns columns"],
    mean: Float[Tensor, " columns"] | None,
    damping: float,
) -> float:
    """ρ of a layer; 1 where it cannot be told.

    Args:
        second_moments: H, of the inputs or about their mean.
        mean: of the inputs, if H is about it: a bias makes good what the mean gets wrong.
    """
    device = exact_device(second_moments.device)
    moments, known = exact(second_moments.to(device)), exact(sketches.to(device))
    gradients = known[:, :-1] if mean is None else known[:, :-1] - known[:, -1:] * exact(mean.to(device))
    root, failed = torch.linalg.cholesky_ex(damp(moments, damping))
    white = torch.linalg.solve_triangular(root, gradients.T, upper=False).square().sum()
    expected = torch.cholesky_solve(moments, root).diagonal().sum()  # mean xᵀ (H + λ)⁻¹ x
    ratio = (white / expected).item()
    return ratio if not failed and 0 < ratio < float("inf") else 1.0
