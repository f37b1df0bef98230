"""Error feedback against brute force, and each of its minimisers against the error they minimise."""

import itertools

import pytest
import torch

from vq4dit import error_feedback
from vq4dit.codebook import nearest_codewords, reconstruct, split_subvectors
from vq4dit.error_feedback import (
    Correction,
    QuantizedWeight,
    assign_with_feedback,
    damp,
    descend,
    least_squares_codebook,
    least_squares_scale,
    output_error,
    quantize_weight,
)
from vq4dit.kmeans import fit_codebook

SEEDS = pytest.mark.parametrize("seed", range(4))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_inputs(count: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs of which a few directions hold most of the power, like those of a transformer's layers."""
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).unsqueeze(1)
    return torch.randn(count, columns, generator=generator) @ mixing


def moments_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def problem(seed: int, rows: int = 24, columns: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose rows differ in size, and second moments of correlated inputs."""
    generator = seeded(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    return weight, moments_of(correlated_inputs(500, columns, generator))


def test_white_inputs_take_the_nearest_codewords(generator):
    weight, _ = problem(0)
    normalised = weight / weight.square().mean(1, keepdim=True).sqrt()
    subvectors = split_subvectors(normalised, 4)
    codebook = fit_codebook(subvectors, 16, generator=generator)
    found = assign_with_feedback(normalised, codebook, Correction(damp(torch.eye(32)), 4))
    assert torch.equal(found, nearest_codewords(subvectors, codebook)[1][:, 0])


@SEEDS
def test_feedback_keeps_outputs_better_than_nearest_codewords(seed):
    weight, moments = problem(seed)
    codebook = fit_codebook(split_subvectors(weight, 4), 16, generator=seeded(seed))
    _, nearest = nearest_codewords(split_subvectors(weight, 4), codebook)
    fed_back = assign_with_feedback(weight, codebook, Correction(damp(moments), 4))
    errors = [output_error(weight, reconstruct(codebook, a, (24, 32)), moments) for a in (fed_back, nearest[:, 0])]
    assert errors[0] < 0.9 * errors[1]


@SEEDS
def test_all_together_keep_outputs_better_than_plain_kmeans(seed):
    weight, moments = problem(seed)
    codebook = fit_codebook(split_subvectors(weight, 4), 16, generator=seeded(seed))
    _, nearest = nearest_codewords(split_subvectors(weight, 4), codebook)
    plain = output_error(weight, reconstruct(codebook, nearest[:, 0], (24, 32)), moments)
    found = quantize_weight(weight, moments, 16, 4, generator=seeded(seed)).weight((24, 32))
    assert output_error(weight, found, moments) < 0.7 * plain


@SEEDS
def test_descent_decides_every_group_as_well_as_trying_all_codewords(seed):
    weight, moments = problem(seed, rows=3, columns=8)
    generator = seeded(100 + seed)
    codebook, scale = torch.randn(5, 2, generator=generator), torch.rand(3, generator=generator) + 0.1
    assignments = torch.randint(5, (12,), generator=generator)
    found = descend(weight, QuantizedWeight(codebook, assignments, scale), moments)
    for row in range(3):  # rows do not meet in the error
        for group in range(4):
            tried = assignments.view(3, 4)[row].repeat(5, 1)
            tried[:, group] = torch.arange(5)
            errors = weight[row] - scale[row] * codebook[tried].view(5, 8)
            assignments[4 * row + group] = ((errors @ moments) * errors).sum(1).argmin()
    assert torch.equal(found, assignments)


@SEEDS
def test_more_rounds_of_descent_never_raise_the_error_and_a_few_lower_it(seed):
    weight, moments = problem(seed, rows=48, columns=256)
    errors = []
    for rounds in (0, 1, 2, 6):
        quantized = quantize_weight(weight, moments, 16, 4, descent_rounds=rounds, generator=seeded(seed))
        errors.append(output_error(weight, quantized.weight((48, 256)), damp(moments)))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_later_columns_move_where_the_quadratic_is_least(group, generator):
    moments = damp(moments_of(correlated_inputs(50, 8, generator)))
    correction = Correction(moments, 2)
    error = torch.randn(3, 2, generator=generator)  # w - q of the group, for three rows
    left, right = 2 * group, 2 * group + 2
    coupling, later = moments[left:right, right:].double(), moments[right:, right:].double()
    best = -torch.linalg.solve(later, coupling.T @ error.double().T).T  # of the errors after it
    whole = torch.cat([error.double(), best], dim=1)
    least = ((whole @ moments[left:, left:].double()) * whole).sum(1)
    weighted = error @ correction.metrics[group]
    torch.testing.assert_close(weighted @ correction.factor[left:right, right:], best.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weighted.square().sum(1), least.float(), rtol=1e-3, atol=1e-5)


@SEEDS
def test_rows_that_matter_more_are_kept_better(seed):
    weight, moments = problem(seed)
    sensitivity = torch.where(torch.arange(24) < 6, 3.9, 0.1 / 3)  # mean 1

    def error_of_first_rows(**options: torch.Tensor) -> float:
        quantized = quantize_weight(weight, moments, 16, 4, generator=seeded(seed), **options)
        return output_error(weight[:6], quantized.weight((24, 32))[:6], moments)

    assert error_of_first_rows(sensitivity=sensitivity) < error_of_first_rows()


@SEEDS
def test_a_least_squares_codebook_never_raises_the_error(seed):
    weight, moments = problem(seed)
    generator = seeded(100 + seed)
    codebook = torch.randn(8, 4, generator=generator)
    scale = torch.rand(24, generator=generator) + 0.1
    assignments = torch.randint(8, (24 * 8,), generator=generator)
    importance = torch.rand(24, generator=generator) + 0.1
    found = least_squares_codebook(weight, scale, importance, assignments, codebook, moments)

    def error(candidate: torch.Tensor) -> float:
        error = weight - reconstruct(candidate, assignments, (24, 32)) * scale.unsqueeze(1)
        return (importance * ((error @ moments) * error).sum(1)).sum().item()

    assert error(found) < error(codebook)
    assert error(least_squares_codebook(weight, scale, importance, assignments, found, moments)) <= error(found) * (1 + 1e-5)


def test_a_least_squares_codebook_solves_the_normal_equations(generator):
    weight, moments = problem(0, rows=6, columns=8)
    scale = torch.rand(6, generator=generator) + 0.1
    assignments = torch.tensor([0, 1, 2]).repeat(8)  # 6 rows of 4 sub-vectors
    importance = torch.rand(6, generator=generator) + 0.1
    found = least_squares_codebook(weight, scale, importance, assignments, torch.zeros(3, 2), moments, steps=30)
    design = torch.zeros(6, 8, 6, dtype=torch.float64)  # Ŵ = design @ codebook.flatten()
    for i, a in enumerate(assignments.tolist()):
        for component in range(2):
            row, column = i // 4, i % 4 * 2 + component
            design[row, column, 2 * a + component] = scale[row]
    weighted = torch.einsum("r,rcu,cd->rdu", importance.double(), design, moments.double())
    normal = torch.einsum("rdu,rdv->uv", weighted, design)
    wanted = torch.linalg.solve(normal, torch.einsum("rdu,rd->u", weighted, weight.double()))
    torch.testing.assert_close(found.flatten(), wanted.float(), rtol=1e-3, atol=1e-4)


@SEEDS
def test_a_least_squares_scale_is_the_best_of_each_row(seed):
    weight, moments = problem(seed)
    unscaled = weight + 0.3 * torch.randn(24, 32, generator=seeded(100 + seed))
    scale = least_squares_scale(weight, unscaled, moments).unsqueeze(1)
    least = output_error(weight, unscaled * scale, moments)
    for other in (torch.ones(24, 1), 0.98 * scale, 1.02 * scale):
        assert least < output_error(weight, unscaled * other, moments)


def test_a_scale_is_never_negative(generator):
    weight, moments = problem(0)
    assert (least_squares_scale(weight, -weight, moments) > 0).all()


def test_codewords_for_all_distinct_subvectors_reconstruct_exactly(generator):
    distinct = torch.randn(8, 4, generator=generator)
    weight = torch.stack([distinct[torch.randperm(8, generator=generator)].flatten() for _ in range(20)])  # rows of one size
    weight = weight * (1 + torch.arange(20.0).unsqueeze(1))
    _, moments = problem(0)
    quantized = quantize_weight(weight, moments, 8, 4, generator=generator)
    torch.testing.assert_close(quantized.weight((20, 32)), weight, rtol=1e-3, atol=1e-3)


def test_output_error_is_the_error_of_outputs_over_their_power(generator):
    inputs = correlated_inputs(100, 32, generator)
    weight, quantized = torch.randn(24, 32, generator=generator), torch.randn(24, 32, generator=generator)
    wanted, found = inputs @ weight.T, inputs @ quantized.T
    direct = (wanted - found).square().sum() / wanted.square().sum()
    assert output_error(weight, quantized, moments_of(inputs)) == pytest.approx(direct.item(), rel=1e-4)


def test_same_seed_same_result_and_another_seed_another():
    weight, moments = problem(0)
    results = []
    for global_seed, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(global_seed)  # the global generator has no say
        results.append(quantize_weight(weight, moments, 16, 4, generator=seeded(seed)))
    first, same, other = results
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first.codebook, other.codebook)


@pytest.mark.parametrize("count", [0, 1, 5], ids=["no input but zero", "one input", "five inputs"])
def test_fewer_inputs_than_columns_still_keep_the_weight(count, generator):
    """Directions that were never seen are not free: the weight stays near the original in them too."""
    weight, _ = problem(0)
    inputs = torch.cat([correlated_inputs(count, 32, generator), torch.zeros(1, 32)])
    quantized = quantize_weight(weight, moments_of(inputs), 64, 4, generator=generator).weight((24, 32))
    assert ((weight - quantized).square().sum() / weight.square().sum()).item() < 0.5


@pytest.mark.parametrize("block", [32, 256])
def test_the_width_of_a_block_of_columns_changes_nothing(block, monkeypatch, generator):
    weight, moments = problem(0, columns=256)
    codebook = fit_codebook(split_subvectors(weight, 4), 16, generator=generator)
    correction = Correction(damp(moments), 4)
    wanted = assign_with_feedback(weight, codebook, correction)
    monkeypatch.setattr(error_feedback, "BLOCK_COLUMNS", block)
    assert torch.equal(assign_with_feedback(weight, codebook, correction), wanted)


@pytest.mark.parametrize("block", [32, 256])
def test_nor_does_it_in_descent(block, monkeypatch, generator):
    weight, moments = problem(0, columns=256)
    codebook, scale = torch.randn(16, 4, generator=generator), torch.ones(24)
    start = QuantizedWeight(codebook, torch.randint(16, (24 * 64,), generator=generator), scale)
    wanted = descend(weight, start, moments)
    monkeypatch.setattr(error_feedback, "BLOCK_COLUMNS", block)
    assert torch.equal(descend(weight, start, moments), wanted)
