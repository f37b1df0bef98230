"""Quantized linear layers as they are used and saved: packed to bytes (`vq4dit/layers/packed.py`).

Here is the vector-quantized one, a codeword per sub-vector; that of entropy-coded integers is in
`vq4dit/layers/entropy_coded.py`. While it is calibrated as in the paper a layer lives in another state, a class of its own:
*soft* (`vq4dit/recipes/soft_layers.py`). Its `harden()` leads here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.errors import FormatError
from vq4dit.layers.bitstream import pack_bits, packed_size, unpack_bits
from vq4dit.layers.casts import as_bytes, as_scales
from vq4dit.layers.codebook import assignment_bits, num_subvectors, reconstruct
from vq4dit.layers.packed import PackedLinear, check_weight
from vq4dit.layers.watched import frozen


class VQLinear(PackedLinear):
    """A linear layer whose weight is Ŵ = diag(s) C[A]: codebook, packed assignments, and perhaps a scale per row.

    codebook (k, d) fp32 holding fp16 values; packed_assignments (bytes,) uint8; row_scale (out_features,) or None.
    """

    EXACT = ("codebook", "row_scale")
    BYTES = ("packed_assignments",)
    FIRST_VERSION = 1
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
        size = packed_size(num_subvectors((out_features, in_features), subvector_dim), assignment_bits(num_codewords))
        self.codebook = frozen(torch.zeros(num_codewords, subvector_dim, dtype=torch.float32, device=device))
        self.packed_assignments = frozen(torch.zeros(size, dtype=torch.uint8, device=device))
        self.row_scale = frozen(torch.ones(out_features, dtype=torch.float32, device=device)) if row_scale else None

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
        return num_subvectors((self.out_features, self.in_features), self.codebook.shape[1])

    @property
    def assignments(self) -> Integer[Tensor, " n"]:
        packed = as_bytes(self.packed_assignments, "packed_assignments")
        return unpack_bits(packed, assignment_bits(len(self.codebook)), self.num_subvectors)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(s) C[A] in `dtype`, from the packed tensors."""
        shape, codebook = (self.out_features, self.in_features), as_scales(self.codebook, "codebook")
        if self.row_scale is None:
            return reconstruct(codebook.to(dtype), self.assignments, shape)
        return (reconstruct(codebook, self.assignments, shape) * as_scales(self.row_scale, "row_scale").unsqueeze(1)).to(dtype)

    def check(self, name: str) -> None:
        """Raise `FormatError` if an assignment points outside the codebook (possible only if k is no power of two).

        Or if codewords, scaled, are larger than the type of the weight can tell.
        """
        if len(self.codebook) != 2 ** assignment_bits(len(self.codebook)):
            largest = int(self.assignments.max())
            if largest >= len(self.codebook):
                raise FormatError(
                    f"{name}: assignment {largest} is outside its codebook of {len(self.codebook)} codewords; "
                    "the file is damaged: download or quantize it again"
                )

        largest_scale = 1.0 if self.row_scale is None else self.row_scale.abs().max().item()
        if not self.codebook.abs().max().item() * largest_scale <= torch.finfo(self.dtype).max:
            check_weight(self.numbers(), name)

    def extra_repr(self) -> str:
        k, d = self.codebook.shape
        return f"{self.in_features}, {self.out_features}, codebook={k}x{d}, bias={self.bias is not None}"
