"""Zero data is what the pipeline does when it samples: watched, and otherwise left alone."""

import gc

import diffusers
import pytest
import torch
from tiny import new_pipeline

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.denoiser_calls import recorded_calls, tensors_of
from vq4dit.models.trajectories import (
    ROUNDS,
    STEPS,
    Sampling,
    new_scheduler,
    num_trajectories_for,
    random_trajectories,
    record_calls,
    sample_trajectories,
    shown_in,
    steps_sampled,
)

UNSCALED = ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
every_scheduler = pytest.mark.parametrize("scheduler", [*UNSCALED, "HeunDiscreteScheduler"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_scheduler(pipeline, name: str):
    pipeline.register_modules(scheduler=getattr(diffusers, name).from_config(pipeline.scheduler.config))
    return pipeline


def walk(pipeline, seed=0, steps=4, trajectories=2, **call):
    """All steps of random trajectories side by side."""
    found = []
    random_trajectories(pipeline, Sampling(call), trajectories, seeded(seed), found.append, num_inference_steps=steps)
    return found


def same(a, b) -> bool:
    """Whether two recorded calls are equal, bit for bit."""
    pairs = zip(tensors_of((a.positional, a.named)), tensors_of((b.positional, b.named)), strict=True)
    return a.named.keys() == b.named.keys() and all(torch.equal(x, y) for x, y in pairs)


# --- exactly as the pipeline samples ---


@every_scheduler
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_trajectories_are_exactly_those_of_the_pipeline(pipeline, scheduler, guidance_scale):
    with_scheduler(pipeline, scheduler)
    generator = seeded(3)
    labels = torch.randint(3, (2,), generator=generator).tolist()
    with recorded_calls(pipeline.transformer) as recorder:
        pipeline(labels, generator=generator, num_inference_steps=4, guidance_scale=guidance_scale)
    steps = walk(pipeline, seed=3, guidance_scale=guidance_scale)
    calls = [call for step in steps for call in step.calls]
    assert [step.number for step in steps] == list(range(len(pipeline.scheduler.timesteps)))
    assert len(calls) == len(recorder.calls) >= 4
    assert all(same(*pair) for pair in zip(calls, recorder.calls, strict=True))


@every_scheduler
def test_a_recorded_call_made_again_answers_the_same(pipeline, scheduler):
    answers = []
    pipeline.transformer.register_forward_hook(lambda _, arguments, output: answers.append(output.sample))
    steps = walk(with_scheduler(pipeline, scheduler))
    with torch.no_grad():
        again = [call.run(pipeline.transformer) for step in steps for call in step.calls]
    assert all(torch.equal(*pair) for pair in zip(again, answers[: len(again)], strict=True))


def test_the_prediction_is_the_guided_one_that_the_scheduler_follows(pipeline):
    for step in walk(pipeline, guidance_scale=3.0):
        with torch.no_grad():
            conditional, unconditional = step.calls[0].run(pipeline.transformer).chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        assert all(torch.equal(half, guided) for half in step.prediction.chunk(2)) and step.num_samples == 2


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_guidance_up_to_one_is_the_conditional_prediction(pipeline, guidance_scale):
    for step in walk(pipeline, guidance_scale=guidance_scale):
        with torch.no_grad():
            assert torch.equal(step.prediction, step.calls[0].run(pipeline.transformer))
        assert len(step.prediction) == 2 and (step.calls[0].named["class_labels"] < 3).all()


def test_a_learned_variance_is_left_out():
    step = walk(new_pipeline(out_channels=8), guidance_scale=1.0)[0]
    assert step.calls[0].positional[0].shape == step.prediction.shape == (2, 4, 8, 8)


def test_the_latents_are_those_that_the_next_step_starts_from(pipeline):
    steps = walk(pipeline)
    assert all(torch.equal(step.latents, following.sample) for step, following in zip(steps, steps[1:], strict=False))


def test_same_seed_gives_the_same_trajectory(pipeline):
    first, again, other = walk(pipeline, 0), walk(pipeline, 0), walk(pipeline, 1)
    assert all(torch.equal(a.prediction, b.prediction) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].sample, other[0].sample)


@pytest.mark.parametrize("scheduler", UNSCALED)
def test_latents_that_are_given_back_are_gone_on_with(pipeline, scheduler):
    seen = []

    def led_back(step):
        seen.append(step)
        return torch.full_like(step.latents, step.number)

    random_trajectories(with_scheduler(pipeline, scheduler), Sampling(), 1, seeded(), led_back, num_inference_steps=3)
    for step in seen[1:]:
        assert torch.equal(step.sample, torch.full_like(step.sample, step.number - 1))


def test_the_conditions_are_those_that_were_asked_for(pipeline):
    seen = []
    sample_trajectories(pipeline, [2, 0, 1], seeded(), seen.append, num_inference_steps=2)
    assert all(step.calls[0].named["class_labels"].tolist() == [2, 0, 1, 1000, 1000, 1000] for step in seen)


# --- nothing shows afterwards ---


def state(pipeline) -> list:
    """All that watching could leave behind."""
    transformer = pipeline.transformer
    return [
        dict(vars(pipeline)),
        dict(pipeline.scheduler.config),
        {name: id(value) for name, value in vars(pipeline.scheduler).items()},
        dict(pipeline.config),
        [module.training for part in (transformer, pipeline.vae) for module in part.modules()],
        [
            "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
            for module in transformer.modules()
        ],
        [p.requires_grad for p in transformer.parameters()],
        torch.is_grad_enabled(),
    ]


@every_scheduler
@pytest.mark.parametrize("fails_at", [None, 0, 2], ids=["to the end", "fails at once", "fails later"])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_pipeline_is_left_as_it_was(pipeline, scheduler, fails_at, gradients):
    with_scheduler(pipeline, scheduler).transformer.train()
    before = state(pipeline)

    def watch(step):
        if step.number == fails_at:
            raise KeyboardInterrupt

    def sampled():
        walked = {"num_inference_steps": 4, "has_gradients": lambda number: gradients and number % 2 == 0}
        random_trajectories(pipeline, Sampling(), 2, seeded(), watch, **walked)

    if fails_at is None:
        sampled()
    else:
        with pytest.raises(KeyboardInterrupt):
            sampled()
    assert state(pipeline) == before and not any("forward" in vars(module) for module in pipeline.transformer.modules())


def test_the_scheduler_of_the_caller_is_at_the_step_where_it_was(pipeline):
    pipeline.scheduler.set_timesteps(7)
    timesteps = pipeline.scheduler.timesteps
    walk(pipeline)
    assert pipeline.scheduler.timesteps is timesteps and "step" not in vars(pipeline.scheduler)
    fresh = new_scheduler(pipeline)
    assert fresh is not pipeline.scheduler and fresh.config == pipeline.scheduler.config


def test_gradients_are_made_in_the_steps_that_were_asked_for(pipeline):
    seen = []
    random_trajectories(
        pipeline, Sampling(), 1, seeded(), lambda step: seen.append(step.prediction.requires_grad),
        num_inference_steps=4, has_gradients=lambda number: number in (0, 2),
    )  # fmt: skip
    assert seen == [True, False, True, False]


def live_tensors_at_the_end(pipeline, steps: int) -> int:
    """Counted in the last step, while the trajectory is alive."""
    counted = []

    def count(step):
        assert step.prediction is not None
        if step.number == steps - 1:
            gc.collect()
            tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            counted.append(sum(tensor.dim() > 0 for tensor in tensors))  # all times of a schedule are numbers made at once

    random_trajectories(pipeline, Sampling(), 1, seeded(), count, num_inference_steps=steps)
    return counted[0]


@pytest.mark.parametrize("scheduler", UNSCALED)
def test_memory_does_not_depend_on_the_number_of_steps(pipeline, scheduler):
    with_scheduler(pipeline, scheduler)
    counts = {steps: live_tensors_at_the_end(pipeline, steps) for steps in (5, 20)}
    assert counts[20] == counts[5] > 0


def test_a_pipeline_that_asks_its_scheduler_for_no_steps_is_refused(pipeline, monkeypatch):
    def call(self, class_labels, num_inference_steps=4, generator=None):
        return None

    monkeypatch.setattr(type(pipeline), "__call__", call)
    with pytest.raises(UnsupportedModelError, match="DiTPipeline does not ask its scheduler for steps"):
        walk(pipeline)


# --- recorded calls ---


def test_every_step_is_recorded_and_each_round_shows_some(pipeline):
    calls = record_calls(pipeline, Sampling(), 3, seeded(), num_inference_steps=6)
    assert [call.step for call in calls] == list(range(6))
    timesteps = [int(call.named["timestep"][0]) for call in calls]
    assert timesteps == sorted(set(timesteps), reverse=True)
    generator = seeded()
    for shown in range(ROUNDS):
        steps = []
        random_trajectories(pipeline, Sampling(), 3, generator, steps.append, num_inference_steps=6)
        for call, step in zip(calls[shown::ROUNDS], steps[shown::ROUNDS], strict=True):
            assert same(call, step.calls[0])


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_a_round_ends_with_the_last_step_that_it_shows(pipeline, rounds):
    shown, made = [], []
    handle = pipeline.transformer.register_forward_pre_hook(lambda *_: made.append(1))
    for number in range(rounds):
        random_trajectories(
            pipeline, Sampling(), 1, seeded(), lambda step: shown.append(step.number),
            num_inference_steps=STEPS, is_shown=shown_in(number, rounds),
        )  # fmt: skip
    handle.remove()
    assert sorted(shown) == list(range(STEPS))
    assert len(made) == steps_sampled(rounds) == {1: 10, 2: 19, 3: 27, 10: 55}[rounds]


def test_what_comes_again_in_every_step_is_kept_once(pipeline):
    calls = [step.calls[0] for step in walk(pipeline)]
    assert len({id(call.named["class_labels"]) for call in calls}) == 1
    assert len({id(call.positional[0]) for call in calls}) == len(calls)


def test_a_tensor_that_is_written_to_between_steps_is_recorded_as_it_was_at_each(pipeline):
    transformer, latents = pipeline.transformer, torch.zeros(1, 4, 8, 8)
    named = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([0])}
    with recorded_calls(transformer) as recorder, torch.no_grad():
        for _ in range(3):
            transformer(latents, **named)
            latents += 1
    assert [call.positional[0].mean().item() for call in recorder.calls] == [0, 1, 2]
    assert [(call.step, call.index) for call in recorder.calls] == [(0, 0), (0, 1), (0, 2)]


def test_so_many_trajectories_that_the_tokens_are_about_those_asked_for():
    sampling = Sampling(tokens=32)
    assert [num_trajectories_for(sampling, tokens, 10) for tokens in (1, 640, 6400)] == [1, 2, 20]
