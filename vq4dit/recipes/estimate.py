"""What a quantization will cost: seconds, memory, disk. Rough on purpose, and all in this one file.

Two sums, each divided by a speed that was measured once (cpu) or is assumed (gpu). They are there so that nobody starts
blindly; once the work runs, its own pace replaces them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from vq4dit.config import EntropyCodingConfig, QuantizationSettings
from vq4dit.memory import check_memory
from vq4dit.models.positions import Positions
from vq4dit.models.trajectories import LARGE, STEPS, Sampling, num_rounds, num_trajectories_for, steps_sampled
from vq4dit.pipelines.inspect import Inspection, LayerSize, SizePrediction
from vq4dit.pipelines.references import Components
from vq4dit.progress import Event
from vq4dit.recipes.gptq import BLOCK_ROWS, TRIAL_BEAMS, block_rows
from vq4dit.recipes.kmeans import MAX_POINTS_PER_CODEWORD
from vq4dit.recipes.kronecker import SKETCHES
from vq4dit.recipes.rounding import FEWEST_ROWS

Device = Literal["cpu", "gpu"]

LLOYD_ITERATIONS = 15
# cpu: a core of x86-64, measured on the bundled model (processor seconds of codebooks and of learning steps), times the cores
# that torch uses. gpu: assumed, never measured: half of the fp32 figure of half an H200 (6.7e13 for a whole one).
# Distances between a sub-vector and a codeword, per second.
DISTANCES_PER_SECOND: dict[Device, float] = {"cpu": 7e8, "gpu": 2e10}
# Floating-point operations of walks and calibration, per second.
OPERATIONS_PER_SECOND: dict[Device, float] = {"cpu": 6.5e10, "gpu": 1.5e13}
LOAD_BYTES_PER_SECOND = 5e8
BASE_BYTES = 500_000_000  # of Python and torch
# Fitting a layer: factors, scale classes and the coder, weights per second.
FITTED_PER_SECOND: dict[Device, float] = {"cpu": 5e5, "gpu": 2e7}
# Rounding it. cpu: seconds of a core for each weight and path of the beam, and as much as so many paths besides. gpu: seconds
# for a column of a block of rows, however few (calls, not sums).
SECONDS_PER_PATH, OTHER_PATHS = 3e-8, 3
SECONDS_PER_COLUMN = 9e-5
# Per weight and token of a trajectory:
SAMPLING_OPERATIONS = 2  # forward, in every round
PROBING_OPERATIONS = 4  # backward (of later steps more), products of gradients
RATE_OPERATIONS = 2  # forward, second moments, of half the steps
FIT_OPERATIONS = 6  # teacher, then student behind every group, second moments

# GPU seconds that ZeroGPU gives a visitor per day, about: assumed from what the platform publishes, which it may change.
DAILY_GPU_SECONDS = {"anonymous": 120, "free": 210, "PRO": 2400}


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes."""

    stages: dict[str, float]
    memory_bytes: int
    disk_bytes: int  # of the job's folder and the result, at their largest

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    def fits(self) -> dict[str, bool]:
        """For each kind of visitor, whether a day's GPU time is enough."""
        return {visitor: self.seconds <= limit for visitor, limit in DAILY_GPU_SECONDS.items()}


def estimate(
    inspection: Inspection, settings: QuantizationSettings, device: Device, components: Components = "copy"
) -> Estimate:
    """The cost of quantizing a model at one of the widths that it was inspected for.

    Args:
        components: see `save`.
    """
    prediction = next(p for p in inspection.predictions if p.bits == settings.bits)
    learning = {"kmeans": _nothing_learned, "paper": _of_paper, "best": _of_best}[settings.recipe]
    cost = learning(inspection, prediction, settings, device)
    subvectors = [layer.rows * layer.columns // settings.subvector_dim for layer in prediction.layers]
    stages = {}
    if settings.recipe != "best":
        codewords = settings.num_codewords
        clustered = [LLOYD_ITERATIONS * min(n, MAX_POINTS_PER_CODEWORD * codewords) + n for n in subvectors]
        seconds = sum(clustered) * codewords / (_cores(device) * DISTANCES_PER_SECOND[device])
        stages["cluster"] = seconds + 4 * inspection.parameters / LOAD_BYTES_PER_SECOND
    copied = sum(inspection.other_bytes.values()) if components == "copy" else 0
    return Estimate(
        stages | cost.stages,
        BASE_BYTES + 8 * inspection.parameters + cost.memory_bytes,  # the original and the result, in fp32
        prediction.file_bytes + 8 * sum(subvectors) + cost.disk_bytes + copied,
    )


def _cores(device: Device) -> int:
    return torch.get_num_threads() if device == "cpu" else 1


def _nothing_learned(*_: Any) -> Estimate:
    return Estimate({}, 0, 0)


def _of_paper(inspection: Inspection, prediction: SizePrediction, settings: QuantizationSettings, device: Device) -> Estimate:
    """What calibration adds to codebooks."""
    calibration, weights = settings.calibration, prediction.quantized_weights
    rows = calibration.num_trajectories * inspection.positions.rows
    # per weight and row: teacher forward 2 operations, student forward 2, backward 4; per quantized weight: mixing about 40
    per_step = inspection.parameters_of_a_pass * 8 * rows + 40 * weights
    soft = weights // settings.subvector_dim * calibration.num_candidates
    return Estimate(
        {"calibrate": calibration.steps * per_step / (_cores(device) * OPERATIONS_PER_SECOND[device])},
        20 * soft + 8 * weights,
        16 * soft,  # a checkpoint, and the next one beside it
    )


def _of_best(inspection: Inspection, prediction: SizePrediction, settings: QuantizationSettings, device: Device) -> Estimate:
    layers, weights, cores = prediction.layers, prediction.quantized_weights, _cores(device)
    large = inspection.parameters >= LARGE
    config = settings.entropy_coding.of_large() if large else settings.entropy_coding
    probed, learned = (Shown.of(inspection.positions, n) for n in (config.sensitivity_tokens, config.tokens))
    fitted = weights / (cores * FITTED_PER_SECOND[device]) + _rounding_seconds(layers, config, large, device)
    speed = cores * OPERATIONS_PER_SECOND[device]
    per_operation = inspection.parameters_of_a_pass / speed  # blocks run whether quantized or not
    stages = {
        "sensitivity": per_operation * (SAMPLING_OPERATIONS * probed.passes + PROBING_OPERATIONS) * probed.rows,
        "trajectories": per_operation * SAMPLING_OPERATIONS * learned.passes * learned.rows,
        "bits": per_operation * RATE_OPERATIONS * learned.rows,
        "fit": per_operation * FIT_OPERATIONS * learned.rows + fitted,
    }
    coupled = 0 if large else sum(layer.rows**2 for layer in layers)  # entries of output sensitivities
    together = min(probed.rows, Shown.of(inspection.positions, config.sensitivity_tokens_together).rows) / STEPS
    held_width = (1.0 if large else 1.5) * sum(layer.rows + layer.columns for layer in layers)  # to go back
    seen = 3 * learned.rows * max(layer.columns for layer in layers)
    sketched = int(8 * SKETCHES * probed.rows / together) * sum(layer.columns + 1 for layer in layers)
    held = int(4 * (together * held_width + seen)) + 12 * coupled + sketched
    return Estimate(stages, held, 4 * weights + 4 * coupled + sketched)


def _rounding_seconds(layers: Sequence[LayerSize], config: EntropyCodingConfig, large: bool, device: Device) -> float:
    beams = [*(min(beam, config.beam) for beam in TRIAL_BEAMS), config.beam]
    if device == "cpu":
        paths, weights = sum(beam + OTHER_PATHS for beam in beams), sum(layer.rows * layer.columns for layer in layers)
        return (
            SECONDS_PER_PATH * paths * weights / (_cores(device) if large else min(_cores(device), BLOCK_ROWS // FEWEST_ROWS))
        )
    blocks = [1 if large else math.ceil(layer.rows / block_rows(layer.rows)) for layer in layers]
    return SECONDS_PER_COLUMN * len(beams) * sum(count * layer.columns for count, layer in zip(blocks, layers, strict=True))


class Shown(NamedTuple):
    """What trajectories of about so many tokens come to."""

    rows: int  # in all steps that are looked at
    passes: float  # of sampling for each row: trajectories end with the last step that they show

    @classmethod
    def of(cls, positions: Positions, tokens: int) -> Shown:
        count = num_trajectories_for(Sampling(tokens=positions.rows), tokens, STEPS)
        rounds = num_rounds(count, has_prompts=positions.has_prompts)
        return cls(count * STEPS * positions.rows, steps_sampled(rounds) / STEPS)


def check_fits(cost: Estimate, model: str, device: torch.device | str = "cpu") -> None:
    """Raise `VQ4DiTError` if quantizing takes more memory than there is: where the model is loaded, and on `device`.

    Args:
        model: for the message.
    """
    for place in {"cpu", str(device)}:
        check_memory(cost.memory_bytes, f"quantizing {model}", place)


def seconds_left(events: Sequence[Event], stages: dict[str, float]) -> float | None:
    """The time to the end by the pace of the running stage; later stages by their estimate, corrected by that pace."""
    same = [event for event in events if event.stage == events[-1].stage and event.done]  # the rest is preparation
    if len(same) < 2 or same[-1].done <= same[0].done:
        return None
    last = same[-1]
    pace = (last.seconds - same[0].seconds) / (last.done - same[0].done)
    expected = stages.get(last.stage, 0.0)
    correction = min(4.0, max(0.25, pace * last.total / expected)) if expected else 1.0
    names = list(stages)
    later = names[names.index(last.stage) + 1 :] if last.stage in stages else []
    return pace * (last.total - last.done) + correction * sum(stages[name] for name in later)
