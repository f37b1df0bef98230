"""The Kronecker ratio: how far B ⊗ H is from the Fisher of a layer's weights.

An error E of a weight changes the guided prediction by Σ_t g_tᵀ E x_t, over all tokens t (g and v as in `fisher.py`). Its
square is that of the inner product of E with the weight's gradient G = Σ_t g_t x_tᵀ, and is tr(B E H Eᵀ) on average if tokens
have nothing to do with each other. They have: what all tokens of an image share makes their errors add up (values of attention,
above all in the first block), and other layers' errors cancel. Error feedback leaves errors that are white where B and H are,
so of those, with D the diagonal of B,

    ρ = E ‖D^-½ G H^-½‖² / (E Σ_t g_tᵀ D⁻¹ g_t · mean_t x_tᵀ H⁻¹ x_t)

times as much is seen as tr(B E H Eᵀ) says. ρ is 1 where tokens are independent; on the bundled DiT it lies between .7 and 13.

G is as large as the model, so it is not kept, but a few random combinations of its rows are, y = Gᵀ D^-½ u with signs u:
‖H^-½ y‖² is on average what stands above the line. What stands below is found in the same way, from random combinations of the
same tokens' inputs. H may come later, and what is known of D so far will do: both see the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vq4dit.devices import exact
from vq4dit.recipes.gptq import LEAST_SENSITIVITY, Correction

SKETCHES = 4  # combinations of rows for each v


class _Sketch(NamedTuple):
    """Of one step and v, as far as it is known: a layer may run more than once in a step."""

    of: tuple[int, int]
    combination: Float[Tensor, "rows sketches"]  # √weight D^-½ u
    gradients: Float[Tensor, "sketches width"]  # Σ_t (uᵀ D^-½ g_t) (x_t, 1)
    inputs: Float[Tensor, "sketches width"]  # Σ_t s_t (x_t, 1), with signs s
    power: Float[Tensor, ""]  # Σ_t (uᵀ D^-½ g_t)², on average over u
    tokens: int


class GradientSketches:
    """What is kept of the gradients of one layer's weight."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.finished: list[Tensor] = []
        self._last: _Sketch | None = None

    def hear(
        self,
        inputs: Float[Tensor, "tokens columns"],
        gradient: Float[Tensor, "tokens rows"],
        of: tuple[int, int],
        weight: float,
        diagonal: Float[Tensor, " rows"],
    ) -> None:
        """Inputs and output gradients of one step and v after another; a token without a gradient, padding say, is none.

        Args:
            weight: of this step and v.
            diagonal: D, as far as it is known before.
        """
        is_read, last = gradient.any(1), self._last
        inputs, gradient = inputs[is_read], gradient[is_read]
        if last is None or last.of != of:
            self._finish()
            combination = math.sqrt(weight) * white(diagonal).to(gradient).unsqueeze(1) * self._signs(len(diagonal), gradient)
            nothing = gradient.new_zeros(SKETCHES, inputs.shape[1] + 1)
            last = _Sketch(of, combination, nothing, nothing, gradient.new_zeros(()), 0)
        combined, with_one = gradient @ last.combination, torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        self._last = _Sketch(
            of,
            last.combination,
            last.gradients + combined.T @ with_one,
            last.inputs + self._signs(len(inputs), inputs).T @ with_one,
            last.power + combined.square().sum() / SKETCHES,
            last.tokens + len(inputs),
        )

    def _signs(self, count: int, like: Tensor) -> Float[Tensor, "count sketches"]:
        return torch.randint(2, (count, SKETCHES), generator=self.generator).to(like) * 2 - 1

    def _finish(self) -> None:
        if (last := self._last) is not None:
            self.finished.append(torch.stack([last.gradients, last.inputs * (last.power / max(1, last.tokens)).sqrt()]))
        self._last = None

    def found(self) -> Float[Tensor, "2 n width"] | None:
        """Combinations of rows of G, and of inputs as large as they were if tokens were independent; width: columns + 1.

        None if there are none, or none to trust.
        """
        self._finish()
        found = torch.cat(self.finished, 1) if self.finished else torch.zeros(0)
        return found if found.any() and torch.isfinite(found).all() else None


def white(diagonal: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """D^-½, for a D that is 1 on average, so that the first samples count no more than the last."""
    mean = diagonal.mean()
    return (diagonal / mean + LEAST_SENSITIVITY).rsqrt() if mean > 0 else torch.ones_like(diagonal)


def kronecker_ratio(sketches: Float[Tensor, "2 n width"], columns: Correction, mean: Float[Tensor, " columns"] | None) -> float:
    """ρ of a layer; 1 where it cannot be told.

    Args:
        columns: of H, of the inputs or about their mean.
        mean: of the inputs, if H is about it: a bias makes good what the mean gets wrong.
    """
    known = exact(sketches.to(columns.root.device))
    parts = known[..., :-1] if mean is None else known[..., :-1] - known[..., -1:] * exact(mean)
    ordered = parts[..., columns.order]
    seen, expected = (torch.linalg.solve_triangular(columns.root, part.T, upper=True).square().sum() for part in ordered)
    ratio = (seen / expected).item()
    return ratio if 0 < ratio < float("inf") else 1.0
