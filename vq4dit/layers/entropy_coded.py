"""A linear layer of entropy-coded integers: what the recipe `best` makes.

Its weight is a rounded one, in steps of a size of their own for each row and each column. Where an error hardly matters the
steps are large, most integers are 0, and their code (`vq4dit/layers/lanes.py`) takes next to nothing; where it matters, a
weight may take five bits. This is entropy-constrained quantization (Chou, Lookabaugh and Gray 1989) on the lattice of integers.

Steps are told in eighths of an octave: 2^((k - 128) / 8). That no size lies further than a sixteenth of an octave from the one
that was wanted costs a quarter of a percent of the error, and half of the bytes that a 16-bit number takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn

from vq4dit.devices import exact
from vq4dit.errors import FormatError
from vq4dit.layers import lanes
from vq4dit.layers.casts import as_bytes
from vq4dit.layers.packed import PackedLinear, check_weight
from vq4dit.layers.scale_classes import Sides, estimate_levels
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


SCHEMA = "(Tensor content, int rows, int columns, ScalarType dtype) -> Tensor"


@torch.library.custom_op("vq4dit::decode_lanes", mutates_args=(), schema=SCHEMA)
def decode_lanes(content: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight of a layer of these bytes, on their device: one operation for who traces or exports a model.

    Raises:
        FormatError: if the bytes are damaged.
    """
    return lanes.decode_weight(content, rows, columns, STEP_SIZES).to(content.device, dtype)


@decode_lanes.register_fake
def _(content: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return content.new_empty(rows, columns, dtype=dtype)


class CodedLinear(PackedLinear):
    """A linear layer whose weight is Ŵ = diag(r) Z diag(c), Z integers that were coded by their probabilities."""

    EXACT = ()

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
        for name, shape in self.shapes_of_bytes(num_bytes).items():
            setattr(self, name, frozen(torch.zeros(*shape, dtype=torch.uint8, device=device)))

    @classmethod
    def shapes_of_bytes(cls, num_bytes: int) -> dict[str, tuple[int, ...]]:
        """Of the packed tensors; the first holds the integers and has so many bytes."""
        raise NotImplementedError

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> CodedLinear:
        """The layer of a state dict, of (rows, columns); its bias in `dtype`.

        Raises:
            FormatError: if its tensors are not those of such a layer.
        """
        rows, columns = shape
        found = [tensors.get(name) for name in cls.BYTES]
        if found[0] is None or found[0].ndim != 1 or any(part is None or part.dtype != torch.uint8 for part in found):
            raise FormatError(
                f"a layer of coded integers has bytes of {' and '.join(cls.BYTES)}: download or quantize it again"
            )
        device = found[0].device
        layer = cls(columns, rows, num_bytes=len(found[0]), bias="bias" in tensors, device=device, dtype=dtype)
        try:
            layer.load_state_dict(tensors)
        except RuntimeError as error:
            raise FormatError(f"the tensors of a layer do not fit it ({error}): download or quantize it again") from error
        return layer

    def decode(self, dtype: torch.dtype | None = None, name: str = "a layer") -> None:
        """Keep the decoded weight from now on, if the bytes are those that were written."""
        with _named(name):
            self._check_bytes()
            self._keep_decoded(dtype)
        check_weight(self.numbers(), name)

    def check(self, name: str) -> None:
        """Raise `FormatError` if the bytes are not those that were written, or hold weights that the type cannot tell."""
        if self.decoded_weight is None:
            with _named(name):
                self._check_bytes()
                weight = self.numbers()
            check_weight(weight, name)

    def _check_bytes(self) -> None:
        """Raise `FormatError` if the bytes are not those that were written, as far as that can be told without decoding."""

    def _make_room(self, given: dict[str, Tensor], prefix: str) -> None:
        """Streams of the same shape differ in length."""
        name = self.BYTES[0]
        content = given.get(f"{prefix}{name}")
        if content is not None and content.ndim == 1 and len(content) != len(getattr(self, name)):
            setattr(self, name, frozen(getattr(self, name).new_zeros(len(content))))

    def extra_repr(self) -> str:
        num_bytes = len(getattr(self, self.BYTES[0]))
        return f"{self.in_features}, {self.out_features}, bytes={num_bytes}, bias={self.bias is not None}"


class EntropyCodedLinear(CodedLinear):
    """Coded in lanes: what the recipe `best` makes.

    coded_weight (bytes,) uint8: Z, in chunks that are decoded beside each other, and before them the steps and levels of rows
    and columns. Without a decoded weight they are decoded in every forward pass: as small as the file, at 2 to 3 ns a weight
    and core.
    """

    BYTES = ("coded_weight",)
    FIRST_VERSION = 5
    coded_weight: nn.Parameter

    @classmethod
    def shapes_of_bytes(cls, num_bytes: int) -> dict[str, tuple[int, ...]]:
        return {"coded_weight": (num_bytes,)}

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
        content = lanes.encode(integers, sides)
        rows, columns = integers.shape
        layer = EntropyCodedLinear(
            columns, rows, num_bytes=len(content), bias=bias is not None, device=integers.device, dtype=dtype
        )
        layer.coded_weight.data.copy_(content)
        if bias is not None:
            layer.bias.data.copy_(bias.detach().half())
        return layer

    @torch.compiler.disable
    def unpack(self) -> lanes.Lanes:
        """The integers, the steps and levels of rows and columns, and gains of columns if they have them."""
        return lanes.decode(self._content(), self.out_features, self.in_features)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(r) Z diag(c) in `dtype`, from the packed tensors."""
        return decode_lanes(self._content(), self.out_features, self.in_features, dtype)

    def _content(self) -> UInt8[Tensor, " bytes"]:
        return as_bytes(self.coded_weight, "coded_weight")

    def _check_bytes(self) -> None:
        lanes.check(self._content(), self.out_features, self.in_features)


class SingleStreamLinear(CodedLinear):
    """The same as it was written in format versions 3 and 4: one stream, which takes one core about 9 ns a weight.

    coded_integers (bytes,) uint8: steps, levels and Z; side_models (4, 2) uint8: how steps and levels are coded.
    """

    BYTES = ("coded_integers", "side_models")
    FIRST_VERSION = 3

    @classmethod
    def shapes_of_bytes(cls, num_bytes: int) -> dict[str, tuple[int, ...]]:
        return {"coded_integers": (num_bytes,), "side_models": (len(Sides._fields), 2)}

    @torch.compiler.disable
    def unpack(self) -> tuple[Integer[Tensor, "rows columns"], Sides]:
        """The integers, and the steps and levels of rows and columns."""
        from vq4dit.layers.single_stream import decode  # slow to import: numba

        stream, models = (as_bytes(getattr(self, name), name) for name in self.BYTES)
        return decode(stream, models, self.out_features, self.in_features)

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ = diag(r) Z diag(c) in `dtype`, from the packed tensors."""
        integers, sides = self.unpack()
        return (integers * step_size(sides.row_step).unsqueeze(1) * step_size(sides.column_step)).to(dtype)


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Errors of a stream tell which layer's it is."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{layer}: {error}") from error
