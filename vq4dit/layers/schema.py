"""Which tensors a packed layer has in a file, and whether they fit.

The packed tensors of a layer NAME (FORMAT.md has them byte by byte): vector-quantized,

    NAME.codebook            fp16 (k, d)
    NAME.packed_assignments  uint8, n = rows * ⌈columns / d⌉ values of ceil(log2 k) bits, little-endian bit stream
    NAME.row_scale           fp16 (rows,), optional
    NAME.bias                fp16 (rows,), optional

or, from format version 5 on, entropy-coded integers:

    NAME.coded_weight  uint8, 16-bit words
    NAME.bias          fp16 (rows,), optional

which in versions 3 and 4 were

    NAME.coded_integers  uint8, a stream of 32-bit words
    NAME.side_models     uint8 (4, 2)
    NAME.bias            fp16 (rows,), optional
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vq4dit.errors import FormatError
from vq4dit.layers.bitstream import packed_size
from vq4dit.layers.casts import as_bytes, as_scales
from vq4dit.layers.codebook import assignment_bits, num_subvectors
from vq4dit.layers.entropy_coded import CodedLinear, EntropyCodedLinear, SingleStreamLinear
from vq4dit.layers.linear_maps import LAST, LinearMap, matrix_shape
from vq4dit.layers.packed import PackedLinear
from vq4dit.layers.vector import VQLinear

SCALES = {"codebook", "row_scale"}  # fp16 in the file, fp32 in memory
BYTES = {*VQLinear.BYTES, *EntropyCodedLinear.BYTES, *SingleStreamLinear.BYTES}
WORD_BYTES: dict[type[CodedLinear], int] = {EntropyCodedLinear: 2, SingleStreamLinear: 4}
PACKED_TYPES = dict.fromkeys(SCALES, ("F16", "F32")) | dict.fromkeys(BYTES, ("U8",))
PACKED_SUFFIXES = tuple(f".{tensor}" for tensor in PACKED_TYPES)


def empty_layer(name: str, shapes: dict[str, list[int]], linear: LinearMap, dtype: torch.dtype) -> PackedLinear:
    """A packed layer on the meta device, in place of `linear`, for tensors of these shapes, to be decoded in `dtype`.

    Raises:
        FormatError: unless they fit each other and the model's config.
    """
    (rows, columns), bias = matrix_shape(linear), linear.bias is not None
    for kind in WORD_BYTES:
        if kind.BYTES[0] in shapes:
            _check_coded(name, shapes, kind)
            return kind(columns, rows, num_bytes=shapes[kind.BYTES[0]][0], bias=bias, device="meta", dtype=dtype)
    _check_quantized(name, shapes, linear)
    k, d = shapes["codebook"]
    scaled = "row_scale" in shapes
    return VQLinear(columns, rows, num_codewords=k, subvector_dim=d, bias=bias, row_scale=scaled, device="meta", dtype=dtype)


def format_version(layers: Iterable[PackedLinear]) -> int:
    """The least version whose readers understand these layers: FORMAT.md has what is new in which."""
    versions = [1]
    for layer in layers:
        is_padded = isinstance(layer, VQLinear) and layer.in_features % layer.codebook.shape[1] > 0
        is_new = is_padded or layer.channel_dim != LAST
        versions.append(max(layer.FIRST_VERSION, 4 if is_new else 1))
    return max(versions)


def _check_present(name: str, wanted: set[str], shapes: dict[str, list[int]]) -> None:
    if missing := wanted - shapes.keys():
        raise FormatError(f"{name}: {', '.join(sorted(missing))} is missing; the file is incomplete: download it again")


def _check_length(name: str, tensor: str, length: int, shapes: dict[str, list[int]]) -> None:
    if shapes.get(tensor, [length]) != [length]:
        raise FormatError(f"{name}: {tensor} must have {length} values, got shape {shapes[tensor]}")


def _check_quantized(name: str, shapes: dict[str, list[int]], linear: LinearMap) -> None:
    rows, columns = matrix_shape(linear)
    _check_present(name, {"codebook", "packed_assignments"}, shapes)
    codebook = shapes["codebook"]
    if len(codebook) != 2 or not 2 <= codebook[0] <= 65536 or not 1 <= codebook[1] <= columns:
        raise FormatError(
            f"{name}: a codebook is (k, d) with 2 <= k <= 65536 and 1 <= d <= {columns}, the layer's inputs, "
            f"got shape {codebook}"
        )
    expected = packed_size(num_subvectors((rows, columns), codebook[1]), assignment_bits(codebook[0]))
    if shapes["packed_assignments"] != [expected]:
        raise FormatError(
            f"{name}: {rows} x {columns} weights with a {codebook[0]} x {codebook[1]} codebook need {expected} bytes of "
            f"assignments, got shape {shapes['packed_assignments']}; the file does not belong to this config.json"
        )
    _check_length(name, "row_scale", rows, shapes)


def _check_coded(name: str, shapes: dict[str, list[int]], kind: type[CodedLinear]) -> None:
    first, others = kind.BYTES[0], kind.BYTES[1:]
    _check_present(name, set(others), shapes)
    if len(shapes[first]) != 1 or shapes[first][0] % WORD_BYTES[kind]:
        raise FormatError(f"{name}: {first} are bytes of whole {8 * WORD_BYTES[kind]}-bit words, got shape {shapes[first]}")
    for other in others:
        wanted = kind.shapes_of_bytes(0)[other]
        if tuple(shapes[other]) != wanted:
            raise FormatError(f"{name}: {other} must be {' x '.join(map(str, wanted))}, got shape {shapes[other]}")


def stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a model as its file holds it: bytes, fp16 values of codebooks and scales, the rest in `dtype` if it fits.

    What was loaded in a larger type than it was stored in goes back to 16 bit, as does what layerwise casting keeps in fewer.

    Raises:
        FormatError: if a packed tensor was cast to a type that does not hold its values.
    """
    part = name.rpartition(".")[2]
    if part in BYTES:
        return as_bytes(tensor, name)
    if part in SCALES:
        tensor, dtype = as_scales(tensor, name), torch.float16
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 2:
        return tensor
    for candidate in (dtype, torch.float16, torch.bfloat16, torch.float32):
        narrow = tensor.to(candidate)
        if candidate.itemsize < tensor.dtype.itemsize and not torch.equal(narrow.to(tensor.dtype), tensor):
            continue
        return narrow
    return tensor
