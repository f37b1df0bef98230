"""A layer while it is tuned: its assignments are fixed, and codebook, row scale and bias learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.codebook import sum_by_codeword
from vq4dit.layers import VQLinear


class TunableVQLinear(nn.Module):
    """A layer whose assignments are fixed, while codebook, row scale and bias learn: Ŵ = diag(s) C[A].

    codebook (k, d), row_scale (rows,), bias (rows,) or None: fp32 parameters; assignments (n,).
    """

    assignments: Tensor

    def __init__(self, layer: VQLinear):
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        scale = layer.row_scale if layer.row_scale is not None else torch.ones(layer.out_features, device=layer.codebook.device)
        self.codebook = nn.Parameter(layer.codebook.detach().clone())
        self.row_scale = nn.Parameter(scale.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().float().clone()) if layer.bias is not None else None
        self.register_buffer("assignments", layer.assignments)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        weight = LookUp.apply(self.codebook, self.assignments).view(self.shape) * self.row_scale.unsqueeze(1)
        bias = self.bias.to(input.dtype) if self.bias is not None else None
        return F.linear(input, weight.to(input.dtype), bias)

    @torch.no_grad()
    def harden(self, dtype: torch.dtype = torch.float32) -> VQLinear:
        """The packed layer; `dtype` is that of its inputs."""
        return VQLinear.from_assignments(self.codebook, self.assignments, self.shape, self.bias, self.row_scale, dtype=dtype)


class LookUp(torch.autograd.Function):
    """ŵ_i = c(a_i);  ∂L/∂c(a) = Σ_{i: a_i = a} ∂L/∂ŵ_i, added up in a fixed order."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, assignments: Tensor) -> Tensor:
        ctx.save_for_backward(assignments)
        ctx.num_codewords = len(codebook)
        return codebook.index_select(0, assignments.int())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (assignments,) = ctx.saved_tensors
        return sum_by_codeword(gradient, assignments, ctx.num_codewords).to(gradient.dtype), None
