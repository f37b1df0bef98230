"""Sub-vectors, nearest codewords, reconstruction: each equals the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from vq4dit.layers import codebook as codebook_module
from vq4dit.layers.codebook import (
    assignment_bits,
    assignment_dtype,
    nearest_codewords,
    reconstruct,
    split_subvectors,
    sum_by_codeword,
)


@pytest.mark.parametrize("dim", [1, 2, 4, 5, 12])
def test_reconstruct_undoes_split(dim, generator):
    weight = torch.randn(6, 12, generator=generator)
    subvectors = split_subvectors(weight, dim)
    assert subvectors.shape == (6 * -(-12 // dim), dim)
    assert torch.equal(reconstruct(subvectors, torch.arange(len(subvectors)), (6, 12)), weight)


def test_subvectors_are_a_view():
    weight = torch.zeros(2, 4)
    split_subvectors(weight, 2)[3] = 1
    assert weight.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_reconstruct_lays_codewords_out_row_by_row(generator):
    codebook = torch.randn(5, 2, generator=generator)
    assignments = torch.randint(5, (6,), generator=generator)
    weight = reconstruct(codebook, assignments, (2, 6))
    for r in range(2):
        for j in range(3):
            assert torch.equal(weight[r, 2 * j : 2 * j + 2], codebook[assignments[3 * r + j]])


@pytest.mark.parametrize("chunk_elements", [1, 7 * 16, 7 * 50, 2**19], ids=["rows", "ragged", "exact", "one"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_nearest_codewords_equals_brute_force(count, chunk_elements, generator, monkeypatch):
    monkeypatch.setattr(codebook_module, "CHUNK_ELEMENTS", chunk_elements)
    subvectors, codebook = torch.randn(50, 4, generator=generator), torch.randn(7, 4, generator=generator)
    distances, indices = nearest_codewords(subvectors, codebook, count)
    expected = torch.cdist(subvectors.double(), codebook.double()).square().topk(count, largest=False)
    assert indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(distances, expected.values.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nearest_comes_first_and_distances_are_not_negative(dtype, generator):
    subvectors = torch.randn(100, 2, generator=generator).to(dtype)
    distances, _ = nearest_codewords(subvectors, subvectors[:20], 4)
    assert (distances >= 0).all()
    assert (distances.diff(dim=1) >= 0).all()


def test_the_nearest_codewords_of_a_subvector_are_different_ones_even_if_equal():
    _, indices = nearest_codewords(torch.ones(3, 2), torch.zeros(4, 2), 4)
    assert indices.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_no_subvectors_have_no_neighbours():
    distances, indices = nearest_codewords(torch.zeros(0, 2), torch.zeros(4, 2), 2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize("k", [256, 257])
def test_every_codeword_is_its_own_nearest(k, generator):  # 257 no longer fit a byte
    codebook = torch.randn(k, 4, generator=generator)
    _, indices = nearest_codewords(codebook, codebook)
    assert indices[:, 0].tolist() == list(range(k))


def test_sum_by_codeword_equals_a_one_hot_product(generator):
    values = torch.randn(40, 3, generator=generator)
    assignments = torch.randint(5, (40,), generator=generator)
    sums = sum_by_codeword(values, assignments, 7)  # nobody has codewords 5 and 6
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, F.one_hot(assignments, 7).double().T @ values.double())


@pytest.mark.parametrize(
    "num_codewords, bits",
    [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (65, 7), (255, 8), (256, 8), (257, 9), (65536, 16)],
)
def test_assignment_bits_are_the_fewest_that_name_every_codeword(num_codewords, bits):
    assert assignment_bits(num_codewords) == bits


@pytest.mark.parametrize("num_codewords, dtype", [(2, torch.uint8), (256, torch.uint8), (257, torch.int32)], ids=str)
def test_assignments_lie_in_the_smallest_type_that_holds_them(num_codewords, dtype):
    assert assignment_dtype(num_codewords) == dtype


def test_assignments_that_do_not_fill_the_matrix_are_refused():
    with pytest.raises(ValueError, match="5 assignments of 2 weights do not fill a 3 x 4 matrix"):
        reconstruct(torch.zeros(4, 2), torch.zeros(5, dtype=torch.int32), (3, 4))


def test_more_neighbours_than_codewords_are_refused():
    with pytest.raises(ValueError, match="4 nearest codewords were asked for, the codebook has 3"):
        nearest_codewords(torch.zeros(5, 2), torch.zeros(3, 2), 4)


def test_a_common_offset_costs_no_precision(generator):
    """Sub-vectors far from the origin and close together are ranked as if they were centred."""
    subvectors = 1 + 1e-3 * torch.randn(2000, 4, generator=generator)
    codebook = subvectors[:64].clone()
    distances, _ = nearest_codewords(subvectors, codebook)
    exact = (subvectors.double().unsqueeze(1) - codebook.double()).square().sum(2).amin(1)
    assert distances.double().sum() < 1.001 * exact.sum()
