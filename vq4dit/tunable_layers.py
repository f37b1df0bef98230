"""A layer while it is tuned: its integers are fixed, and their scales and the bias learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.coded_layers import EntropyCodedLinear


class TunableLinear(nn.Module):
    """A layer whose integers Z are fixed: Ŵ = diag(g r) Z diag(h c), where the gains g and h (1 at first) and the bias learn.

    row_gain (rows,), column_gain (columns,), bias (rows,) or None: fp32 parameters.
    """

    integers: Tensor
    scaled: Tensor  # diag(r) Z diag(c)

    def __init__(self, layer: EntropyCodedLinear):
        super().__init__()
        self.row_scale, self.column_scale = layer.row_scale.detach().clone(), layer.column_scale.detach().clone()
        self.row_gain = nn.Parameter(torch.ones_like(self.row_scale))
        self.column_gain = nn.Parameter(torch.ones_like(self.column_scale))
        self.bias = nn.Parameter(layer.bias.detach().float().clone()) if layer.bias is not None else None
        integers = layer.integers  # decoded once: that takes longer than all else here
        self.register_buffer("integers", integers)
        self.register_buffer("scaled", integers * self.row_scale.unsqueeze(1) * self.column_scale)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        output = F.linear(input.float() * self.column_gain, self.scaled) * self.row_gain
        return (output if self.bias is None else output + self.bias).to(input.dtype)

    @torch.no_grad()
    def harden(self, dtype: torch.dtype = torch.float32) -> EntropyCodedLinear:
        """The packed layer; `dtype` is that of its inputs."""
        row_scale, column_scale = self.row_scale * self.row_gain, self.column_scale * self.column_gain
        return EntropyCodedLinear.from_integers(self.integers, row_scale, column_scale, self.bias, dtype)
