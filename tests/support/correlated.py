"""Inputs and gradients like those in a transformer, for layers that are rounded."""

import torch


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Second moments of vectors of which a few directions hold most of the power, like those in a transformer."""
    mixing = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1).unsqueeze(1)
    vectors = torch.randn(count, width, generator=generator) @ mixing
    return vectors.T @ vectors / count
