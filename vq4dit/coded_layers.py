"""A linear layer of entropy-coded integers: what the recipe `best` makes.

Its weight is a rounded one, in steps of a size of their own for each row and each column. Where an error hardly matters the
steps are large, most integers are 0, and their code (`vq4dit/entropy_coding.py`) takes next to nothing; where it matters,
a weight may take five bits. This is entropy-constrained quantization (Chou, Lookabaugh and Gray 1989) on the lattice of
integers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.entropy_coding import decode, encode, estimate_levels
from vq4dit.errors import FormatError
from vq4dit.layers import PackedLinear, frozen


class EntropyCodedLinear(PackedLinear):
    """A linear layer whose weight is Ŵ = diag(r) Z diag(c), Z integers.

    coded_integers (bytes,) uint8; row_scale r (rows,) and column_scale c (columns,) fp32 holding fp16 values; row_level (rows,)
    and column_level (columns,) uint8: how large integers are expected to be.

    Without a decoded weight the stream is decoded in every forward pass: as small as the file, but 40 ns a weight on one core.
    """

    EXACT = ("row_scale", "column_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_bytes: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.coded_integers = frozen(torch.zeros(num_bytes, dtype=torch.uint8, device=device))
        self.row_scale = frozen(torch.ones(out_features, device=device))
        self.column_scale = frozen(torch.ones(in_features, device=device))
        self.row_level = frozen(torch.zeros(out_features, dtype=torch.uint8, device=device))
        self.column_level = frozen(torch.zeros(in_features, dtype=torch.uint8, device=device))

    @classmethod
    def from_integers(
        cls,
        integers: Integer[Tensor, "rows columns"],
        row_scale: Float[Tensor, " rows"],
        column_scale: Float[Tensor, " columns"],
        bias: Float[Tensor, " rows"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> EntropyCodedLinear:
        """Make a layer whose bias is of `dtype`, that of its inputs.

        Scales and bias are rounded to fp16 values here, so that saving changes nothing.
        """
        row_level, column_level = estimate_levels(integers)
        stream = encode(integers, row_level, column_level)
        rows, columns = integers.shape
        layer = cls(columns, rows, num_bytes=len(stream), bias=bias is not None, device=integers.device, dtype=dtype)
        layer.coded_integers.copy_(stream)
        layer.row_level.copy_(row_level)
        layer.column_level.copy_(column_level)
        layer.row_scale.copy_(row_scale.detach().half())
        layer.column_scale.copy_(column_scale.detach().half())
        if bias is not None:
            layer.bias.data.copy_(bias.detach().half())
        return layer

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> EntropyCodedLinear:
        """The layer of a state dict; its bias in `dtype`."""
        rows, columns = len(tensors["row_scale"]), len(tensors["column_scale"])
        stream = tensors["coded_integers"]
        layer = cls(columns, rows, num_bytes=len(stream), bias="bias" in tensors, device=stream.device, dtype=dtype)
        layer.load_state_dict(tensors)
        return layer

    @property
    @torch.compiler.disable
    def integers(self) -> Integer[Tensor, "rows columns"]:
        return decode(self.coded_integers, self.row_level, self.column_level)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(r) Z diag(c) in `dtype`, from the packed tensors."""
        return (self.integers * self.row_scale.unsqueeze(1) * self.column_scale).to(dtype)

    def decode(self, dtype: torch.dtype, name: str = "a layer") -> None:
        """Keep the decoded weight from now on; what decodes is not damaged."""
        try:
            self.decoded_weight = self.reconstruct(dtype)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error

    def check(self, name: str) -> None:
        """Raise `FormatError` if the stream does not hold the layer's integers; costs as much as decoding, so that does too."""
        if self.decoded_weight is None:
            self.decode(torch.float32, name)
            self.drop_decoded()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bytes={len(self.coded_integers)}, bias={self.bias is not None}"


def coded_layers(model: nn.Module) -> dict[str, EntropyCodedLinear]:
    """The entropy-coded layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, EntropyCodedLinear)}
