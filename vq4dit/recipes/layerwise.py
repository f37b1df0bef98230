"""Quantize layer after layer, each one making good what those before it got wrong.

Teacher and student (the copy that is being quantized) go through the blocks side by side, on latents of zero-data
trajectories. When a layer's turn comes, its inputs are known: x in the teacher, x̃ in the student, behind all that is
quantized already. The layer gets a corrected weight

    W* = W + α W Cov(x - x̃, x̃) Cov(x̃, x̃)⁻¹

which at α = 1 is the best linear answer to the student's inputs (GPTAQ, arXiv:2504.02692); α = 1/2 measured better, since
the whole correction fits the few latents too closely. W* is then quantized by error feedback under the covariance of the
student's inputs: what a mean input makes wrong, the bias makes good, so errors in its direction cost nothing.

Layers that see no tokens (adaLN: their input depends on timestep and class only) are fitted on *every* class, and a step
counts by how much the noise minds an error in it. All that is
in memory besides the two models is one walk's hidden states and one block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import EntropyCodingConfig
from vq4dit.devices import exact, exact_device
from vq4dit.models.blocks import named_blocks
from vq4dit.models.zero_data import STEPS, BlockCall, num_trajectories_for, record_block_calls
from vq4dit.recipes.bit_allocation import RateCurve
from vq4dit.recipes.gptq import ErrorFeedback, QuantizedWeight, damp, quantize_weight
from vq4dit.surroundings import evaluating


class InputStatistics(NamedTuple):
    """What a layer must know of its inputs x (teacher) and x̃ (student)."""

    covariance: Float[Tensor, "columns columns"]  # Cov(x̃, x̃)
    drift: Float[Tensor, "columns columns"]  # Cov(x - x̃, x̃)
    teacher_mean: Float[Tensor, " columns"]
    student_mean: Float[Tensor, " columns"]

    def to(self, device: torch.device) -> InputStatistics:
        return InputStatistics(*(values.to(device) for values in self))

    def about_zero(self) -> tuple[Float[Tensor, "columns columns"], Float[Tensor, "columns columns"]]:
        """E[x̃ x̃ᵀ] and E[(x - x̃) x̃ᵀ]: what counts where no bias makes a mean error good."""
        mean = self.student_mean
        return self.covariance + torch.outer(mean, mean), self.drift + torch.outer(self.teacher_mean - mean, mean)


class LayerGroup(NamedTuple):
    """Linears that read the same input (q, k, v), and how to get its statistics when they are wanted."""

    names: list[str]
    statistics: Callable[[], InputStatistics]


def calibration_walk(
    pipeline: DiTPipeline,
    guidance_scale: float,
    generator: torch.Generator,
    config: EntropyCodingConfig,
    on_step: Callable[[], None] = lambda: None,
) -> list[BlockCall]:
    """As many trajectories as show about `config.tokens` tokens; calls `on_step` after each of their `STEPS` steps."""
    return record_block_calls(
        pipeline,
        generator,
        num_trajectories=num_trajectories_for(pipeline, config.tokens, STEPS),
        guidance_scale=guidance_scale,
        num_inference_steps=STEPS,
        on_step=on_step,
    )


def groups_in_turn(
    teacher: nn.Module,
    student: nn.Module,
    walk: Sequence[BlockCall],
    names: Sequence[str],
    step_weights: Mapping[str, Float[Tensor, "steps 2"]] = MappingProxyType({}),
) -> Iterator[LayerGroup]:
    """The named layers in order of execution, in groups that read the same input.

    Args:
        step_weights: how much each step of the walk counts for a layer that sees no tokens, with a class and with none.

    Whoever takes a group must put its quantized layers into `student` before asking for the next one.
    """
    teacher_states = student_states = [call.hidden for call in walk]
    for block_name, block in named_blocks(teacher).items():
        twin = student.get_submodule(block_name)
        wanted = [name.removeprefix(f"{block_name}.") for name in names if name.startswith(f"{block_name}.")]
        inputs, teacher_outputs = _inputs_of(block, wanted, teacher_states, walk)
        for group in _sharing_an_input(inputs):
            weights = step_weights.get(f"{block_name}.{group[0]}")
            statistics = partial(_group_statistics, group[0], block, twin, inputs[group[0]], student_states, walk, weights)
            yield LayerGroup([f"{block_name}.{name}" for name in group], statistics)
        teacher_states = teacher_outputs
        student_states = teacher_states if twin is block else _inputs_of(twin, [], student_states, walk)[1]


def _group_statistics(
    name: str,
    block: nn.Module,
    twin: nn.Module,
    teacher_inputs: list[Tensor],
    student_states: list[Tensor],
    walk: Sequence[BlockCall],
    step_weights: Float[Tensor, "steps 2"] | None,
) -> InputStatistics:
    if teacher_inputs[0].ndim == 2:  # no tokens: the same in teacher and student, and every class can be tried
        every = [call.of_every_class() for call in walk]
        conditioning = _input_of(block, name, [call.hidden for call in every], every)
        return _statistics(conditioning, conditioning, step_weights)
    return _statistics(teacher_inputs, teacher_inputs if twin is block else _input_of(twin, name, student_states, walk))


def rate_curve(
    linear: nn.Linear,
    statistics: InputStatistics,
    sensitivity: Float[Tensor, " rows"] | Float[Tensor, "rows rows"],
    config: EntropyCodingConfig,
) -> RateCurve:
    """How many bits this linear takes at each cost of an error."""
    device = exact_device(linear.weight.device)  # that of all error feedback
    statistics, weight = statistics.to(device), linear.weight.detach().float().to(device)
    moments = statistics.about_zero()[0] if linear.bias is None else statistics.covariance
    return ErrorFeedback(moments, sensitivity.to(device), config).rate_curve(weight)


def fit_layer(
    linear: nn.Linear,
    statistics: InputStatistics,
    sensitivity: Float[Tensor, " rows"] | Float[Tensor, "rows rows"],
    bits: float,
    config: EntropyCodingConfig,
) -> tuple[QuantizedWeight, Float[Tensor, " rows"] | None]:
    """Quantize one linear for the inputs it will see; returns the weight and the bias (None if it has none).

    Args:
        sensitivity: how much an error in each output counts, or in each two of them together (`output_sensitivities`).
        bits: what its integers may take, all together.
    """
    device = exact_device(linear.weight.device)
    statistics, weight = statistics.to(device), linear.weight.detach().float().to(device)
    moments, drift = statistics.about_zero() if linear.bias is None else statistics[:2]
    correction = torch.linalg.solve(damp(moments, config.damping), (weight @ drift).T).T
    corrected = weight + config.input_correction * correction
    quantized = quantize_weight(corrected, moments, sensitivity.to(device), bits, config)
    if linear.bias is None:
        return quantized, None
    mean_error = weight @ statistics.teacher_mean - quantized.weight() @ statistics.student_mean
    return quantized, linear.bias.detach().float().to(device) + mean_error


def _inputs_of(
    block: nn.Module, names: Sequence[str], states: list[Tensor], walk: Sequence[BlockCall]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Run a block over the walk: inputs of the named linears in order of execution, and the block's outputs."""
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.setdefault(name, []).append(arguments[0])
        )
        for name in names
    ]
    try:
        with torch.no_grad(), evaluating(block):
            outputs = [call.run(block, hidden) for call, hidden in zip(walk, states, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


class _Seen(Exception):
    """The input that was waited for is known: the rest of the block need not run."""


def _input_of(block: nn.Module, name: str, states: list[Tensor], walk: Sequence[BlockCall]) -> list[Tensor]:
    """The inputs of one linear of a block; what comes behind it does not run."""
    inputs: list[Tensor] = []

    def record(_: nn.Module, arguments: tuple) -> None:
        inputs.append(arguments[0])
        raise _Seen

    handle = block.get_submodule(name).register_forward_pre_hook(record)
    try:
        with torch.no_grad(), evaluating(block):
            for call, hidden in zip(walk, states, strict=True):
                with suppress(_Seen):
                    call.run(block, hidden)
    finally:
        handle.remove()
    return inputs


def _sharing_an_input(inputs: dict[str, list[Tensor]]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name, seen in inputs.items():
        if groups and inputs[groups[-1][0]][0] is seen[0]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _statistics(
    teacher: list[Tensor], student: list[Tensor], step_weights: Float[Tensor, "steps 2"] | None = None
) -> InputStatistics:
    """Means over all rows of all steps, one step after the other: no copy of them all is made.

    Means first, then products of what differs from them: a difference of large products would lose a small covariance.
    """
    columns, device = student[0].shape[-1], student[0].device
    weights = [None] * len(student) if step_weights is None else step_weights
    shares = [_shares(x, of_step) for x, of_step in zip(student, weights, strict=True)]
    total = torch.stack([share.sum() for share in shares]).sum()
    if not total > 0:  # of these steps none counts
        return _statistics(teacher, student)
    teacher_mean, student_mean = (
        (sum(share @ exact(x.reshape(-1, columns)) for share, x in zip(shares, steps, strict=True)) / total).float().to(device)
        for steps in (teacher, student)
    )
    covariance = torch.zeros(columns, columns, device=device)
    drift = covariance.clone()
    for share, *pair in zip(shares, teacher, student, strict=True):
        x, seen = (
            rows.reshape(-1, columns).float() - mean for rows, mean in zip(pair, (teacher_mean, student_mean), strict=True)
        )
        weighted = seen * (share / total).float().to(device).unsqueeze(1)
        covariance.addmm_(weighted.T, seen)
        if teacher is not student:
            drift.addmm_((x - seen).T, weighted)
    return InputStatistics(covariance, drift, teacher_mean, student_mean)


def _shares(inputs: Tensor, weights: Float[Tensor, "2"] | None) -> Float[Tensor, " n"]:
    """How much each row of a step's inputs counts, in float64; the first half of them has a class."""
    count, device = inputs.numel() // inputs.shape[-1], exact_device(inputs.device)
    if weights is None:
        return torch.ones(count, dtype=torch.float64, device=device)
    return weights.to(device).double().repeat_interleave(count // 2)
