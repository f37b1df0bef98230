"""A layer while it is calibrated as in the paper: every sub-vector is a mix of its n candidate codewords, with learned ratios.

More and more sub-vectors are decided on the way (`freeze_decided`); in the end the largest ratio wins (`harden`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.devices import exact_device
from vq4dit.layers.codebook import join_subvectors, sum_by_codeword
from vq4dit.layers.linear_maps import LAST, multiply
from vq4dit.layers.vector import VQLinear

MIX_CHUNK = 2**18  # sub-vectors mixed at a time


class SoftVQLinear(nn.Module):
    """A linear layer during calibration: every sub-vector is a mix of its candidate codewords (eq. 6, 7 of VQ4DiT).

    ŵ_i = Σ_m r_im c(a_im),  r_i = softmax(z_i).  `candidates` a (n, m) are fixed; `codebook` c, `logits` z (n, m) and
    `bias` are learned. A decided sub-vector has logits (0, -inf, ...): its ratios are exactly one-hot and, since a
    softmax passes no gradient there, it stays decided.
    """

    candidates: Tensor
    channel_dim: int = LAST  # of its inputs

    def __init__(
        self,
        codebook: Float[Tensor, "k d"],
        candidates: Integer[Tensor, "n m"],
        logits: Float[Tensor, "n m"],
        shape: tuple[int, int],
        bias: Float[Tensor, " rows"] | None,
    ):
        super().__init__()
        self.shape = self.out_features, self.in_features = shape
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.logits = nn.Parameter(logits, requires_grad=logits.shape[1] > 1)
        self.bias = nn.Parameter(bias.detach().float().clone()) if bias is not None else None
        self.register_buffer("candidates", candidates)

    @property
    def ratios(self) -> Float[Tensor, "n m"]:
        return ratios_of(self.logits)

    def forward(self, input: Tensor) -> Tensor:
        weight = join_subvectors(MixCandidates.apply(self.codebook, self.logits, self.candidates), self.shape)
        bias = self.bias.to(input.dtype) if self.bias is not None else None
        return multiply(input, weight.to(input.dtype), bias, self.channel_dim)

    @torch.no_grad()
    def freeze_decided(self, threshold: float, fraction: float = 0.0) -> None:
        """Progressive hardening: decided sub-vectors take their likeliest candidate for good.

        Decided are those whose largest ratio exceeds `threshold`, and in any case that `fraction` of all sub-vectors whose
        largest ratios are highest.
        """
        if self.logits.shape[1] == 1:
            return
        largest, winner = self.ratios.T.contiguous().max(dim=0)
        decided = largest > threshold
        if count := int(fraction * len(largest)):
            decided |= largest >= largest.kthvalue(len(largest) - count + 1).values
        one_hot = torch.full_like(self.logits, -torch.inf).scatter_(1, winner.unsqueeze(1), 0.0)
        self.logits.copy_(torch.where(decided.unsqueeze(1), one_hot, self.logits))

    @property
    def decided_fraction(self) -> float:
        """Part of the sub-vectors that are decided."""
        if self.logits.shape[1] == 1:
            return 1.0
        return torch.isneginf(self.logits).T.contiguous().any(dim=0).float().mean().item()

    @torch.no_grad()
    def harden(self, dtype: torch.dtype = torch.float32) -> VQLinear:
        """The largest ratio wins; `dtype` is that of the layer's inputs."""
        winner = self.logits.argmax(dim=1, keepdim=True)
        assignments = self.candidates.gather(1, winner)[:, 0]
        return VQLinear.from_assignments(self.codebook, assignments, self.shape, self.bias, dtype=dtype)


def ratios_of(logits: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """r = softmax(z) over the candidates. Transposed inside: a softmax over a last axis of length 2 is 25 times slower."""
    return logits.T.contiguous().softmax(dim=0).T


class MixCandidates(torch.autograd.Function):
    """ŵ_i = Σ_m softmax(z_i)_m c(a_im), remembering only logits and candidates: the codewords are looked up again.

    With g_i = ∂L/∂ŵ_i:   ∂L/∂c(a) = Σ_{i,m: a_im = a} r_im g_i,   ∂L/∂z_im = r_im (g_i·c(a_im) - Σ_l r_il g_i·c(a_il)).
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, logits: Tensor, candidates: Tensor) -> Tensor:
        ctx.save_for_backward(codebook, logits, candidates)
        mixed = torch.empty(len(logits), codebook.shape[1], dtype=codebook.dtype, device=codebook.device)
        chunks = zip(mixed.split(MIX_CHUNK), candidates.split(MIX_CHUNK), logits.split(MIX_CHUNK), strict=True)
        for part, a, z in chunks:
            ratios = ratios_of(z)
            part.zero_()
            for m in range(a.shape[1]):
                part.addcmul_(ratios[:, m : m + 1], codebook.index_select(0, a[:, m].int()))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        codebook, logits, candidates = ctx.saved_tensors
        codebook_gradient = torch.zeros(codebook.shape, dtype=torch.float64, device=exact_device(codebook.device))
        logits_gradient = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        parts = gradient if logits_gradient is None else logits_gradient
        for g, a, z, out in zip(
            gradient.split(MIX_CHUNK), candidates.split(MIX_CHUNK), logits.split(MIX_CHUNK), parts.split(MIX_CHUNK), strict=True
        ):
            ratios = ratios_of(z)
            alignment = torch.empty_like(ratios)  # g_i · c(a_im)
            for m in range(a.shape[1]):
                codebook_gradient += sum_by_codeword(ratios[:, m : m + 1] * g, a[:, m], len(codebook))
                alignment[:, m] = (g * codebook.index_select(0, a[:, m].int())).sum(1)
            if logits_gradient is not None:
                out.copy_(ratios * (alignment - (ratios * alignment).sum(1, keepdim=True)))
        return codebook_gradient.to(codebook.dtype).to(codebook.device), logits_gradient, None


def start_logits(
    subvectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], candidates: Integer[Tensor, "n m"], start: str
) -> Float[Tensor, "n m"]:
    """Ratios before the first step: "uniform" r = 1/m (the paper) or "distance" r ∝ 1 / distance (the released code)."""
    logits = torch.zeros(candidates.shape, device=subvectors.device)
    if start == "uniform":
        return logits
    if start != "distance":
        raise ValueError(f'ratio start must be "uniform" or "distance", got {start!r}')
    for m in range(candidates.shape[1]):
        offsets = subvectors.float() - codebook.index_select(0, candidates[:, m].int())
        logits[:, m] = -offsets.norm(dim=1).clamp(min=1e-12).log()
    return logits
