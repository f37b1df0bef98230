"""Flow matching towards a set of examples that is known and small.

A model learns the velocity v of the straight line x_σ = (1-σ) x₀ + σ ε from an example x₀ to noise ε. One pair (x₀, ε) of
many that make the same x_σ gives v = ε - x₀, which scatters about all that can be learned, its mean over the examples that
the prompt may mean. With a few thousand examples that mean is known exactly, and learning from it needs fewer steps.
"""

import torch
from torch import Tensor


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """σ (count,): half of them uniform in [0.01, 1], half logit-normal, since the middle is where images take shape."""
    uniform, coin = torch.rand(2, count, generator=generator, device=generator.device)
    middle = torch.randn(count, generator=generator, device=generator.device).sigmoid()
    return torch.where(coin < 0.5, uniform, middle).clamp(min=0.01)


def mean_velocity(noisy: Tensor, sigma: Tensor, examples: Tensor, weights: Tensor, meant: Tensor) -> Tensor:
    """E[ε - x₀ | x_σ] = (x_σ - E[x₀ | x_σ]) / σ, shaped like `noisy` (b, ...).

    `examples` (n, ...) are drawn as often as `weights` (n,) say; of them the prompts mean those in `meant` (b, n) bool.
    """
    flat, level = examples.flatten(1).double(), sigma.unsqueeze(1).double()  # what differs by little is divided by σ²
    near = (1 - level) * (noisy.flatten(1).double() @ flat.T) - (1 - level).square() * flat.square().sum(1) / 2
    likely = (near / level.square() + weights.log()).masked_fill(~meant, -torch.inf).softmax(dim=1)
    return ((noisy.flatten(1) - likely @ flat) / level).view_as(noisy).to(noisy.dtype)
