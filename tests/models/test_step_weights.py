"""A step counts by what an error of its prediction does to the latents, in whatever form the model predicts."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, KDPM2AncestralDiscreteScheduler

from vq4dit.models.trajectories import Sampling, _step_and_gain, new_scheduler, random_trajectories, step_weight


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def weights_of(pipeline) -> list[float]:
    """Of the ten steps of two trajectories."""
    steps = []
    random_trajectories(pipeline, Sampling(), 2, seeded(), steps.append, num_inference_steps=10)
    return [step.weight for step in steps]


def gain_of(scheduler, prediction, timestep, sample) -> float:
    step = scheduler.step
    return _step_and_gain(step, inspect.signature(step).bind(prediction, timestep, sample))[1]


def sigma_of(scheduler: DDIMScheduler, timestep) -> float:
    alpha = scheduler.alphas_cumprod[timestep].double() if timestep >= 0 else torch.ones((), dtype=torch.float64)
    return math.sqrt((1 - alpha) / alpha)


def gaussian_steps(scheduler, steps: int, error: float | None = None) -> list[float]:
    """Weights of the steps of the best denoiser of Gaussian data of unit variance: of errors as large as ε̂, or of one size."""
    scheduler.set_timesteps(steps)
    x, weights = torch.randn(4, 8, 8, generator=seeded(), dtype=torch.float64), []
    for t in scheduler.timesteps:
        noise = (1 - scheduler.alphas_cumprod[t]).double().sqrt() * x  # E[ε | x]
        weighed = noise if error is None else torch.full_like(x, error)
        weights.append(step_weight(gain_of(scheduler, noise, t, x), weighed, x))
        x = scheduler.step(noise, t, x).prev_sample
    return weights


def test_of_ddim_an_error_of_the_noise_weighs_what_asinh_of_its_level_falls_by(generator):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(500)
    x, error = (torch.randn(4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x, error = x / x.square().mean().sqrt(), error / error.square().mean().sqrt()
    levels = [math.asinh(sigma_of(scheduler, t)) for t in scheduler.timesteps]
    weights = [step_weight(gain_of(scheduler, error, t, x), error, x) for t in scheduler.timesteps[:-1]]
    falls = [level - below for level, below in zip(levels, levels[1:], strict=False)]
    assert weights[1:] == pytest.approx(falls[1:], rel=0.03)
    assert sum(weights) == pytest.approx(levels[0] - levels[-1], rel=0.01)


@pytest.mark.parametrize("number", [50, 250, 450])
def test_flow_matching_weighs_the_same_step_the_same(generator, number):
    """The same latents, level and error in both forms: x/√ᾱ = x_t/(1-t) at σ = t/(1-t), an error of ε is one of (1-t) v."""
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(500)
    t, below = ddim.timesteps[number], ddim.timesteps[number + 1]
    times = [sigma / (1 + sigma) for sigma in (sigma_of(ddim, t), sigma_of(ddim, below))]
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=times)
    x, error = (torch.randn(4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x_flow, error_flow = x * (1 - times[0]) * math.sqrt(1 + sigma_of(ddim, t) ** 2), error / (1 - times[0])
    of_flow = step_weight(gain_of(flow, error_flow, flow.timesteps[0], x_flow), error_flow, x_flow)
    assert of_flow == pytest.approx(step_weight(gain_of(ddim, error, t, x), error, x), rel=0.03)


def test_errors_of_steps_count_as_the_image_minds_them():
    """Of Gaussian data with unit variance the best noise is known, so what becomes of an error in one step can be seen."""
    scheduler = DDIMScheduler(clip_sample=False)
    weights = torch.tensor(gaussian_steps(scheduler, 40), dtype=torch.float64)
    start = torch.full((1,), 3.0, dtype=torch.float64)

    def walked(wrong: int = -1) -> torch.Tensor:
        x = start
        for number, t in enumerate(scheduler.timesteps):
            noise = (1 - scheduler.alphas_cumprod[t]).double().sqrt() * x
            x = scheduler.step(noise * (1 + 1e-3 * (number == wrong)), t, x).prev_sample
        return x

    moved = torch.cat([(walked(number) - walked()).abs() for number in range(40)])
    torch.testing.assert_close(weights / weights.sum(), moved / moved.sum(), rtol=0.15, atol=0)


@pytest.mark.parametrize("finer", [2, 5])
def test_a_step_weighs_what_its_parts_do(finer):
    whole = torch.tensor(gaussian_steps(DDIMScheduler(clip_sample=False), 10, error=1.0))
    parts = torch.tensor(gaussian_steps(DDIMScheduler(clip_sample=False), 10 * finer, error=1.0)).view(10, finer).sum(1)
    # the first step of both begins at another noise, and the last parts meet other ones
    torch.testing.assert_close(parts[1:-1] / parts[1:-1].sum(), whole[1:-1] / whole[1:-1].sum(), rtol=0.35, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_schedule_that_begins_with_nothing_but_noise_has_weights_too(pipeline, kind):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": kind}
    pipeline.register_modules(scheduler=DDIMScheduler(clip_sample=False, **settings))
    assert all(0 < weight < 10 for weight in weights_of(pipeline))


def test_a_schedule_that_goes_back_for_a_moment_has_no_weight_below_zero(pipeline):
    pipeline.register_modules(scheduler=KDPM2AncestralDiscreteScheduler())
    weights = weights_of(pipeline)
    scheduler = new_scheduler(pipeline)
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps.diff() > 0).any() and len(weights) == len(scheduler.timesteps)
    assert min(weights) >= 0 and sum(weights) > 0


@pytest.mark.parametrize("gain, weight", [(None, 0.5), (2.0, 1.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_gain_that_is_not_known_is_left_out(gain, weight):
    assert step_weight(gain, torch.ones(4), 2 * torch.ones(4)) == weight


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"],
)
def test_the_gain_is_what_an_error_comes_out_with(pipeline, scheduler):
    """By how much the next latents move if a prediction does, seen by moving it."""
    found = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.register_modules(scheduler=found)
    x, prediction = torch.randn(2, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    found.set_timesteps(8)
    wanted = found.step(prediction + 1e-3, found.timesteps[0], x).prev_sample
    found = new_scheduler(pipeline)
    found.set_timesteps(8)
    moved = found.step(prediction, found.timesteps[0], x).prev_sample - wanted
    found = new_scheduler(pipeline)
    found.set_timesteps(8)
    assert gain_of(found, prediction, found.timesteps[0], x) == pytest.approx(moved.abs().mean().item() / 1e-3, rel=1e-3)
