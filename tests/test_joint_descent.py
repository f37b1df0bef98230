"""Joint descent against brute force, and each of its steps against the error it minimises."""

import pytest
import torch

from vq4dit.codebook import reconstruct
from vq4dit.error_feedback import QuantizedWeight, damp, least_squares_codebook, quantize_weight
from vq4dit.joint_descent import JointDescent, joint_scale, quantize_jointly

SEEDS = pytest.mark.parametrize("seed", range(4))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments(size: int, directions: int, generator: torch.Generator) -> torch.Tensor:
    """Second moments that are nearly those of a few directions."""
    vectors = torch.randn(directions, size, generator=generator)
    return vectors.T @ vectors / directions + 0.05 * torch.eye(size)


def problem(seed: int, rows: int = 12, columns: int = 16, directions: int = 3):
    """A weight, a random quantization of it, H and B; outputs and inputs are strongly coupled."""
    generator = seeded(seed)
    weight = torch.randn(rows, columns, generator=generator)
    codebook, scale = torch.randn(6, 2, generator=generator), torch.rand(rows, generator=generator) + 0.5
    assignments = torch.randint(6, (rows * columns // 2,), generator=generator)
    coupled = moments(columns, directions, generator), moments(rows, directions, generator)
    return weight, QuantizedWeight(codebook, assignments, scale), *coupled


def error_of(weight: torch.Tensor, quantized: QuantizedWeight, damped: torch.Tensor, coupling: torch.Tensor) -> float:
    """tr(B (W - Ŵ) H (W - Ŵ)ᵀ)."""
    error = weight - quantized.weight((weight.shape[0], weight.shape[1]))
    return ((coupling @ error @ damped) * error).sum().item()


@pytest.mark.parametrize("directions", [1, 3, 30])
@SEEDS
def test_a_pass_never_raises_the_error_however_strongly_outputs_are_coupled(seed, directions):
    weight, quantized, damped, coupling = problem(seed, directions=directions)
    errors = [error_of(weight, quantized, damped, coupling)]
    for _ in range(4):
        quantized = quantized._replace(assignments=JointDescent(weight, quantized, damped, coupling).run())
        errors.append(error_of(weight, quantized, damped, coupling))
    assert all(after <= before * (1 + 1e-4) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.5 * errors[0]


@SEEDS
def test_at_the_end_no_other_codeword_of_any_sub_vector_is_better(seed):
    weight, quantized, damped, coupling = problem(seed, rows=4, columns=8)
    for _ in range(30):
        quantized = quantized._replace(assignments=JointDescent(weight, quantized, damped, coupling).run())
    reached = error_of(weight, quantized, damped, coupling)
    for position in range(len(quantized.assignments)):
        for codeword in range(len(quantized.codebook)):
            other = quantized.assignments.clone()
            other[position] = codeword
            assert error_of(weight, quantized._replace(assignments=other), damped, coupling) >= reached * (1 - 1e-3)


@SEEDS
def test_the_scales_are_the_best_for_all_rows_together(seed):
    weight, quantized, damped, coupling = problem(seed)
    unscaled = reconstruct(quantized.codebook, quantized.assignments, (12, 16))
    best = quantized._replace(row_scale=joint_scale(weight, unscaled, damped, coupling))
    reached = error_of(weight, best, damped, coupling)
    generator = seeded(seed)
    for _ in range(10):
        nearby = best.row_scale + 0.05 * torch.randn(12, generator=generator)
        assert error_of(weight, best._replace(row_scale=nearby), damped, coupling) > reached


@SEEDS
def test_the_codebook_is_the_best_for_all_rows_together(seed):
    weight, quantized, damped, coupling = problem(seed)
    codebook = least_squares_codebook(
        weight, quantized.row_scale, coupling, quantized.assignments, quantized.codebook, damped, steps=60
    )
    best = quantized._replace(codebook=codebook)
    reached = error_of(weight, best, damped, coupling)
    generator = seeded(seed)
    for _ in range(10):
        nearby = codebook + 0.05 * torch.randn(codebook.shape, generator=generator)
        assert error_of(weight, best._replace(codebook=nearby), damped, coupling) > reached


@SEEDS
def test_outputs_together_keep_what_matters_better_than_each_for_itself(seed):
    generator = seeded(seed)
    weight = torch.randn(48, 32, generator=generator)
    second_moments, coupling = moments(32, 6, generator), moments(48, 6, generator)
    sensitivity = coupling.diagonal() / coupling.diagonal().mean()
    separate = quantize_weight(weight, second_moments, 16, 4, sensitivity=sensitivity, generator=seeded(seed))
    joint, again = (quantize_jointly(weight, second_moments, coupling, 16, 4, generator=seeded(seed)) for _ in range(2))
    damped = damp(second_moments)
    assert error_of(weight, joint, damped, coupling) < 0.7 * error_of(weight, separate, damped, coupling)
    assert all(torch.equal(a, b) for a, b in zip(joint, again, strict=True))
    assert (joint.row_scale > 0).all()
