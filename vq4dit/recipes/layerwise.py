"""Quantize layer after layer, each one compensating what those before it got wrong.

Teacher and student (the copy that is being quantized) go through the blocks side by side, on latents of zero-data
trajectories (`models/block_replay.py`). When a layer's turn comes, its inputs are known: x in the teacher, x̃ in the student,
behind all that is quantized already. The layer gets a corrected weight

    W* = W + α W Cov(x - x̃, x̃) Cov(x̃, x̃)⁻¹

which at α = 1 is the best linear answer to the student's inputs (GPTAQ, arXiv:2504.02692); α = 1/2 measured better, since
the whole correction fits the few latents too closely. W* is then quantized by error feedback under the covariance of the
student's inputs: what a mean input makes wrong, the bias absorbs, so errors in its direction cost nothing.

Layers that see no tokens (adaLN: their input depends on timestep and class only) are fitted on *every* class, and a step
counts by how sensitive the prediction is to an error in it; of models of prompts on those that were sampled. All that is in
memory besides the two models is what their blocks answer to the recorded calls, while it is needed, and one block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import EntropyCodingConfig
from vq4dit.denoisers import denoiser_of, transformers_in
from vq4dit.devices import exact_device
from vq4dit.layers.linear_maps import LinearMap, matrix_of
from vq4dit.models.block_replay import BlockReplay, executed_blocks, last_readers
from vq4dit.models.conditions import num_classes
from vq4dit.models.denoiser_calls import DenoiserCall
from vq4dit.models.trajectories import STEPS, Sampling, num_trajectories_for, record_calls
from vq4dit.recipes.bit_allocation import RateCurve
from vq4dit.recipes.block_inputs import ReplayedBlock, sharing_an_input
from vq4dit.recipes.gptq import ErrorFeedback, QuantizedWeight, damp, of_inputs, quantize_weights
from vq4dit.recipes.hessian import (
    InputStatistics,
    by_halves,
    halves_by_condition,
    input_statistics,
    no_statistics,
    without_padding,
)
from vq4dit.recipes.kronecker import kronecker_ratio


class LayerGroup(NamedTuple):
    """Linears that read the same input (q, k, v), all with a bias or all without; its statistics are made when wanted."""

    names: list[str]
    statistics: Callable[[], InputStatistics]


class TransformerCalls(NamedTuple):
    """Those of one transformer, and what was found out of it."""

    calls: list[DenoiserCall]
    order: list[str]  # of the blocks, as they run
    last_reader: list[int]

    def of(self, model: nn.Module, every: int) -> BlockReplay:
        calls = [call for call in self.calls if call.step % every == 0]
        return BlockReplay(model, calls or self.calls, self.order, self.last_reader)


class Replays(NamedTuple):
    """The recorded calls, ready to be gone through block by block in any model of the teacher's kind."""

    transformers: list[TransformerCalls]  # of those that are called at all
    num_classes: int  # 0 for models of prompts

    def of(self, model: nn.Module, every: int = 1) -> list[BlockReplay]:
        """Every call, or only those of every n-th step, by transformer."""
        return [recorded.of(model, every) for recorded in self.transformers]


def record_replays(
    pipeline: Any,
    sampling: Sampling,
    generator: torch.Generator,
    config: EntropyCodingConfig,
    on_step: Callable[[], None] = lambda: None,
) -> Replays:
    """Trajectories that show about `config.tokens` tokens; calls `on_step` after each of their `STEPS` steps."""
    count = num_trajectories_for(sampling, config.tokens, STEPS)
    calls = record_calls(pipeline, sampling, count, generator, on_step=on_step)
    denoiser = denoiser_of(pipeline)
    found = []
    for part in transformers_in(denoiser):
        if own := [call for call in calls if call.part == part]:
            order = executed_blocks(denoiser, own[0])
            found.append(TransformerCalls(own, order, last_readers(denoiser, own[0], order)))
    return Replays(found, num_classes(pipeline))


def groups_in_turn(
    teacher: Sequence[BlockReplay],
    student: Sequence[BlockReplay],
    names: Sequence[str],
    step_weights: Mapping[str, Float[Tensor, "steps calls 2"]] = MappingProxyType({}),
    num_classes: int = 0,
) -> Iterator[LayerGroup]:
    """The named layers in order of execution, in groups that read the same input; at last those that never run.

    Args:
        teacher, student: one of each for every transformer.
        step_weights: how much each call counts for a layer that sees no tokens, by halves of its rows.

    Whoever takes a group must put its quantized layers into the student before asking for the next one.
    """
    never_run = dict.fromkeys(names)
    for of_teacher, of_student in zip(teacher, student, strict=True):
        for group in _groups_of_transformer(of_teacher, of_student, names, step_weights, num_classes):
            yield group
            for name in group.names:
                del never_run[name]
    for name in never_run:
        yield LayerGroup([name], partial(no_statistics, teacher[0].transformer.get_submodule(name)))


def _groups_of_transformer(
    teacher: BlockReplay,
    student: BlockReplay,
    names: Sequence[str],
    step_weights: Mapping[str, Float[Tensor, "steps calls 2"]],
    num_classes: int,
) -> Iterator[LayerGroup]:
    """Those that it runs."""
    for index, block_name in enumerate(teacher.order):
        wanted = [name.removeprefix(f"{block_name}.") for name in names if name.startswith(f"{block_name}.")]
        block = ReplayedBlock(teacher, index)
        student_block = block if student is teacher else ReplayedBlock(student, index)
        inputs, outputs = block.inputs_of(wanted)
        for group in sharing_an_input(inputs, block.has_bias):
            full_names = [f"{block_name}.{name}" for name in group]
            weights = step_weights.get(full_names[0])
            statistics = partial(_group_statistics, group[0], block, student_block, inputs[group[0]], weights, num_classes)
            yield LayerGroup(full_names, statistics)
        teacher.keep(outputs)
        if student is not teacher:
            student.keep(student_block.inputs_of([])[1])


def _group_statistics(
    name: str,
    block: ReplayedBlock,
    student_block: ReplayedBlock,
    teacher_inputs: list[Tensor],
    step_weights: Float[Tensor, "steps calls 2"] | None,
    num_classes: int,
) -> InputStatistics:
    halves = [halves_by_condition(x, call) for x, call in zip(teacher_inputs, block.calls, strict=True)]
    if teacher_inputs[0].ndim == 2:  # no tokens: the same in teacher and student
        every_class = block.of_every_class(num_classes) if num_classes else None
        inputs = block.input_of(name, arguments=every_class) if every_class else teacher_inputs
        of_calls = zip(inputs, block.calls, strict=True)
        weights = None if step_weights is None else [by_halves(x, step_weights[call.step, call.index]) for x, call in of_calls]
        return input_statistics(inputs, inputs, weights, None if every_class else halves)
    rows = [without_padding(x, call) for x, call in zip(teacher_inputs, block.calls, strict=True)]
    student_inputs = teacher_inputs if student_block is block else student_block.input_of(name, block.runs[name])
    return input_statistics(teacher_inputs, student_inputs, rows, halves)


def _damped(config: EntropyCodingConfig, statistics: InputStatistics) -> EntropyCodingConfig:
    """With more damping where a layer's inputs are known of too few conditions."""
    return replace(config, damping=max(config.damping, statistics.damping))


def rate_curves(
    linears: Sequence[LinearMap],
    statistics: InputStatistics,
    sensitivities: Sequence[Float[Tensor, " _"] | Float[Tensor, "_ _"]],
    gradients: Sequence[Float[Tensor, "2 _ width"] | None],
    config: EntropyCodingConfig,
) -> list[RateCurve]:
    """How many bits each of these linears, which read the same input, takes at each cost of an error.

    Args:
        gradients: of each weight, what tells how much more of its errors is seen than B and H say (`kronecker_ratio`).
    """
    device = exact_device(linears[0].weight.device)  # that of all error feedback
    statistics, config = statistics.to(device), _damped(config, statistics)
    moments = _moments(linears, statistics)[0]
    mean = None if linears[0].bias is None else statistics.student_mean
    columns = of_inputs(moments, config)
    ratios = [1.0 if known is None else kronecker_ratio(known, columns, mean) for known in gradients]
    of_layers = zip(sensitivities, ratios, strict=True)
    layers = [ErrorFeedback(columns, ratio * sensitivity.to(device), config) for sensitivity, ratio in of_layers]
    weights = [matrix_of(linear).float().to(device) for linear in linears]
    return [layer.rate_curve(weight) for layer, weight in zip(layers, weights, strict=True)]


def _moments(linears: Sequence[LinearMap], statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """Second moments and mismatch of the inputs: about their means, where biases make good what those get wrong."""
    return statistics.about_zero() if linears[0].bias is None else statistics[:2]


def fit_layers(
    linears: Sequence[LinearMap],
    statistics: InputStatistics,
    sensitivities: Sequence[Float[Tensor, " _"] | Float[Tensor, "_ _"]],
    bits: Sequence[float],
    config: EntropyCodingConfig,
) -> list[tuple[QuantizedWeight, Float[Tensor, " _"] | None]]:
    """Quantize linears for the one input that all will see; returns of each the weight and the bias (None if it has none).

    Args:
        linears: of one group: all with a bias, or all without.
        sensitivities: how much an error in each output counts, or in each two of them together (`output_sensitivities`).
        bits: what the integers of each may take, all together.
    """
    device = exact_device(linears[0].weight.device)
    statistics, config = statistics.to(device), _damped(config, statistics)
    weights = [matrix_of(linear).float().to(device) for linear in linears]
    moments, mismatch = _moments(linears, statistics)
    correction = torch.linalg.solve(damp(moments, config.damping), (torch.cat(weights) @ mismatch).T).T
    corrections = correction.split([len(weight) for weight in weights])
    corrected = [weight + config.input_correction * c for weight, c in zip(weights, corrections, strict=True)]
    on_device = [sensitivity.to(device) for sensitivity in sensitivities]
    quantized = quantize_weights(corrected, moments, on_device, bits, config)
    biases = [_fitted_bias(*of_one, statistics) for of_one in zip(linears, weights, quantized, strict=True)]
    return list(zip(quantized, biases, strict=True))


def _fitted_bias(
    linear: LinearMap, weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics
) -> Float[Tensor, " rows"] | None:
    """The bias, with what errors make of the mean input."""
    if linear.bias is None:
        return None
    mean_error = weight @ statistics.teacher_mean - quantized.weight() @ statistics.student_mean
    return linear.bias.detach().float().to(weight.device) + mean_error
