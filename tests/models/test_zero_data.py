import gc

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, KDPM2AncestralDiscreteScheduler
from tiny import new_pipeline

from vq4dit.errors import UnsupportedModelError, VQ4DiTError
from vq4dit.models.supported import check_supported
from vq4dit.models.zero_data import ROUNDS, guide, image_weights, record_block_calls, teacher_steps


def walk(pipeline, seed=0, steps=4, trajectories=2, guidance_scale=4.0, shown=slice(None)):
    generator = torch.Generator().manual_seed(seed)
    return list(
        teacher_steps(
            pipeline,
            generator,
            num_trajectories=trajectories,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            shown=shown,
        )
    )


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_teacher_walks_exactly_as_the_pipeline_samples(pipeline, scheduler):
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (2,), generator=generator)
    pipeline(labels.tolist(), generator=generator, num_inference_steps=4, guidance_scale=3.0)
    hook.remove()
    steps = walk(pipeline, seed=3, guidance_scale=3.0)
    assert len(seen) == len(steps) == 4
    for wanted, step in zip(seen, steps, strict=True):
        assert torch.equal(step.latents, wanted)
        assert step.class_labels.tolist() == [*labels.tolist(), 1000, 1000]


def test_same_seed_gives_the_same_walk(pipeline):
    for a, b in zip(walk(pipeline), walk(pipeline), strict=True):
        assert torch.equal(a.prediction, b.prediction)


def test_steps_that_are_not_shown_are_walked_all_the_same(pipeline):
    every = walk(pipeline, steps=5)
    for shown in (slice(0, None, 2), slice(1, None, 2)):
        for wanted, step in zip(every[shown], walk(pipeline, steps=5, shown=shown), strict=True):
            assert step.number == wanted.number and torch.equal(step.latents, wanted.latents)


def test_the_blocks_see_every_step_and_each_walk_shows_some(pipeline):
    calls = record_block_calls(
        pipeline, torch.Generator().manual_seed(0), num_trajectories=3, guidance_scale=4.0, num_inference_steps=6
    )
    timesteps = [int(call.arguments["timestep"][0]) for call in calls]
    assert timesteps == sorted(set(timesteps), reverse=True) and len(timesteps) == 6
    generator = torch.Generator().manual_seed(0)
    for number in range(ROUNDS):
        walked = record_walk(pipeline, generator)
        for call, hidden in zip(calls[number::ROUNDS], walked[number::ROUNDS], strict=True):
            assert torch.equal(call.hidden, hidden)


def record_walk(pipeline, generator):
    """What enters the first block at each step of one walk more."""
    entered = []
    hook = pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    list(teacher_steps(pipeline, generator, num_trajectories=3, guidance_scale=4.0, num_inference_steps=6))
    hook.remove()
    return entered


def test_every_block_is_recorded_and_no_hook_is_left(pipeline):
    for step in walk(pipeline):
        assert [tuple(output.shape) for output in step.block_outputs] == [(4, 16, 64)] * 2
    assert not any(block._forward_hooks for block in pipeline.transformer.transformer_blocks)


def test_an_abandoned_walk_leaves_no_hook(pipeline):
    steps = teacher_steps(pipeline, torch.Generator(), num_trajectories=1, guidance_scale=2.0, num_inference_steps=5)
    next(steps)
    steps.close()
    assert not any(block._forward_hooks for block in pipeline.transformer.transformer_blocks)


def live_tensors_at_the_end(pipeline, steps: int) -> int:
    walked = teacher_steps(pipeline, torch.Generator(), num_trajectories=1, guidance_scale=2.0, num_inference_steps=steps)
    for _ in range(steps):
        step = next(walked)
    assert step.prediction is not None  # it is alive while we count, and so is the walk
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum(tensor.dim() > 0 for tensor in tensors)  # all times of a schedule are numbers made at once


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_memory_does_not_depend_on_the_number_of_steps(pipeline, scheduler):
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    gc.collect()
    counts = {steps: live_tensors_at_the_end(pipeline, steps) for steps in (5, 20)}
    assert counts[20] == counts[5] > 0


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_guidance_up_to_one_is_the_conditional_prediction(guidance_scale, generator):
    prediction = torch.randn(4, 8, 2, 2, generator=generator)
    assert torch.equal(guide(prediction, guidance_scale, channels=4), prediction[:2, :4])


def test_a_learned_variance_is_left_out():
    steps = walk(new_pipeline(out_channels=8))
    assert steps[0].prediction.shape == (4, 8, 8, 8)


def test_other_pipelines_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="this is a str; only quantizing with --recipe kmeans"):
        check_supported("not a pipeline")


def test_a_scheduler_that_does_not_tell_the_noise_is_refused(pipeline):
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler does not"):
        check_supported(pipeline)


def test_more_steps_than_the_scheduler_has_are_refused(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
    check_supported(pipeline, 20)
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps .* 50 were asked for"):
        check_supported(pipeline, 50)


@pytest.mark.parametrize(("known", "none"), [(3, 3), (1000, 1000), (2000, 1000)])
def test_no_class_is_the_label_behind_all_others_of_a_thousand(known, none):
    assert all(step.class_labels.tolist()[2:] == [none, none] for step in walk(new_pipeline(num_embeds_ada_norm=known)))


def test_errors_of_steps_count_as_the_image_minds_them():
    """Of Gaussian data with unit variance the best noise is known, so what becomes of an error in one step can be seen."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(40)
    start = torch.full((1,), 3.0, dtype=torch.float64)

    def walk(wrong: int = -1) -> torch.Tensor:
        x = start
        for number, t in enumerate(scheduler.timesteps):
            noise = (1 - scheduler.alphas_cumprod[t]).double().sqrt() * x  # E[ε | x]
            x = scheduler.step(noise + 1e-3 * (number == wrong), t, x).prev_sample
        return x

    moved = torch.stack([(walk(number) - walk()).abs() for number in range(39)]).flatten()
    weights = torch.tensor(image_weights(scheduler), dtype=torch.float64)
    assert weights.mean() == pytest.approx(1) and weights[-1] < 0.5 * weights[-2]
    torch.testing.assert_close(weights[:-1] / weights[:-1].sum(), moved / moved.sum(), rtol=0.15, atol=0)


@pytest.mark.parametrize("finer", [2, 5])
def test_a_step_weighs_what_its_parts_do(finer):
    coarse, fine = DDIMScheduler(), DDIMScheduler()
    coarse.set_timesteps(10)
    fine.set_timesteps(10 * finer)
    parts = torch.tensor(image_weights(fine)).view(10, finer).mean(1)[1:-1]
    whole = torch.tensor(image_weights(coarse))
    # the first step of both begins at another noise, and the last parts meet other ones
    torch.testing.assert_close(parts / parts.sum(), whole[1:-1] / whole[1:-1].sum(), rtol=0.35, atol=0)


def test_a_schedule_that_begins_with_nothing_but_noise_has_weights_too():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    assert all(0 < weight < 10 for weight in image_weights(scheduler))


def test_a_schedule_that_goes_back_for_a_moment_has_no_weight_below_zero():
    scheduler = KDPM2AncestralDiscreteScheduler()
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps.diff() > 0).any()
    weights = image_weights(scheduler)
    assert min(weights) >= 0 and sum(weights) == pytest.approx(len(weights))
