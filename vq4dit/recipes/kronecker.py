"""The Kronecker ratio: how far B ⊗ H is from the Fisher of a layer's weights.

An error E of a weight changes the guided prediction by Σ_t g_tᵀ E x_t, over all tokens t (g and v as in `fisher.py`). Its
square is that of the inner product of E with the weight's gradient G = Σ_t g_t x_tᵀ, and is tr(B E H Eᵀ) on average if tokens
have nothing to do with each other. They have: what all tokens of an image share makes their errors add up (values of attention,
above all in the first block), and other layers' errors cancel. Error feedback leaves errors that are white where B and H are,
so of those

    ρ = E ‖B^-½ G H^-½‖² / (E Σ_t g_tᵀ B⁻¹ g_t · mean_t x_tᵀ H⁻¹ x_t)

times as much is seen as tr(B E H Eᵀ) says. ρ is 1 where tokens are independent; on the bundled DiT it lies between .6 and 12.
The first half of a pass teaches B and H, the second half is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vq4dit.config import EntropyCodingConfig
from vq4dit.devices import exact
from vq4dit.recipes.gptq import damp, damp_coupling


class _Gradient(NamedTuple):
    """G of one v, as far as it is known: a layer may run more than once in a step."""

    of: tuple[int, int]  # step and v
    weight: float
    gradient: Float[Tensor, "rows columns"]  # B^-½ G H^-½
    outputs: Float[Tensor, ""]  # Σ_t gᵀ B⁻¹ g
    inputs: Float[Tensor, ""]  # Σ_t xᵀ H⁻¹ x
    tokens: int

    def plus(self, other: _Gradient) -> _Gradient:
        """The same with more tokens."""
        gradient, outputs, inputs = (a + b for a, b in zip(self[2:5], other[2:5], strict=True))
        return self._replace(gradient=gradient, outputs=outputs, inputs=inputs, tokens=self.tokens + other.tokens)


class KroneckerRatio:
    """ρ of one layer.

    Args:
        has_bias: then H is about the mean of the inputs, as a bias makes good what that gets wrong.
    """

    def __init__(self, has_bias: bool, config: EntropyCodingConfig):
        self.has_bias, self.config = has_bias, config
        self.moments: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.tokens = 0
        self.seen = self.expected = 0.0
        self._learns = True
        self._roots: tuple[Tensor, Tensor, Tensor] | None = None
        self._gradient: _Gradient | None = None

    def hear(
        self,
        inputs: Float[Tensor, "tokens columns"],
        gradient: Float[Tensor, "tokens rows"],
        of: tuple[int, int],
        weight: float,
    ) -> None:
        """Inputs and output gradients of one step and v after another."""
        if self._learns:
            self._learn(inputs)
        elif self._roots is not None:
            self._measure(*self._roots, inputs, gradient, of, weight)

    def _learn(self, inputs: Tensor) -> None:
        self.moments = self.moments + inputs.T @ inputs
        self.total = self.total + inputs.sum(0)
        self.tokens += len(inputs)

    def whiten(self, sensitivity: Float[Tensor, "rows rows"]) -> None:
        """The first half is over: this B was found in it, and the inputs that were heard tell H."""
        self._learns = False
        if not self.tokens:
            return
        mean, moments = (exact(torch.as_tensor(known)) / self.tokens for known in (self.total, self.moments))
        mean = mean if self.has_bias else torch.zeros_like(mean)
        of_inputs = damp(moments - torch.outer(mean, mean), self.config.damping)
        of_outputs = damp_coupling(exact(sensitivity), self.config.coupling_damping)
        roots, failures = zip(*(torch.linalg.cholesky_ex(metric) for metric in (of_outputs, of_inputs)), strict=True)
        if not any(failures):
            of_outputs, of_inputs, mean = (known.float().to(sensitivity.device) for known in (*roots, mean))
            self._roots = of_outputs, of_inputs, mean
        self.moments = self.total = 0.0

    def _measure(
        self,
        of_outputs: Tensor,
        of_inputs: Tensor,
        mean: Tensor,
        inputs: Tensor,
        gradient: Tensor,
        of: tuple[int, int],
        weight: float,
    ) -> None:
        g = torch.linalg.solve_triangular(of_outputs, gradient.T, upper=False)
        x = torch.linalg.solve_triangular(of_inputs, (inputs - mean).T, upper=False)
        found = _Gradient(of, weight, g @ x.T, g.square().sum(), x.square().sum(), len(inputs))
        if self._gradient is not None and self._gradient.of == of:
            found = self._gradient.plus(found)
        else:
            self._count()
        self._gradient = found

    def _count(self) -> None:
        if (found := self._gradient) is not None:
            self.seen += found.weight * found.gradient.square().sum().item()
            self.expected += found.weight * (found.outputs * found.inputs).item() / found.tokens
        self._gradient = None

    def value(self) -> float:
        """ρ; 1 where nothing was measured."""
        self._count()
        ratio = self.seen / self.expected if self.expected > 0 else 1.0
        return ratio if 0 < ratio < float("inf") else 1.0
