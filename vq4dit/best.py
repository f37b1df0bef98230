"""The recipe `best`, piece by piece, as a job can hold it.

First how much an error in each layer's outputs matters (`vq4dit/sensitivity.py`), then how many bits each layer gets
(`vq4dit/rate_allocation.py`), then one layer after the other (`vq4dit/layer_by_layer.py`), then the tuning of all that is not
an integer (`vq4dit/tuning.py`). Each piece is on disk before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vq4dit.coded_layers import EntropyCodedLinear, coded_layers
from vq4dit.error_feedback import BEAM
from vq4dit.inspection import promised_bits
from vq4dit.job import Job, TimeBudget
from vq4dit.layer_by_layer import BEAM_OF_LARGE, calibration_walk, fit_layer, groups_in_turn, rate_curve
from vq4dit.learning import learn
from vq4dit.progress import OnProgress, Progress
from vq4dit.randomness import named_generator
from vq4dit.rate_allocation import RateCurve, log_t_for
from vq4dit.sensitivity import Sensitivities, output_sensitivities
from vq4dit.student import rest_dtype, round_rest, student_with
from vq4dit.tuning import Tuning, record_samples, walks
from vq4dit.zero_data import BlockCall, is_large


def quantize_best(
    job: Job, pipeline: Any, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress
) -> nn.Module | None:
    """From the newest pieces of a job to the quantized transformer; None if time ran out first."""
    student = _fit_layers(job, pipeline, targets, budget, on_progress)
    if student is None:
        return None
    if job.settings.calibration.tuning_steps:
        if not _record_samples(job, pipeline, budget, on_progress):
            return None
        for layer in coded_layers(student).values():
            if layer.decoded_weight is None or layer.decoded_weight.dtype != torch.float32:
                layer.decode(torch.float32)
        if not _tune(job, pipeline, student, budget, on_progress):
            return None
        dtypes = {name: p.dtype for name, p in pipeline.transformer.named_parameters()}
        for name, p in student.named_parameters():  # packed tensors are not in the original
            p.data = p.data.to(dtypes.get(name, p.dtype))
        for name, layer in coded_layers(student).items():
            layer.harden(targets[name].weight.dtype)
        round_rest(student, rest_dtype(pipeline.transformer))
    for name, layer in coded_layers(student).items():
        if layer.decoded_weight is None:
            layer.decode(targets[name].weight.dtype)
    return student


def _fit_layers(
    job: Job, pipeline: Any, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress
) -> nn.Module | None:
    """Quantize layer by layer (`best`), one piece for each; the student, or None if time ran out."""
    settings = job.settings
    student = student_with(pipeline.transformer, {})
    if all(job.has(f"layers/{name}") for name in targets):  # a turn of the tuning: nothing is left to be walked for
        for name, linear in targets.items():
            student.set_submodule(name, _fitted_layer(job, name, linear))
        on_progress(Progress("fit", len(targets), len(targets)))
        return student
    guidance_scale = settings.calibration.guidance_scale
    begun = Progress("fit", 0, len(targets))  # a sign of life, and a moment to stop
    if not job.has("sensitivities-of-steps"):
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
            layer.decode(linear.weight.dtype)
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
    """Share the bits of all integers out among the layers, as the teacher's own inputs suggest; one number each."""
    settings, teacher = job.settings, pipeline.transformer
    promised = sum(promised_bits(linear, settings.bits) for linear in targets.values())
    curves: dict[str, RateCurve] = {}
    steps = {name: weights[::2] for name, weights in sensitivities.steps.items()}
    for group in groups_in_turn(teacher, teacher, walk[::2], list(targets), steps):
        statistics = group.statistics()
        for name in group.names:
            curves[name] = rate_curve(targets[name], statistics, sensitivities.outputs[name].to(statistics.covariance.device))
        on_group()
    log_t = log_t_for(curves.values(), promised)
    return {name: torch.tensor(curve.bits(log_t), dtype=torch.float64) for name, curve in curves.items()}


def _fitted_layer(job: Job, name: str, linear: nn.Linear) -> EntropyCodedLinear:
    piece = {key: tensor.to(linear.weight.device) for key, tensor in job.read(f"layers/{name}").items()}
    return EntropyCodedLinear.from_tensors(piece, (linear.out_features, linear.in_features), linear.weight.dtype)


def _record_samples(job: Job, pipeline: Any, budget: TimeBudget, on_progress: OnProgress) -> bool:
    """Walk the teacher for the tuning, one piece for each walk; False if time ran out."""
    config = job.settings.calibration
    begun = Progress("tune", 0, config.tuning_steps)  # a sign of life, and a moment to stop
    slowest = 0.0
    for first, count in walks(pipeline, config).items():
        if job.has(f"samples-{first}"):
            continue
        if slowest and not budget.allows(2 * slowest):  # every slice makes at least one walk
            return False
        started = time.monotonic()
        generator = named_generator(job.settings.seed, f"tuning {first}" if first else "tuning")
        samples = record_samples(pipeline, count, config.guidance_scale, generator, lambda: on_progress(begun))
        job.write(f"samples-{first}", samples)
        slowest = max(slowest, time.monotonic() - started)
    return True


def _tune(job: Job, pipeline: Any, student: nn.Module, budget: TimeBudget, on_progress: OnProgress) -> bool:
    """Run the tuning from its newest checkpoint to its end; False if time ran out."""
    config = job.settings.calibration
    device = next(student.parameters()).device
    read = [job.read(f"samples-{first}") for first in walks(pipeline, config)]
    samples = {name: torch.cat([part[name] for part in read]).to(device) for name in read[0]}
    with torch.enable_grad():
        tuning = Tuning(pipeline, student, samples, config, named_generator(job.settings.seed, "order of samples"))
        finished = learn(job, "tuning", tuning, config.tuning_steps, budget, on_progress, "tune")
    tuning.student.disable_gradient_checkpointing()
    return finished
