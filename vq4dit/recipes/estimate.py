"""What a quantization will cost: seconds, memory, disk. Rough on purpose, and all in this one file.

Two sums, each divided by a speed that was measured once (cpu) or is assumed (gpu). They are there so that nobody starts
blindly; once the work runs, its own pace corrects them (`seconds_left`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
# Per weight and token of a trajectory, at that speed; measured stage by stage, so that their parts of the whole are right:
SAMPLING_OPERATIONS = 1.1  # forward, in every round: 2, but without gradients it is faster
PROBING_OPERATIONS = 4  # backward (of later steps more), products of gradients
RATE_OPERATIONS = 2  # forward, second moments, of half the steps
FIT_OPERATIONS = 6.5  # teacher, then student behind every group, second moments

DOUBT = 0.15  # what was expected counts beside what is measured as if such a part, of all work or of a stage, had taken as long
MADE_ANEW = ("trajectories",)  # in every time slice: nothing of them is on disk

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


def seconds_left(
    events: Sequence[Event], stages: Mapping[str, float], now: float = 0.0, time_slice: float = math.inf, spent: float = 0.0
) -> float | None:
    """The time to the end, in seconds: what is left of every stage's estimate, corrected by the pace so far.

    At first that is the estimate itself. Never negative; None in a stage that has no estimate.

    Args:
        stages: estimated seconds by stage, in their order.
        now: seconds of work so far, as events count them: what has passed since the last one counts for the piece at work.
        time_slice: seconds of one; each further one makes `MADE_ANEW` again.
        spent: seconds of the present time slice that are over.
    """
    if not events:
        return sum(stages.values()) if stages else None
    running = events[-1]
    if running.stage not in stages:
        return None
    done, took = _finished(events, stages)
    seconds = _corrected(stages, done, took)
    done[running.stage] = running.share()  # less than was finished once where it is made again
    names = list(stages)
    left = sum(seconds[name] * (1 - done[name]) for name in names[names.index(running.stage) :])
    piece = seconds[running.stage] / max(1, running.total)
    left -= min(max(0.0, now - running.seconds), piece, left)
    again = sum(seconds[name] for name in MADE_ANEW if name in stages)
    of_later_slices = max(0.0, left - max(0.0, time_slice - spent))
    return left + again * math.ceil(of_later_slices / max(time_slice - again, time_slice / 2, 1.0))


def _finished(events: Sequence[Event], stages: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each stage the part that is finished, and the seconds that it took: without loading, and what was made again."""
    done, spent = dict.fromkeys(stages, 0.0), dict.fromkeys(stages, 0.0)
    before = 0.0
    for event in events:
        share = event.share()
        if event.stage in stages and share > done[event.stage]:
            done[event.stage] = share
            spent[event.stage] += event.seconds - before
        before = event.seconds
    return done, spent


def _corrected(stages: Mapping[str, float], done: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each whole stage: by its own pace as far as it has one, else by that of all; little of it tells little."""
    total = sum(stages.values())
    finished = sum(done[name] * seconds for name, seconds in stages.items())
    of_all = (sum(spent.values()) + DOUBT * total) / (finished + DOUBT * total) if total else 1.0
    expected = {name: of_all * seconds for name, seconds in stages.items()}
    return {name: (spent[name] + DOUBT * seconds) / (done[name] + DOUBT) for name, seconds in expected.items()}
