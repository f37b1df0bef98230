"""Quantized linear layers as they are used and saved: packed to bytes.

Here is the vector-quantized one, a codeword per sub-vector; that of entropy-coded integers is in `vq4dit/coded_layers.py`.

While it is calibrated as in the paper a layer lives in another state, a class of its own: *soft* (`vq4dit/soft_layers.py`).
Its `harden()` leads here.

A hard layer can keep its decoded weight beside the packed bytes (`decode`: as fast as the original) or look the weight up
in every forward pass (`drop_decoded`: as small as the file). The packed tensors are what is saved, always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.codebook import assignment_bits, reconstruct
from vq4dit.errors import FormatError
from vq4dit.packing import pack_bits, packed_size, unpack_bits


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held as packed tensors, those of the file, and decoded from them.

    It is an `nn.Linear` so that PEFT and others find it. `weight` is not stored: reading it decodes the layer and keeps
    the result, so that whatever is written into it (a merged LoRA) is used by `forward`, and noticed when saving.

    Packed tensors are parameters, not buffers, because that is what offloading moves; none of them takes gradients.
    """

    EXACT: tuple[str, ...]  # names of packed tensors that are fp32 holding fp16 values: `.to(dtype)` leaves them alone
    decoded_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: there is no weight to make
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("decoded_weight", None, persistent=False)
        bias_values = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", frozen(bias_values) if bias else None)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ in `dtype`, from the packed tensors."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Raise `FormatError` if the packed tensors hold no weight."""
        raise NotImplementedError

    def decode(self, dtype: torch.dtype, name: str = "a layer") -> None:
        """Keep the decoded weight beside the packed one from now on; a `FormatError` tells the layer's name."""
        self.check(name)
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

    @property
    def bits_per_weight(self) -> float:
        """Of all packed tensors in the file: codebook and scales count, the bias does not."""
        packed = {name: p for name, p in self.named_parameters() if name != "bias"}
        num_bytes = sum(p.numel() * (2 if name in self.EXACT else 1) for name, p in packed.items())
        return 8 * num_bytes / (self.in_features * self.out_features)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        decoded = self.decoded_weight
        weight = self.reconstruct(input.dtype) if decoded is None else decoded.to(input.dtype)
        return F.linear(input, weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Let `.to(dtype)` change the bias and the decoded weight, never codebooks and scales: the file's numbers are exact."""
        exact = {name: getattr(self, name).data for name in self.EXACT if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                moved.data = before.to(moved.device)
        return self


class VQLinear(PackedLinear):
    """A linear layer whose weight is Ŵ = diag(s) C[A]: codebook, packed assignments, and perhaps a scale per row.

    codebook (k, d) fp32 holding fp16 values; packed_assignments (bytes,) uint8; row_scale (out_features,) or None.
    """

    EXACT = ("codebook", "row_scale")
    row_scale: nn.Parameter | None

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
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        count = out_features * in_features // subvector_dim
        size = packed_size(count, assignment_bits(num_codewords))
        self.codebook = frozen(torch.zeros(num_codewords, subvector_dim, device=device))
        self.packed_assignments = frozen(torch.zeros(size, dtype=torch.uint8, device=device))
        self.row_scale = frozen(torch.ones(out_features, device=device)) if row_scale else None

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

    def check(self, name: str) -> None:
        """Raise `FormatError` if an assignment points outside the codebook (possible only if k is no power of two)."""
        if len(self.codebook) != 2 ** assignment_bits(len(self.codebook)):
            largest = int(self.assignments.max())
            if largest >= len(self.codebook):
                raise FormatError(
                    f"{name}: assignment {largest} is outside its codebook of {len(self.codebook)} codewords; "
                    "the file is damaged: download or quantize it again"
                )

    def extra_repr(self) -> str:
        k, d = self.codebook.shape
        return f"{self.in_features}, {self.out_features}, codebook={k}x{d}, bias={self.bias is not None}"


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
