"""Which outputs of a layer matter: how much the guided noise minds an error in them.

If the output y of a layer is off by δ, the guided noise ε̂_s (of guidance scale s) of a step is off by J δ, and

    Σ_s E || J δ ||² / E || ε̂_s ||²  ≈  tr(B E[δ δᵀ]),    B = E[g gᵀ],    g = Σ_s Jᵀ v_s / rms(ε̂_s),    v_s ~ N(0, I)

since E[v vᵀ] = I: one backward pass with random v stands for all outputs at once (Hutchinson's estimate of the Gauss-Newton
matrix, averaged over tokens). B says which outputs matter (its diagonal) and which errors cancel or add up (the rest). Steps
count by what their noise does to the image (`zero_data.image_weights`): otherwise the last one, which hardly moves the image,
would decide half of everything. A trajectory's next step tells little that is new, so each shows only some of its steps.

It takes many gradients to know B, and layers that see no tokens have one for an image, not one for a token, so for them the
later steps, where g² is largest, are probed with several v. Of large models, where a matrix for every layer would fill the
memory, only the diagonal is kept.

Layers that see no tokens know by their inputs which step it is, so for them it is kept how g² changes from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import EntropyCodingConfig
from vq4dit.devices import exact
from vq4dit.models.zero_data import (
    ROUNDS,
    STEPS,
    TeacherStep,
    guide,
    is_large,
    new_scheduler,
    num_trajectories_for,
    predicted_noise,
    teacher_steps,
)
from vq4dit.surroundings import evaluating


class Sensitivities(NamedTuple):
    """How much errors in the outputs of layers matter, by the layers' names."""

    outputs: dict[str, Float[Tensor, " rows"] | Float[Tensor, "rows rows"]]  # B or its diagonal; layers compare
    steps: dict[str, Float[Tensor, "steps 2"]]  # of layers without tokens: weighted E[g²] by step, with a class and with none


def output_sensitivities(
    pipeline: DiTPipeline,
    names: Sequence[str],
    guidance_scale: float,
    generator: torch.Generator,
    config: EntropyCodingConfig,
    on_step: Callable[[], None] = lambda: None,
) -> Sensitivities:
    """B of the named linears, or its diagonal where no more is known, summed over all tokens of an image.

    Calls `on_step` after each of `num_steps` denoising steps.
    """
    large = is_large(pipeline.transformer)
    found: dict[str, Tensor] = {}
    steps: dict[str, dict[int, Tensor]] = {}

    def add(name: str, inputs: Tensor, gradient: Tensor, probe: Probe) -> None:
        if gradient.ndim == 2:
            halves = torch.stack([half.float().square().mean() for half in gradient.chunk(2)]) * probe.weight / probe.among
            seen = steps.setdefault(name, {})
            seen[probe.step] = seen.get(probe.step, 0) + halves
        elif probe.number > 0:  # one probe tells enough: each of many tokens has a gradient
            return
        rows = gradient.flatten(0, -2).float()
        total = rows.square().sum(0) if large else rows.T @ rows
        found[name] = found.get(name, 0) + exact(total) * probe.weight / (probe.among if gradient.ndim == 2 else 1)

    probe_outputs(
        pipeline,
        names,
        add,
        generator,
        num_trajectories=num_trajectories_for(pipeline, config.sensitivity_tokens, STEPS),
        together=num_trajectories_for(pipeline, config.sensitivity_tokens_together, STEPS),
        rounds=ROUNDS,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        compared_scales=(1.0, guidance_scale),  # the plain prediction, and what tells a class from none
        on_step=on_step,
        probes=config.probes,
    )
    return Sensitivities(_known(found), {name: _known_steps(of) for name, of in steps.items()})


def num_steps(pipeline: DiTPipeline, config: EntropyCodingConfig) -> int:
    """Denoising steps that `output_sensitivities` takes gradients of: each of a trajectory in one round or another."""
    trajectories = num_trajectories_for(pipeline, config.sensitivity_tokens, STEPS)
    return STEPS * math.ceil(trajectories / num_trajectories_for(pipeline, config.sensitivity_tokens_together, STEPS))


class Probe(NamedTuple):
    """Which random v of which step of a walk a gradient belongs to, and how much the step counts for the image."""

    step: int
    number: int
    among: int
    weight: float  # of the step


def probe_outputs(
    pipeline: DiTPipeline,
    names: Sequence[str],
    listen: Callable[[str, Tensor, Tensor, Probe], None],
    generator: torch.Generator,
    *,
    num_trajectories: int,
    together: int,
    rounds: int = 1,
    num_inference_steps: int,
    guidance_scale: float,
    compared_scales: Sequence[float],
    on_step: Callable[[], None] = lambda: None,
    probes: Sequence[int] = (1,),
) -> None:
    """Walk the teacher and tell `listen` name, input x and output gradient g of the named linears, for every v of every step.

    x and g are (rows, tokens, width), or (rows, width) without tokens, where rows are the trajectories with a class, then the
    same with none. g is that of Σ_s v_s·ε̂_s / rms(ε̂_s) over the `compared_scales`. Holds the activations of one step for its
    backward pass: about (tokens, 28 width) fp32 for every block, where tokens are those of the trajectories side by side; of
    large models only the inputs of linears, (tokens, 8 width). No gradient of a parameter is made or left. Calls `on_step`
    after each step.

    Args:
        num_trajectories: of each round.
        together: how many of them are walked side by side; the others follow.
        rounds: each of them shows only every `rounds`-th step; together they show all.
        probes: how many v each step has; further steps have as many as the last one named.
    """
    teacher = pipeline.transformer
    probe = Probe(0, 0, 1, 1.0)

    def follow(name: str, inputs: Tensor, output: Tensor) -> None:
        if not output.requires_grad:  # nothing before it does: the graph begins here
            output.requires_grad_()
        output.register_hook(lambda gradient: listen(name, inputs.detach(), gradient, probe))

    directions = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    with _listening(teacher, names, follow), _without_parameter_gradients(teacher):
        for shown, first in product(range(rounds), range(0, num_trajectories, together)):
            walk = teacher_steps(
                pipeline,
                generator,
                num_trajectories=min(together, num_trajectories - first),
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                shown=slice(shown, None, rounds),
            )
            with closing(walk):
                for step in walk:
                    among = probes[min(step.number, len(probes) - 1)]
                    with torch.enable_grad(), evaluating(teacher), _frugal(teacher):
                        noises = _relative_noises(pipeline, step, compared_scales)
                        for probe in (Probe(step.number, which, among, step.weight) for which in range(among)):
                            v = torch.randn(noises.shape, generator=directions).to(noises.device)
                            (v * noises).sum().backward(retain_graph=probe.number + 1 < among)
                    on_step()


@contextmanager
def _listening(teacher: nn.Module, names: Sequence[str], listen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """For a while `listen` is told the name, the input and the output of the named linears, whenever they run."""
    handles = [
        teacher.get_submodule(name).register_forward_hook(
            lambda _, arguments, output, name=name: listen(name, arguments[0], output)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """For a while no parameter takes a gradient; afterwards those do that did."""
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextmanager
def _frugal(transformer: Any) -> Iterator[None]:
    """In large models activations inside a block are not held for the backward pass, but made again when it gets there."""
    if not is_large(transformer) or transformer.is_gradient_checkpointing:
        yield
        return
    transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def _known(found: dict[str, Tensor]) -> dict[str, Float[Tensor, " rows"] | Float[Tensor, "rows rows"]]:
    """Where nothing is known all rows count the same.

    They count as little as those of any other layer if the noise does not depend on them, and as much if a gradient was too
    large to be told.
    """
    means = {name: (total.diagonal() if total.ndim == 2 else total).mean().item() for name, total in found.items()}
    finite = {name for name, total in found.items() if torch.isfinite(total).all()}
    known = [means[name] for name in finite if means[name] > 0]
    least, scale = min(known, default=1.0), max(known, default=1.0)  # by which all fit fp32

    def of(name: str, total: Tensor) -> Tensor:
        if name in finite and means[name] > 0:
            return (total / scale).float()
        return torch.full((len(total),), least / scale if name in finite else 1.0, device=total.device)

    return {name: of(name, total) for name, total in found.items()}


def _known_steps(power_of: dict[int, Tensor]) -> Float[Tensor, "steps 2"]:
    power = torch.stack([power_of[step] for step in sorted(power_of)])
    known = torch.isfinite(power).all() and power.sum() > 0
    return power / power.sum() if known else torch.ones_like(power)


def _relative_noises(pipeline: DiTPipeline, step: TeacherStep, scales: Sequence[float]) -> Float[Tensor, "scales b c h w"]:
    """ε̂_s / rms(ε̂_s) for each guidance scale s, by a pass of the teacher that can be gone back."""
    half = len(step.latents) // 2
    scheduler, channels = new_scheduler(pipeline), pipeline.transformer.config.in_channels
    prediction = pipeline.transformer(step.latents, timestep=step.timesteps, class_labels=step.class_labels).sample
    found = []
    for scale in scales:
        guided = guide(prediction, scale, channels)
        noise = predicted_noise(guided, step.latents[:half], step.timesteps[:half], scheduler).float()
        found.append(noise / noise.detach().square().mean().sqrt().clamp(min=1e-12))
    return torch.stack(found)
