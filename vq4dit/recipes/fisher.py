"""The output Fisher: which outputs of a layer the guided prediction is sensitive to.

If the output y of a layer is off by δ, the guided prediction ε̂ of a step is off by J δ, and

    E || J δ ||² / E || ε̂ ||²  ≈  tr(B E[δ δᵀ]),    B = E[g gᵀ],    g = Jᵀ v / rms(ε̂),    v ~ N(0, I)

since E[v vᵀ] = I: one backward pass with random v stands for all outputs at once (Hutchinson's estimate of the Gauss-Newton
matrix, averaged over tokens). B says which outputs matter (its diagonal) and which errors cancel or add up (the rest). What
the transformer predicts before guidance is compared as well: guidance alone would let it forget what all conditions share.
Steps count by what their error does to the latents (`trajectories.step_weight`): otherwise the last one, which hardly moves the
image, would decide half of everything. A trajectory's next step tells little that is new, so each shows only some of its steps.

It takes many gradients to know B, and layers that see no tokens have one for an image, not one for a token, so for them the
later steps, where g² is largest, are probed with several v. Of large models, where a matrix for every layer would fill the
memory, only the diagonal is kept.

Layers that see no tokens know by their inputs which step it is, so for them it is kept how g² changes from step to step. And
that errors of different tokens add up, or cancel, is told by combinations of the gradients of the weights (`kronecker.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import EntropyCodingConfig
from vq4dit.denoisers import denoiser_of, transformers_in
from vq4dit.devices import exact
from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.linear_maps import matrix_shape, tokens_of
from vq4dit.models.blocks import parts_of
from vq4dit.models.denoiser_calls import prediction_of
from vq4dit.models.trajectories import (
    STEPS,
    GuidedStep,
    Sampling,
    is_large,
    num_rounds_for,
    num_trajectories_for,
    random_trajectories,
    shown_in,
)
from vq4dit.recipes.kronecker import GradientSketches
from vq4dit.surroundings import without_parameter_gradients


class Sensitivities(NamedTuple):
    """How much errors in the outputs of layers matter, by the layers' names."""

    outputs: dict[str, Float[Tensor, " rows"] | Float[Tensor, "rows rows"]]  # B or its diagonal; layers compare
    steps: dict[str, Float[Tensor, "steps calls 2"]]  # of layers without tokens: weighted E[g²] by step, call, half of its rows
    gradients: dict[str, Float[Tensor, "2 n width"]]  # combinations of rows of the weights' gradients (`kronecker.py`)


def output_sensitivities(
    pipeline: Any,
    names: Sequence[str],
    sampling: Sampling,
    generator: torch.Generator,
    config: EntropyCodingConfig,
    on_step: Callable[[], None] = lambda: None,
) -> Sensitivities:
    """B of the named linears, or its diagonal where no more is known, summed over all tokens of an image.

    Calls `on_step` after each of `num_steps` denoising steps.
    """
    denoiser = denoiser_of(pipeline)
    large = is_large(denoiser)
    found: dict[str, Tensor] = {}
    steps: dict[str, dict[tuple[int, int], Tensor]] = {}
    signs = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    sketches = {name: GradientSketches(signs) for name in names}

    def add(name: str, inputs: Tensor, gradient: Tensor, probe: Probe) -> None:
        if gradient.ndim == 2:
            halves = torch.stack([half.float().square().mean() for half in _halves(gradient)]) * probe.weight / probe.among
            seen = steps.setdefault(name, {})
            seen[probe.step, probe.call] = seen.get((probe.step, probe.call), 0) + halves
        elif probe.number > 0:  # one probe tells enough: each of many tokens has a gradient
            return
        rows = gradient.flatten(0, -2).float()
        total = rows.square().sum(0) if large else rows.T @ rows
        weight = probe.weight / (probe.among if gradient.ndim == 2 else 1)
        if name in found:
            diagonal = found[name] if large else found[name].diagonal()
            sketches[name].hear(inputs.flatten(0, -2).float(), rows, (probe.step, probe.number), weight, diagonal)
        found[name] = found.get(name, 0) + exact(total) * weight

    count = num_trajectories_for(sampling, config.sensitivity_tokens, STEPS)
    probe_outputs(
        pipeline,
        names,
        add,
        generator,
        sampling=sampling,
        num_trajectories=count,
        together=num_trajectories_for(sampling, config.sensitivity_tokens_together, STEPS),
        rounds=num_rounds_for(pipeline, count),
        num_inference_steps=STEPS,
        on_step=lambda step: on_step(),
        probes=config.probes,
        before_guidance=True,
    )
    rows = {name: matrix_shape(denoiser.get_submodule(name))[0] for name in names}
    known = {name: of_layer for name, sketch in sketches.items() if (of_layer := sketch.found()) is not None}
    return Sensitivities(_known(found, rows), {name: _known_steps(of) for name, of in steps.items()}, known)


def num_steps(sampling: Sampling, config: EntropyCodingConfig) -> int:
    """Denoising steps that `output_sensitivities` takes gradients of: each of a trajectory in one round or another."""
    trajectories = num_trajectories_for(sampling, config.sensitivity_tokens, STEPS)
    return STEPS * math.ceil(trajectories / num_trajectories_for(sampling, config.sensitivity_tokens_together, STEPS))


class Probe(NamedTuple):
    """Which random v of which step of a trajectory a gradient belongs to, and how much the step counts for the image."""

    step: int
    number: int
    among: int
    weight: float  # of the step
    call: int = 0  # of the transformer's in this step


def probe_outputs(
    pipeline: Any,
    names: Sequence[str],
    listen: Callable[[str, Tensor, Tensor, Probe], None],
    generator: torch.Generator,
    *,
    sampling: Sampling,
    num_trajectories: int,
    together: int,
    rounds: int = 1,
    num_inference_steps: int,
    on_step: Callable[[GuidedStep], None] = lambda step: None,
    probes: Sequence[int] = (1,),
    before_guidance: bool = False,
) -> None:
    """Sample, and tell `listen` name, input x and output gradient g of the named linears, for every v of every step.

    x and g are (rows, tokens, width), or (rows, width) without tokens. g is that of v·ε̂ / rms(ε̂) of the guided prediction ε̂.
    Holds the activations of one step for its backward pass: about (tokens, 28 width) fp32 for every block, where tokens are
    those of the trajectories side by side; of large models only the inputs of linears, (tokens, 8 width). No gradient of a
    parameter is made or left. Calls `on_step` after each step.

    Args:
        num_trajectories: of each round.
        together: how many of them are sampled side by side; the others follow.
        rounds: each of them shows only every `rounds`-th step; together they show all.
        probes: how many v each step has; further steps have as many as the last one named.
        before_guidance: whether what the transformer predicts in each call is compared as well.
    """
    teacher = denoiser_of(pipeline)
    probing = _Probing(listen, Probe(0, 0, 1, 1.0))
    directions = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def backward(step: GuidedStep) -> None:
        if not step.prediction.requires_grad:
            raise UnsupportedModelError(
                f"the prediction of {type(pipeline).__name__} has no gradient at its scheduler, so what matters cannot be "
                "measured: choose the recipe kmeans, which needs no gradients"
            )
        compared = [_relative(step.prediction)]
        if before_guidance:
            compared += [_relative(part) for part in _followed(probing.predictions, step.prediction, directions)]
        among = probes[min(step.number, len(probes) - 1)]
        for number in range(among):
            probing.probe = Probe(step.number, number, among, step.weight)
            total = torch.stack([(_direction(part, directions) * part).sum() for part in compared]).sum()
            total.backward(retain_graph=number + 1 < among)
        probing.begin()
        on_step(step)

    with probing.watching(teacher, names), without_parameter_gradients(*parts_of(pipeline)), _checkpointed(teacher):
        for shown, first in product(range(rounds), range(0, num_trajectories, together)):
            is_shown = shown_in(shown, rounds)
            random_trajectories(
                pipeline,
                sampling,
                min(together, num_trajectories - first),
                generator,
                backward,
                num_inference_steps=num_inference_steps,
                is_shown=is_shown,
                has_gradients=is_shown,
            )


class _Probing:
    """What is heard between two steps: which call of the transformer it is, and what it predicted."""

    def __init__(self, listen: Callable[[str, Tensor, Tensor, Probe], None], probe: Probe):
        self.listen, self.probe = listen, probe
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self.predictions: list[Tensor] = []

    @contextmanager
    def watching(self, teacher: nn.Module, names: Sequence[str]) -> Iterator[None]:
        handles = [teacher.get_submodule(name).register_forward_hook(partial(self.follow, name)) for name in names]
        handles += [transformer.register_forward_hook(self.note) for transformer in transformers_in(teacher).values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, _: nn.Module, arguments: tuple, output: Any) -> None:
        if torch.is_grad_enabled():
            self.predictions.append(prediction_of(output))

    def follow(self, name: str, linear: nn.Module, arguments: tuple, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:  # nothing before it does: the graph begins here
            output.requires_grad_()
        inputs, call = tokens_of(linear, arguments[0].detach()), len(self.predictions)

        def listen(gradient: Tensor) -> None:
            self.listen(name, inputs, tokens_of(linear, gradient), self.probe._replace(call=call))

        output.register_hook(listen)


def _followed(predictions: Sequence[Tensor], guided: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Of what the transformer predicted in each call, what the guided prediction follows: no learned variance, say."""
    direction = _direction(guided, generator)
    slopes = torch.autograd.grad((direction * guided).sum(), predictions, retain_graph=True, allow_unused=True)
    return [p * (slope != 0) for p, slope in zip(predictions, slopes, strict=True) if slope is not None and slope.any()]


def _relative(prediction: Tensor) -> Tensor:
    """ε̂ / rms(ε̂)."""
    prediction = prediction.float()
    return prediction / prediction.detach().square().mean().sqrt().clamp(min=1e-12)


def _direction(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _halves(gradient: Tensor) -> tuple[Tensor, ...]:
    """Both halves of a batch's rows: guidance puts what has a condition into one and what has none into the other."""
    return gradient.chunk(2) if len(gradient) > 1 else (gradient, gradient)


@contextmanager
def _checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: in large models activations inside a block are not held, but made again for the backward pass."""
    models: list[Any] = list(transformers_in(denoiser).values()) if is_large(denoiser) else []
    able = [m for m in models if getattr(m, "_supports_gradient_checkpointing", False) and not m.is_gradient_checkpointing]
    for model in able:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for model in able:
            model.disable_gradient_checkpointing()


def _known(found: dict[str, Tensor], rows: dict[str, int]) -> dict[str, Float[Tensor, " rows"] | Float[Tensor, "rows rows"]]:
    """Fallbacks: no gradient -> the smallest known mean of all layers, for all rows alike; not finite -> the largest."""
    means = {name: (total.diagonal() if total.ndim == 2 else total).mean().item() for name, total in found.items()}
    finite = {name for name, total in found.items() if torch.isfinite(total).all()}
    known = [means[name] for name in finite if means[name] > 0]
    least, scale = min(known, default=1.0), max(known, default=1.0)  # by which all fit fp32

    def of(name: str) -> Tensor:
        if name in finite and means[name] > 0:
            return (found[name] / scale).float()
        device = found[name].device if name in found else None
        return torch.full((rows[name],), 1.0 if name in found and name not in finite else least / scale, device=device)

    return {name: of(name) for name in rows}


def _known_steps(power_of: dict[tuple[int, int], Tensor]) -> Float[Tensor, "steps calls 2"]:
    steps, calls = (1 + max(key[axis] for key in power_of) for axis in (0, 1))
    power = torch.zeros(steps, calls, 2, device=next(iter(power_of.values())).device)
    for (step, call), halves in power_of.items():
        power[step, call] = halves
    known = torch.isfinite(power).all() and power.sum() > 0
    return power / power.sum() if known else torch.ones_like(power)
