"""A linear layer of entropy-coded integers: what the recipe `best` makes.

Its weight is a rounded one, in steps of a size of their own for each row and each column. Where an error hardly matters the
steps are large, most integers are 0, and their code (`vq4dit/layers/ans.py`) takes next to nothing; where it matters,
a weight may take five bits. This is entropy-constrained quantization (Chou, Lookabaugh and Gray 1989) on the lattice of
integers.

Steps are told in eighths of an octave: 2^((k - 128) / 8). That no size lies further than a sixteenth of an octave from the one
that was wanted costs a quarter of a percent of the error, and half of the bytes that a 16-bit number takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from vq4dit.devices import exact
from vq4dit.errors import FormatError
from vq4dit.layers.ans import Sides, encode, estimate_levels
from vq4dit.layers.casts import as_bytes
from vq4dit.layers.packed import PackedLinear, check_weight
from vq4dit.layers.watched import frozen

STEPS_PER_OCTAVE = 8
STEP_OF_ONE = 128
STEP_SIZES = np.exp2((np.arange(256) - STEP_OF_ONE) / STEPS_PER_OCTAVE).astype(np.float32)


def nearest_step(scale: Float[Tensor, " n"]) -> UInt8[Tensor, " n"]:
    """k such that 2^((k - 128) / 8) is nearest to each positive scale."""
    return (STEPS_PER_OCTAVE * exact(scale).log2() + STEP_OF_ONE).round().clamp(0, 255).to(torch.uint8).to(scale.device)


def step_size(step: UInt8[Tensor, " n"]) -> Float[Tensor, " n"]:
    """2^((k - 128) / 8), rounded to fp32 from double precision; looked up, so that every device gives the same bits."""
    return torch.from_numpy(STEP_SIZES).to(step.device)[step.long()]


class EntropyCodedLinear(PackedLinear):
    """A linear layer whose weight is Ŵ = diag(r) Z diag(c), Z integers.

    coded_integers (bytes,) uint8: Z, and before it the steps and levels of rows and columns; side_models (4, 2) uint8: how
    those are coded.

    Without a decoded weight the stream is decoded in every forward pass: as small as the file, but 10 ns a weight on one core.
    """

    EXACT = ()
    BYTES = ("coded_integers", "side_models")

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
        self.side_models = frozen(torch.zeros(len(Sides._fields), 2, dtype=torch.uint8, device=device))

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

        Scales are rounded to steps and the bias to fp16 values here, so that saving changes nothing.
        """
        row_level, column_level = estimate_levels(integers)
        sides = Sides(nearest_step(row_scale.detach()), row_level, nearest_step(column_scale.detach()), column_level)
        stream, side_models = encode(integers, sides)
        rows, columns = integers.shape
        layer = cls(columns, rows, num_bytes=len(stream), bias=bias is not None, device=integers.device, dtype=dtype)
        layer.coded_integers.copy_(stream)
        layer.side_models.copy_(side_models)
        if bias is not None:
            layer.bias.data.copy_(bias.detach().half())
        return layer

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> EntropyCodedLinear:
        """The layer of a state dict, of (rows, columns); its bias in `dtype`.

        Raises:
            FormatError: if its tensors are not those of such a layer.
        """
        rows, columns = shape
        stream, models = tensors.get("coded_integers"), tensors.get("side_models")
        if stream is None or models is None or stream.ndim != 1 or {stream.dtype, models.dtype} != {torch.uint8}:
            raise FormatError("a layer of coded integers has bytes of them and of side_models: download or quantize it again")
        layer = cls(columns, rows, num_bytes=len(stream), bias="bias" in tensors, device=stream.device, dtype=dtype)
        try:
            layer.load_state_dict(tensors)
        except RuntimeError as error:
            raise FormatError(f"the tensors of a layer do not fit it ({error}): download or quantize it again") from error
        return layer

    @torch.compiler.disable
    def unpack(self) -> tuple[Integer[Tensor, "rows columns"], Sides]:
        """The integers, and the steps and levels of rows and columns."""
        from vq4dit.layers.ans_decoding import decode  # slow to import: numba

        stream, models = (as_bytes(getattr(self, name), name) for name in self.BYTES)
        return decode(stream, models, self.out_features, self.in_features)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(r) Z diag(c) in `dtype`, from the packed tensors."""
        integers, sides = self.unpack()
        return (integers * step_size(sides.row_step).unsqueeze(1) * step_size(sides.column_step)).to(dtype)

    def decode(self, dtype: torch.dtype | None = None, name: str = "a layer") -> None:
        """Keep the decoded weight from now on; what decodes is not damaged."""
        with _named(name):
            self._keep_decoded(dtype)
        check_weight(self.numbers(), name)

    def check(self, name: str) -> None:
        """Raise `FormatError` if the stream does not hold the layer's integers; costs as much as decoding, so that does too."""
        if self.decoded_weight is None:
            with _named(name):
                weight = self.numbers()
            check_weight(weight, name)

    def _make_room(self, given: dict[str, Tensor], prefix: str) -> None:
        """Streams of the same shape differ in length."""
        stream = given.get(f"{prefix}coded_integers")
        if stream is not None and stream.ndim == 1 and len(stream) != len(self.coded_integers):
            self.coded_integers = frozen(self.coded_integers.new_zeros(len(stream)))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bytes={len(self.coded_integers)}, bias={self.bias is not None}"


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Errors of a stream tell which layer's it is."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{layer}: {error}") from error
