"""The recipe `best`, piece by piece, as a job can hold it.

First how much an error in each layer's outputs matters (`vq4dit/recipes/fisher.py`), then how many bits each layer gets
(`vq4dit/recipes/bit_allocation.py`), then one layer after the other (`vq4dit/recipes/layerwise.py`). Each piece is on disk
before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vq4dit.disk.job import Job, TimeBudget
from vq4dit.layers.entropy_coded import EntropyCodedLinear
from vq4dit.models.student import student_with
from vq4dit.models.zero_data import ROUNDS, BlockCall, is_large
from vq4dit.pipelines.inspect import promised_bits
from vq4dit.progress import OnProgress, Progress
from vq4dit.randomness import named_generator
from vq4dit.recipes.bit_allocation import RateCurve, log_t_for
from vq4dit.recipes.fisher import Sensitivities, output_sensitivities
from vq4dit.recipes.gptq import BEAM
from vq4dit.recipes.layerwise import BEAM_OF_LARGE, calibration_walk, fit_layer, groups_in_turn, rate_curve


def quantize_best(
    job: Job, pipeline: Any, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress
) -> nn.Module | None:
    """From the newest pieces of a job to the quantized transformer; None if time ran out first."""
    settings = job.settings
    student = student_with(pipeline.transformer, {})
    if all(job.has(f"layers/{name}") for name in targets):  # killed before it was saved: nothing is left to be walked for
        for name, linear in targets.items():
            student.set_submodule(name, _fitted_layer(job, name, linear))
        on_progress(Progress("fit", len(targets), len(targets)))
        return student
    guidance_scale = settings.calibration.guidance_scale
    begun = Progress("fit", 0, len(targets))  # a sign of life, and a moment to stop
    if not (job.has("sensitivities") and job.has("sensitivities-of-steps")):
        started = time.monotonic()
        generator = named_generator(settings.seed, "sensitivities")
        found = output_sensitivities(pipeline, list(targets), guidance_scale, generator, lambda: on_progress(begun))
        job.write("sensitivities", found.outputs)
        job.write("sensitivities-of-steps", found.steps)
        if not budget.allows(2 * (time.monotonic() - started)):  # the walk that follows takes about as long
            return None
    sensitivities = Sensitivities(job.read("sensitivities"), job.read("sensitivities-of-steps"))
    generator = named_generator(settings.seed, "layer by layer")
    walk = calibration_walk(pipeline, guidance_scale, generator, lambda: on_progress(begun))
    if not job.has("bits"):
        started = time.monotonic()
        job.write("bits", _bits_of_layers(job, pipeline, targets, walk, sensitivities, lambda: on_progress(begun)))
        if not budget.allows(time.monotonic() - started):
            return None
    bits = {name: value.item() for name, value in job.read("bits").items()}
    beam = BEAM_OF_LARGE if is_large(pipeline.transformer) else BEAM
    promised_left = bits_left = sum(bits.values())
    done, slowest = 0, 0.0
    for group in groups_in_turn(pipeline.transformer, student, walk, list(targets), sensitivities.steps):
        statistics = None
        started = time.monotonic()
        for name in group.names:
            linear = targets[name]
            if not job.has(f"layers/{name}"):
                if statistics is None:
                    if slowest and not budget.allows(2 * slowest):  # every slice fits at least one group
                        return None
                    statistics = group.statistics()
                # what the layers before took too much or too little is for the rest to make good
                share = bits[name] * max(bits_left, 0) / max(promised_left, 1e-9)
                quantized, bias = fit_layer(
                    linear, statistics, sensitivities.outputs[name].to(linear.weight.device), share, beam
                )
                job.write(f"layers/{name}", EntropyCodedLinear.from_integers(*quantized, bias).state_dict())
            layer = _fitted_layer(job, name, linear)
            student.set_submodule(name, layer)
            integer_bytes = len(layer.coded_integers) - sum(linear.weight.shape)  # a byte of a row or column was set aside
            bits_left, promised_left = bits_left - 8 * integer_bytes, promised_left - bits[name]
        if statistics is not None:
            slowest = max(slowest, time.monotonic() - started)
        done += len(group.names)
        on_progress(Progress("fit", done, len(targets)))
    return student


def _bits_of_layers(
    job: Job,
    pipeline: Any,
    targets: dict[str, nn.Linear],
    walk: list[BlockCall],
    sensitivities: Sensitivities,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Share the bits of all integers out among the layers, by the teacher's own inputs in one round; one number each."""
    settings, teacher = job.settings, pipeline.transformer
    promised = sum(promised_bits(linear, settings.bits) for linear in targets.values())
    curves: dict[str, RateCurve] = {}
    steps = {name: weights[::ROUNDS] for name, weights in sensitivities.steps.items()}
    for group in groups_in_turn(teacher, teacher, walk[::ROUNDS], list(targets), steps):
        statistics = group.statistics()
        for name in group.names:
            curves[name] = rate_curve(targets[name], statistics, sensitivities.outputs[name].to(statistics.covariance.device))
        on_group()
    log_t = log_t_for(curves.values(), promised)
    return {name: torch.tensor(curve.bits(log_t), dtype=torch.float64) for name, curve in curves.items()}


def _fitted_layer(job: Job, name: str, linear: nn.Linear) -> EntropyCodedLinear:
    piece = {key: tensor.to(linear.weight.device) for key, tensor in job.read(f"layers/{name}").items()}
    layer = EntropyCodedLinear.from_tensors(piece, (linear.out_features, linear.in_features), linear.weight.dtype)
    layer.decode(linear.weight.dtype)
    return layer
