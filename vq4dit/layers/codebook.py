"""Vector quantization of one matrix: sub-vectors, nearest codewords, reconstruction, bits.

A weight matrix W (rows x columns) is cut along its rows into sub-vectors of d weights. A codebook C holds k codewords of
d weights; every sub-vector is replaced by the index of one of them, its assignment. Then Ŵ = C[A], and a weight costs
log2(k) / d bits: 256 codewords of 4 weights make 2 bits, 64 of 2 make 3, 256 of 2 make 4.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from vq4dit.devices import exact, exact_device

CHUNK_ELEMENTS = 2**19  # of the distance matrix held at a time: 2 MB, so that it stays in a core's cache


def split_subvectors(weight: Float[Tensor, "rows columns"], dim: int) -> Float[Tensor, "n {dim}"]:
    """View a weight matrix as its n = rows * columns / d sub-vectors, row by row.

    If d does not divide the columns, rows of a copy end in zeros, and there are rows * ⌈columns / d⌉.
    """
    missing = -weight.shape[1] % dim
    return (F.pad(weight, (0, missing)) if missing else weight).reshape(-1, dim)


def join_subvectors(subvectors: Float[Tensor, "n d"], shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """The opposite of `split_subvectors`."""
    return subvectors.view(shape[0], -1)[:, : shape[1]].contiguous()


def num_subvectors(shape: tuple[int, int], dim: int) -> int:
    """n of a weight matrix (rows, columns)."""
    return shape[0] * -(-shape[1] // dim)


def nearest_codewords(
    subvectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], count: int = 1
) -> tuple[Float[Tensor, "n {count}"], Integer[Tensor, "n {count}"]]:
    """The `count` codewords nearest to every sub-vector, nearest first: squared distances and indices.

    A_c = argmin_a || w - c(a) ||²   (eq. 5 of VQ4DiT). Since || w - c ||² = || w ||² - 2 (w·c - || c ||² / 2), one matrix
    product ranks all codewords. Works in chunks: memory beyond the result is bounded whatever n is.

    Raises:
        ValueError: if there are fewer than `count` codewords.
    """
    if count > len(codebook):
        raise ValueError(f"{count} nearest codewords were asked for, the codebook has {len(codebook)}")
    distances = torch.empty(len(subvectors), count, dtype=torch.float32, device=subvectors.device)
    indices = torch.empty(len(subvectors), count, dtype=assignment_dtype(len(codebook)), device=subvectors.device)
    center = codebook.float().mean(dim=0)  # distances do not change, and a common offset would cost precision
    codewords = codebook.float() - center
    half_norms = codewords.square().sum(1, keepdim=True) / 2
    table = torch.cat([codewords, -half_norms], dim=1).T.contiguous()  # [w, 1] times it is w·c - || c ||² / 2
    rows = min(max(1, CHUNK_ELEMENTS // len(codebook)), max(1, len(subvectors)))
    buffer = torch.empty(rows, len(codebook), device=subvectors.device)  # one for all chunks: new pages cost more than the sums
    start = 0
    for chunk in subvectors.split(rows):
        chunk = chunk.float() - center
        closeness = torch.mm(F.pad(chunk, (0, 1), value=1.0), table, out=buffer[: len(chunk)])
        stop = start + len(chunk)
        for rank in range(count):
            index = argmax_of_rows(closeness)
            indices[start:stop, rank] = index
            distances[start:stop, rank] = (chunk - codewords.index_select(0, index)).square().sum(1)
            if rank + 1 < count:
                closeness.scatter_(1, index.unsqueeze(1), torch.finfo(torch.float32).min)
        start = stop
    return distances, indices


def argmax_of_rows(values: Float[Tensor, "n k"]) -> Integer[Tensor, " n"]:
    """The column of the largest value of each row; overwrites the low bits of `values`.

    A maximum without its index is three times faster than `argmax`, so for k <= 256 the index takes the place of the low
    eight mantissa bits of its value and comes out with it. Values that agree to a part in 2^15 count as equal.
    """
    if values.shape[1] > 256:
        return values.argmax(dim=1)
    columns = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    values.view(torch.int32).bitwise_and_(~0xFF).bitwise_or_(columns)
    return values.amax(dim=1).view(torch.int32).bitwise_and_(0xFF).long()


def reconstruct(
    codebook: Float[Tensor, "k d"], assignments: Integer[Tensor, " n"], shape: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """Look every sub-vector up in the codebook and lay them out as a weight matrix.

    Ŵ[r, j·d : (j+1)·d] = codebook[assignments[r·⌈columns/d⌉ + j]]   (Ŵ = C[A] in VQ4DiT, arXiv:2408.17131)

    Args:
        assignments: the codeword of each sub-vector, row by row, in [0, k).
        shape: (out_features, in_features) of the layer.

    Raises:
        ValueError: if n is not the number of sub-vectors in `shape`.
    """
    if len(assignments) != num_subvectors(shape, codebook.shape[1]):
        raise ValueError(
            f"{len(assignments)} assignments of {codebook.shape[1]} weights do not fill a {shape[0]} x {shape[1]} matrix"
        )
    return join_subvectors(codebook.index_select(0, assignments.int()), shape)


def sum_by_codeword(values: Float[Tensor, "n d"], assignments: Integer[Tensor, " n"], count: int) -> Float[Tensor, "k d"]:
    """Sum the rows of `values` that share an assignment, in float64: S[a] = Σ_{i: A_i = a} values_i, on `exact_device`.

    On a CPU the additions happen in a fixed order. On CUDA they do not: the last bits may differ between runs.
    """
    index = assignments.int().to(exact_device(values.device))
    columns = [torch.bincount(index, weights=exact(column), minlength=count) for column in values.T]
    return torch.stack(columns, dim=1)


def assignment_bits(num_codewords: int) -> int:
    """Bits that name one of `num_codewords` codewords: 256 -> 8, 64 -> 6."""
    return max(1, (num_codewords - 1).bit_length())


def assignment_dtype(num_codewords: int) -> torch.dtype:
    """The smallest integer type that can index a codebook."""
    return torch.uint8 if num_codewords <= 256 else torch.int32
