"""Zero data: the teacher's own sampling trajectories.

No images are needed to calibrate a diffusion model: it makes its inputs itself (section 3.3 of VQ4DiT). The *pipeline* samples,
with its own conditioning, guidance and scheduler, and is watched in two places. Hooks on its transformers see every call. And
whatever guidance a pipeline does, in one batch, in two calls or by an embedded scale, it hands the prediction that it will
follow to `scheduler.step`: that is the guided prediction, and there gradients start.

Teacher and student both see the teacher's latents, so the student's errors do not add up along the way. The pipeline that is
watched is a shallow copy with a scheduler of its own: that of the caller stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vq4dit.denoisers import denoiser_of
from vq4dit.errors import UnsupportedModelError
from vq4dit.models.blocks import parts_of
from vq4dit.models.conditions import Condition, call_arguments, num_classes, random_conditions, undecorated_call
from vq4dit.models.denoiser_calls import DenoiserCall, map_tensors, recorded_calls
from vq4dit.models.prompts import PROMPTS
from vq4dit.quiet import without_remarks
from vq4dit.surroundings import evaluating

STEPS = 10  # denoising steps of a trajectory that `best` takes statistics of
ROUNDS = 2  # of trajectories that share the steps where statistics are taken: a trajectory's next step tells little that is new
FEWEST_PROMPTS = 16  # that a model of prompts is shown, as far as its steps can be shared among so many trajectories
LARGE = 10**8  # weights from which on a pass of the model is long, and activations fill the memory
NO_CALL: Mapping[str, Any] = MappingProxyType({})


class Sampling(NamedTuple):
    """How a pipeline is sampled to learn from it."""

    call: Mapping[str, Any] = NO_CALL  # arguments of its call: its size, and what a person wants
    prompts: Sequence[str] = PROMPTS
    tokens: int = 1  # rows that a layer sees in one step of one condition: all calls together


class GuidedStep(NamedTuple):
    """One denoising step of some trajectories side by side."""

    number: int  # of the trajectory's steps, from 0
    prediction: Tensor  # guided, as the scheduler is given it; with gradients where they were asked for
    sample: Tensor  # the latents it was made from
    latents: Tensor  # those that the scheduler makes of both
    weight: float  # what a relative error of the prediction does to the latents, see `step_weight`
    calls: list[DenoiserCall]
    num_samples: int  # side by side


def is_large(denoiser: nn.Module) -> bool:
    """Whether the model has `LARGE` weights or more."""
    return sum(p.numel() for p in denoiser.parameters()) >= LARGE


def new_scheduler(pipeline: Any) -> Any:
    """A scheduler of the pipeline's kind and settings, with a state of its own."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


class _Finished(Exception):
    """The last step that is looked at was made: what follows (further steps, decoding) need not run."""


def every_step(number: int) -> bool:
    """All steps of a trajectory are looked at."""
    return True


def sample_trajectories(
    pipeline: Any,
    conditions: Sequence[Condition],
    generator: torch.Generator,
    on_step: Callable[[GuidedStep], Tensor | None],
    *,
    num_inference_steps: int,
    call: Mapping[str, Any] = NO_CALL,
    is_shown: Callable[[int], bool] = every_step,
    has_gradients: Callable[[int], bool] = lambda number: False,
) -> None:
    """Let the pipeline sample these conditions side by side, up to the last step that is shown, and tell `on_step` of those.

    Args:
        generator: draws the noise on its own device, so trajectories do not depend on the model's.
        on_step: may return the next latents, which then take the place of those the scheduler found.
        call: further arguments of the pipeline's call.
        is_shown: which steps `on_step` is told.
        has_gradients: of which steps the prediction has a graph. No parameter takes part in it: whoever wants gradients lets
            the outputs of layers require them.

    Raises:
        UnsupportedModelError: if the pipeline does not ask its scheduler for steps.
    """
    watched = copy.copy(pipeline)
    watched.register_modules(scheduler=new_scheduler(pipeline))
    watched.set_progress_bar_config(disable=True)
    scheduler, step = watched.scheduler, watched.scheduler.step
    signature = inspect.signature(step)

    with recorded_calls(denoiser_of(watched), len(conditions)) as recorder:

        @functools.wraps(step)
        def watched_step(*positional: Any, **named: Any) -> Any:
            bound = signature.bind(*positional, **named)
            prediction, sample = bound.arguments["model_output"], bound.arguments["sample"].detach()
            result, gain = _step_and_gain(step, bound)
            number = recorder.step
            _forget_graphs(scheduler)
            weight = step_weight(gain, prediction, sample)
            latents = _sample_of(result).detach()
            made = GuidedStep(number, prediction, sample, latents, weight, recorder.take(), len(conditions))
            replaced = on_step(made) if is_shown(number) else None
            if not any(map(is_shown, range(recorder.step, len(scheduler.timesteps)))):
                raise _Finished
            torch.set_grad_enabled(has_gradients(recorder.step))
            return _with_sample(result, replaced)

        scheduler.step = watched_step
        arguments = call_arguments(watched, conditions, num_inference_steps, generator, call)
        with torch.set_grad_enabled(has_gradients(0)), evaluating(*parts_of(watched)), without_remarks():
            try:
                undecorated_call(type(watched))(watched, **arguments)
            except _Finished:
                pass
        if not recorder.step:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} does not ask its scheduler for steps, so its trajectories cannot be watched: "
                "choose the recipe kmeans, which needs none"
            )


def _step_and_gain(step: Callable[..., Any], bound: inspect.BoundArguments) -> tuple[Any, float | None]:
    """A scheduler's step, and by how much an error in the prediction comes out of it again: ∂ next latents / ∂ prediction."""
    prediction = bound.arguments["model_output"].detach().requires_grad_()
    with torch.enable_grad():
        arguments = {**bound.arguments, "model_output": prediction * 1, "sample": bound.arguments["sample"].detach()}
        bound = inspect.BoundArguments(bound.signature, type(bound.arguments)(arguments))
        result = step(*bound.args, **bound.kwargs)
        latents = _sample_of(result)
        if not latents.requires_grad:
            return result, None
        (slope,) = torch.autograd.grad(latents.float().sum(), prediction, allow_unused=True)
    if slope is None:
        return result, None
    return result, slope.float().square().mean().sqrt().item()


def _forget_graphs(scheduler: Any) -> None:
    """What a scheduler remembers of its steps becomes plain tensors: otherwise each would hold on to all before it."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor | list):
            setattr(scheduler, name, map_tensors(Tensor.detach, value))


def _sample_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _with_sample(result: Any, replaced: Tensor | None) -> Any:
    """A scheduler's result without a graph, with the latents replaced by others if there are."""
    latents = (_sample_of(result) if replaced is None else replaced).detach()
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result


def step_weight(gain: float | None, prediction: Tensor, sample: Tensor) -> float:
    """What a relative error of this step's prediction does to the latents, relative to their size.

    An error e of the prediction ε̂ enters the latents x as (∂x'/∂ε̂) e. Of DDIM, where x has unit variance and σ is the noise of
    x/sqrt(ᾱ), that is Δ asinh(σ) e; of flow matching dt / sqrt((1-t)² + t²) e, the same number for the same step. With r the
    error relative to ε̂, and errors of neighbouring steps alike so that they add up, by Cauchy and Schwarz

        (Σ a r)² <= (Σ a) (Σ a r²),    a = |∂x'/∂ε̂| rms(ε̂) / rms(x)

    so squares count by a: a step weighs what the two would into which it could be split.
    """
    size = sample.float().square().mean().sqrt().clamp(min=1e-12)
    power = prediction.detach().float().square().mean().sqrt()
    weight = (power / size * (1.0 if gain is None else gain)).item()
    return weight if weight < float("inf") else 1.0  # also where it is no number


def random_trajectories(
    pipeline: Any,
    sampling: Sampling,
    count: int,
    generator: torch.Generator,
    on_step: Callable[[GuidedStep], Tensor | None],
    *,
    num_inference_steps: int,
    is_shown: Callable[[int], bool] = every_step,
    has_gradients: Callable[[int], bool] = lambda number: False,
) -> None:
    """`sample_trajectories` of `count` random conditions, drawn by the same generator."""
    sample_trajectories(
        pipeline,
        random_conditions(pipeline, count, generator, sampling.prompts),
        generator,
        on_step,
        num_inference_steps=num_inference_steps,
        call=sampling.call,
        is_shown=is_shown,
        has_gradients=has_gradients,
    )


def num_trajectories_for(sampling: Sampling, tokens: int, num_inference_steps: int) -> int:
    """How many trajectories show about that many tokens in all their steps together."""
    return max(1, round(tokens / (num_inference_steps * sampling.tokens)))


def num_rounds_for(pipeline: Any, count: int) -> int:
    """In how many rounds of `count` trajectories the steps are shown, so that there are prompts enough; classes always are."""
    return num_rounds(count, has_prompts=not num_classes(pipeline))


def num_rounds(count: int, *, has_prompts: bool) -> int:
    """The same of any pipeline of prompts, or of classes."""
    return min(STEPS, max(ROUNDS, -(-FEWEST_PROMPTS // count))) if has_prompts else ROUNDS


def shown_in(shown: int, rounds: int) -> Callable[[int], bool]:
    """Which steps round number `shown` of some rounds shows: every `rounds`-th one."""
    return lambda number: number % rounds == shown


def steps_sampled(rounds: int) -> int:
    """Steps of all rounds together, of trajectories of `STEPS`: a round ends with the last step that it shows."""
    return sum(max(filter(shown_in(shown, rounds), range(STEPS))) + 1 for shown in range(rounds))


def record_calls(
    pipeline: Any,
    sampling: Sampling,
    count: int,
    generator: torch.Generator,
    *,
    num_inference_steps: int = STEPS,
    on_step: Callable[[], None] = lambda: None,
) -> list[DenoiserCall]:
    """Calls of every step, in order, those of several rounds of `count` trajectories in turn."""
    calls: list[DenoiserCall] = []

    def keep(step: GuidedStep) -> None:
        calls.extend(step.calls)
        on_step()

    rounds = num_rounds_for(pipeline, count)
    for shown in range(rounds):
        random_trajectories(
            pipeline,
            sampling,
            count,
            generator,
            keep,
            num_inference_steps=num_inference_steps,
            is_shown=shown_in(shown, rounds),
        )
    return sorted(calls, key=lambda call: (call.step, call.index))
