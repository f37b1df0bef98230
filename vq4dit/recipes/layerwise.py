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
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import EntropyCodingConfig
from vq4dit.devices import exact_device
from vq4dit.layers.linear_maps import LinearMap, matrix_of, tokens_of
from vq4dit.models.block_replay import BlockArguments, BlockReplay, executed_blocks, last_readers
from vq4dit.models.conditions import num_classes
from vq4dit.models.denoiser_calls import DenoiserCall, Tree
from vq4dit.models.trajectories import STEPS, Sampling, num_trajectories_for, record_calls
from vq4dit.recipes.bit_allocation import RateCurve
from vq4dit.recipes.gptq import ErrorFeedback, QuantizedWeight, damp, quantize_weight
from vq4dit.recipes.hessian import (
    InputStatistics,
    by_halves,
    halves_by_condition,
    input_statistics,
    no_statistics,
    without_padding,
)
from vq4dit.surroundings import evaluating


class LayerGroup(NamedTuple):
    """Linears that read the same input (q, k, v), and how to get its statistics when they are wanted."""

    names: list[str]
    statistics: Callable[[], InputStatistics]


class Replays(NamedTuple):
    """The recorded calls, ready to be gone through block by block in any model of the teacher's kind."""

    calls: list[DenoiserCall]
    order: list[str]  # of the blocks, as they run
    last_reader: list[int]
    num_classes: int  # 0 for models of prompts

    def of(self, model: nn.Module, every: int = 1) -> BlockReplay:
        """Every call, or only those of every n-th step."""
        return BlockReplay(model, [call for call in self.calls if call.step % every == 0], self.order, self.last_reader)


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
    order = executed_blocks(pipeline.transformer, calls[0])
    return Replays(calls, order, last_readers(pipeline.transformer, calls[0], order), num_classes(pipeline))


def groups_in_turn(
    teacher: BlockReplay,
    student: BlockReplay,
    names: Sequence[str],
    step_weights: Mapping[str, Float[Tensor, "steps calls 2"]] = MappingProxyType({}),
    num_classes: int = 0,
) -> Iterator[LayerGroup]:
    """The named layers in order of execution, in groups that read the same input; at last those that never run.

    Args:
        step_weights: how much each call counts for a layer that sees no tokens, by halves of its rows.

    Whoever takes a group must put its quantized layers into the student before asking for the next one.
    """
    never_run = dict.fromkeys(names)
    for index, block_name in enumerate(teacher.order):
        wanted = [name.removeprefix(f"{block_name}.") for name in names if name.startswith(f"{block_name}.")]
        block = _Block(teacher, index)
        student_block = block if student is teacher else _Block(student, index)
        inputs, outputs = block.inputs_of(wanted)
        for group in _sharing_an_input(inputs):
            full_names = [f"{block_name}.{name}" for name in group]
            weights = step_weights.get(full_names[0])
            statistics = partial(_group_statistics, group[0], block, student_block, inputs[group[0]], weights, num_classes)
            yield LayerGroup(full_names, statistics)
            for name in full_names:
                del never_run[name]
        teacher.keep(outputs)
        if student is not teacher:
            student.keep(student_block.inputs_of([])[1])
    for name in never_run:
        yield LayerGroup([name], partial(no_statistics, teacher.transformer.get_submodule(name)))


class _Block:
    """One block of a model, and what enters it in every recorded call."""

    def __init__(self, replay: BlockReplay, index: int):
        self.calls = replay.calls
        self.module = replay.transformer.get_submodule(replay.order[index])
        self.arguments = replay.arguments(index)
        self.runs: dict[str, int] = {}  # of each linear in one pass of the block

    def inputs_of(self, names: Sequence[str]) -> tuple[dict[str, list[Tensor]], list[Tree]]:
        """Run the block: inputs of the named linears by call, in order of execution, and what the block answers."""
        seen: dict[str, list[list[Tensor]]] = {}

        def note(number: int, name: str, inputs: Tensor) -> None:
            of_calls = seen.setdefault(name, [[] for _ in self.arguments])
            of_calls[number].append(inputs)

        outputs = []
        with torch.no_grad(), evaluating(self.module):
            for number, arguments in enumerate(self.arguments):
                with _watched(self.module, names, partial(note, number)):
                    outputs.append(arguments.run(self.module))
        self.runs = {name: len(of_calls[0]) for name, of_calls in seen.items()}
        return {name: [_together(of_call) for of_call in of_calls] for name, of_calls in seen.items()}, outputs

    def input_of(self, name: str, runs: int = 1, arguments: Sequence[BlockArguments] | None = None) -> list[Tensor]:
        """The inputs of one linear that runs so often in a pass; what comes behind it does not run."""
        found = []
        for of_call in self.arguments if arguments is None else arguments:
            seen: list[Tensor] = []

            def stop(_: str, inputs: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(inputs)
                if len(seen) == runs:
                    raise _Seen

            with torch.no_grad(), evaluating(self.module), _watched(self.module, [name], stop), suppress(_Seen):
                of_call.run(self.module)
            found.append(_together(seen))
        return found

    def of_every_class(self, num_classes: int) -> list[BlockArguments] | None:
        """The same calls with one token, once for every class and as often for none; None if the block is told no class."""
        return [_every_class(arguments, num_classes) for arguments in self.arguments] if self._is_told_classes else None

    @property
    def _is_told_classes(self) -> bool:
        return isinstance(self.arguments[0].named.get("class_labels"), Tensor)


def _every_class(arguments: BlockArguments, num_classes: int) -> BlockArguments:
    hidden, named = arguments.positional[0], arguments.named
    classes = torch.arange(num_classes, device=hidden.device)
    last = named["class_labels"][-1:]  # that of none, with guidance
    labels = torch.cat([classes, last.expand(len(classes)) if int(last) >= num_classes else classes])
    named = {**named, "class_labels": labels, "timestep": named["timestep"][:1].expand(len(labels))}
    return BlockArguments((hidden[:1, :1].expand(len(labels), 1, -1), *arguments.positional[1:]), named)


def _together(inputs: list[Tensor]) -> Tensor:
    """What a linear saw in one call: as it was, or flat if it ran more than once."""
    return inputs[0] if len(inputs) == 1 else torch.cat([x.flatten(0, -2) for x in inputs])


def _group_statistics(
    name: str,
    block: _Block,
    student_block: _Block,
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


def rate_curve(
    linear: LinearMap,
    statistics: InputStatistics,
    sensitivity: Float[Tensor, " rows"] | Float[Tensor, "rows rows"],
    config: EntropyCodingConfig,
) -> RateCurve:
    """How many bits this linear takes at each cost of an error."""
    device = exact_device(linear.weight.device)  # that of all error feedback
    statistics, weight = statistics.to(device), matrix_of(linear).float().to(device)
    moments = statistics.about_zero()[0] if linear.bias is None else statistics.covariance
    return ErrorFeedback(moments, sensitivity.to(device), _damped(config, statistics)).rate_curve(weight)


def fit_layer(
    linear: LinearMap,
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
    statistics, weight = statistics.to(device), matrix_of(linear).float().to(device)
    config = _damped(config, statistics)
    moments, mismatch = statistics.about_zero() if linear.bias is None else statistics[:2]
    correction = torch.linalg.solve(damp(moments, config.damping), (weight @ mismatch).T).T
    corrected = weight + config.input_correction * correction
    quantized = quantize_weight(corrected, moments, sensitivity.to(device), bits, config)
    if linear.bias is None:
        return quantized, None
    mean_error = weight @ statistics.teacher_mean - quantized.weight() @ statistics.student_mean
    return quantized, linear.bias.detach().float().to(device) + mean_error


class _Seen(Exception):
    """The input that was waited for is known: the rest of the block need not run."""


@contextmanager
def _watched(block: nn.Module, names: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """For a while `note` is told the name and the input of the named linears, before they run."""
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda linear, arguments, name=name: note(name, tokens_of(linear, arguments[0]))
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharing_an_input(inputs: dict[str, list[Tensor]]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name, seen in inputs.items():
        if groups and inputs[groups[-1][0]][0] is seen[0]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
