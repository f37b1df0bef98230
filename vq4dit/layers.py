"""The lives of a quantized linear layer.

While it is being calibrated as in the paper a layer is *soft*: every sub-vector is a mix of its n candidate codewords, with
ratios that are learned. While it is *tunable*, its assignments are fixed and all else learns. In the end it is *hard*: one
codeword per sub-vector, packed to bytes. Each state is a class of its own; `harden()` leads to the last one.

A hard layer can keep its decoded weight beside the packed bytes (`decode`: as fast as the original) or look the weight up
in every forward pass (`drop_decoded`: as small as the file). The packed tensors are what is saved, always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.codebook import assignment_bits, reconstruct, sum_by_codeword
from vq4dit.errors import FormatError
from vq4dit.packing import pack_bits, packed_size, unpack_bits

MIX_CHUNK = 2**18  # sub-vectors mixed at a time


class VQLinear(nn.Linear):
    """A linear layer whose weight is Ŵ = diag(s) C[A]: codebook, packed assignments, and perhaps a scale per row.

    It is an `nn.Linear` so that PEFT and others find it. `weight` is not stored: reading it decodes the layer and keeps
    the result, so that whatever is written into it (a merged LoRA) is used by `forward`, and noticed when saving.

    codebook (k, d) fp32 holding fp16 values; packed_assignments (bytes,) uint8; row_scale (out_features,) or None. They are
    parameters, not buffers, because that is what offloading moves; none of them takes gradients.
    """

    row_scale: nn.Parameter | None
    decoded_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_codewords: int,
        subvector_dim: int,
        bias: bool = True,
        row_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: there is no weight to make
        self.in_features, self.out_features = in_features, out_features
        count = out_features * in_features // subvector_dim
        size = packed_size(count, assignment_bits(num_codewords))
        self.codebook = _frozen(torch.zeros(num_codewords, subvector_dim, device=device))
        self.packed_assignments = _frozen(torch.zeros(size, dtype=torch.uint8, device=device))
        self.row_scale = _frozen(torch.ones(out_features, device=device)) if row_scale else None
        self.register_buffer("decoded_weight", None, persistent=False)
        bias_values = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", _frozen(bias_values) if bias else None)

    @classmethod
    def from_assignments(
        cls,
        codebook: Float[Tensor, "k d"],
        assignments: Integer[Tensor, " n"],
        shape: tuple[int, int],
        bias: Float[Tensor, " rows"] | None = None,
        row_scale: Float[Tensor, " rows"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> VQLinear:
        """Make a hard layer whose bias is of `dtype`, that of its inputs.

        Codebook, scale and bias are rounded to fp16 values here, so that saving changes nothing.
        """
        layer = cls(
            shape[1],
            shape[0],
            num_codewords=codebook.shape[0],
            subvector_dim=codebook.shape[1],
            bias=bias is not None,
            row_scale=row_scale is not None,
            device=codebook.device,
            dtype=dtype,
        )
        layer.codebook.copy_(codebook.detach().half())
        layer.packed_assignments.copy_(pack_bits(assignments, assignment_bits(len(codebook))))
        if bias is not None:
            layer.bias.data.copy_(bias.detach().half())
        if layer.row_scale is not None and row_scale is not None:
            layer.row_scale.copy_(row_scale.detach().half())
        return layer

    @property
    def num_subvectors(self) -> int:
        return self.out_features * self.in_features // self.codebook.shape[1]

    @property
    def assignments(self) -> Integer[Tensor, " n"]:
        return unpack_bits(self.packed_assignments, assignment_bits(len(self.codebook)), self.num_subvectors)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(s) C[A] in `dtype`, from the packed tensors."""
        shape = (self.out_features, self.in_features)
        if self.row_scale is None:
            return reconstruct(self.codebook.to(dtype), self.assignments, shape)
        return (reconstruct(self.codebook, self.assignments, shape) * self.row_scale.unsqueeze(1)).to(dtype)

    def decode(self, dtype: torch.dtype) -> None:
        """Keep the decoded weight beside the packed one from now on."""
        self.decoded_weight = self.reconstruct(dtype)

    def drop_decoded(self) -> None:
        """Forget the decoded weight; every forward pass looks it up again."""
        self.decoded_weight = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(rows, columns), decoded now and kept."""
        if self.decoded_weight is None:
            self.decode(self.bias.dtype if self.bias is not None else torch.get_default_dtype())
        assert self.decoded_weight is not None
        return self.decoded_weight

    @property
    def is_changed(self) -> bool:
        """Whether somebody wrote into the decoded weight, so that the packed tensors no longer describe the layer."""
        decoded = self.decoded_weight
        return decoded is not None and not torch.equal(decoded, self.reconstruct(decoded.dtype))

    def check(self, name: str) -> None:
        """Raise `FormatError` if an assignment points outside the codebook (possible only if k is no power of two)."""
        if len(self.codebook) != 2 ** assignment_bits(len(self.codebook)):
            largest = int(self.assignments.max())
            if largest >= len(self.codebook):
                raise FormatError(
                    f"{name}: assignment {largest} is outside its codebook of {len(self.codebook)} codewords; "
                    "the file is damaged: download or quantize it again"
                )

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        decoded = self.decoded_weight
        weight = self.reconstruct(input.dtype) if decoded is None else decoded.to(input.dtype)
        return F.linear(input, weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQLinear:
        """Let `.to(dtype)` change the bias and the decoded weight, never the codebook: the file's numbers stay exact."""
        exact = {name: getattr(self, name).data for name in ("codebook", "row_scale") if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                moved.data = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        k, d = self.codebook.shape
        return f"{self.in_features}, {self.out_features}, codebook={k}x{d}, bias={self.bias is not None}"


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class SoftVQLinear(nn.Module):
    """A linear layer during calibration: every sub-vector is a mix of its candidate codewords (eq. 6, 7 of VQ4DiT).

    ŵ_i = Σ_m r_im c(a_im),  r_i = softmax(z_i).  `candidates` a (n, m) are fixed; `codebook` c, `logits` z (n, m) and
    `bias` are learned. A decided sub-vector has logits (0, -inf, ...): its ratios are exactly one-hot and, since a
    softmax passes no gradient there, it stays decided.
    """

    candidates: Tensor

    def __init__(
        self,
        codebook: Float[Tensor, "k d"],
        candidates: Integer[Tensor, "n m"],
        logits: Float[Tensor, "n m"],
        shape: tuple[int, int],
        bias: Float[Tensor, " rows"] | None,
    ):
        super().__init__()
        self.shape = shape
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.logits = nn.Parameter(logits, requires_grad=logits.shape[1] > 1)
        self.bias = nn.Parameter(bias.detach().float().clone()) if bias is not None else None
        self.register_buffer("candidates", candidates)

    @property
    def ratios(self) -> Float[Tensor, "n m"]:
        return ratios_of(self.logits)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        weight = MixCandidates.apply(self.codebook, self.logits, self.candidates).view(self.shape)
        bias = self.bias.to(input.dtype) if self.bias is not None else None
        return F.linear(input, weight.to(input.dtype), bias)

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
        codebook_gradient = torch.zeros(codebook.shape, dtype=torch.float64, device=codebook.device)
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
        return codebook_gradient.to(codebook.dtype), logits_gradient, None


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
