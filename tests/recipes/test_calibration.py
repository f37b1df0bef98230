import pytest
import torch
from diffusers import DDIMScheduler
from tiny import quick_settings

from vq4dit import CalibrationDivergedError, VQ4DiTError, quantize
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.layers.codebook import nearest_codewords
from vq4dit.models.student import student_with
from vq4dit.randomness import named_generator
from vq4dit.recipes.calibration import Calibration, block_loss, ratio_loss
from vq4dit.recipes.kmeans import fit_codebook
from vq4dit.recipes.quantize import check
from vq4dit.recipes.soft_layers import SoftVQLinear, start_logits
from vq4dit.recipes.vector_quantized import subvectors_of


def new_calibration(pipeline, settings) -> Calibration:
    layers, plan = {}, check(pipeline, settings)
    for name, linear in plan.targets.items():
        subvectors = subvectors_of(linear, settings.subvector_dim)
        codebook = fit_codebook(subvectors, 64, generator=named_generator(0, name))
        _, candidates = nearest_codewords(subvectors, codebook, settings.calibration.num_candidates)
        logits = start_logits(subvectors, codebook, candidates, settings.calibration.ratio_start)
        layers[name] = SoftVQLinear(codebook, candidates, logits, tuple(linear.weight.shape), linear.bias)
    student = student_with(pipeline.transformer, layers)
    return Calibration(pipeline, student, plan.sampling, settings.calibration, torch.Generator().manual_seed(0))


def test_calibration_lowers_the_block_loss(pipeline):
    calibration = new_calibration(pipeline, quick_settings(calibration={"num_inference_steps": 4}))
    losses = [calibration.advance()["block_mse"] for _ in range(100)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_ratios_become_decisions(pipeline):
    calibration = new_calibration(pipeline, quick_settings(calibration={"ratio_start": "uniform"}))
    assert calibration.decided_fraction() == 0
    for _ in range(120):
        calibration.advance()
    assert calibration.decided_fraction() > 0.5


def test_decided_subvectors_stay_decided(pipeline):
    calibration = new_calibration(pipeline, quick_settings(calibration={"ratio_start": "distance"}))
    fractions = []
    for _ in range(40):
        calibration.advance()
        fractions.append(calibration.decided_fraction())
    assert fractions == sorted(fractions)
    assert fractions[-1] > fractions[0]


def test_a_restored_calibration_goes_on_bit_for_bit(pipeline):
    settings = quick_settings()
    whole = new_calibration(pipeline, settings)
    for _ in range(7):  # into the second trajectory
        whole.advance()
    stored = {name: tensor.detach().clone() for name, tensor in whole.tensors().items()}
    resumed = new_calibration(pipeline, settings)
    resumed.restore(stored)
    for _ in range(5):
        whole.advance()
        resumed.advance()
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_hardening_follows_its_schedule_to_the_end(pipeline):
    settings = quick_settings(calibration={"steps": 10, "hardening_start": 0.2, "hardening_end": 0.7, "ratio_loss_weight": 0.0})
    calibration, decided = new_calibration(pipeline, settings), []
    for _ in range(10):
        calibration.advance()
        decided.append(calibration.decided_fraction())
    assert decided == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1], abs=0.02)


def test_one_candidate_trains_codebooks_and_biases_only(pipeline):
    calibration = new_calibration(pipeline, quick_settings(calibration={"num_candidates": 1}))
    before = {name: layer.codebook.detach().clone() for name, layer in calibration.layers.items()}
    metrics = calibration.advance()
    assert metrics["ratio_loss"] == 0
    assert calibration.decided_fraction() == 1
    assert all(not torch.equal(before[name], layer.codebook) for name, layer in calibration.layers.items())


@pytest.mark.parametrize("ratio, loss", [(0.5, 2.0), (1.0, 0.0), (0.75, 1.0)])
def test_ratio_loss_is_eq_9(ratio, loss):
    logits = torch.tensor([[ratio, 1 - ratio]]).log()
    layer = SoftVQLinear(torch.zeros(2, 2), torch.tensor([[0, 1]]), logits, (1, 2), None)
    assert ratio_loss(layer).item() == pytest.approx(loss)


def test_block_loss_is_the_mean_over_blocks():
    outputs, targets = [torch.zeros(2, 3), torch.zeros(2, 3)], [torch.ones(2, 3), 3 * torch.ones(2, 3)]
    assert block_loss(outputs, targets).item() == 5


def test_more_steps_than_the_scheduler_has_are_refused_before_anything_is_clustered(pipeline):
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=20)
    check(pipeline, quick_settings(calibration={"num_inference_steps": 20}))
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps .* 21 were asked for: take fewer"):
        check(pipeline, quick_settings(calibration={"num_inference_steps": 21}))


def test_a_loss_that_is_not_a_number_stops_the_calibration(pipeline):
    calibration = new_calibration(pipeline, quick_settings())
    with torch.no_grad():
        next(iter(calibration.layers.values())).bias.fill_(torch.nan)
    with pytest.raises(CalibrationDivergedError, match="try another seed"):
        calibration.advance()


def test_paper_is_closer_to_the_original_than_kmeans(pipeline):
    errors = {}
    for recipe in ("kmeans", "paper"):
        settings = quick_settings(recipe=recipe, calibration={"steps": 100, "num_inference_steps": 10, "num_trajectories": 4})
        quantized = quantize(pipeline, settings)
        errors[recipe] = noise_nmse(pipeline, quantized, num_trajectories=4, num_inference_steps=5)
    assert errors["paper"] < 0.7 * errors["kmeans"]
