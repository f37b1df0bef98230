"""Look at the result: how far the quantized model's noise and images are from the original's, and what it weighs.

`noise_nmse` is the figure to trust: the squared error of the guided prediction over its power, on zero-data trajectories (and
prompts) that calibration never saw. Same-seed images are in `images.py`. Always measured on the hardened, packed model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.devices import exact
from vq4dit.errors import FormatError
from vq4dit.evaluation.images import SamplePair, check_sampling, sample
from vq4dit.layers.linear_maps import matrix_of
from vq4dit.layers.packed import PackedLinear
from vq4dit.memory import peak_memory
from vq4dit.models.conditions import Condition, guided_call, random_conditions
from vq4dit.models.prompts import HELD_OUT
from vq4dit.models.rehearsal import rehearse
from vq4dit.models.trajectories import NO_CALL, GuidedStep, sample_trajectories
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.randomness import named_generator
from vq4dit.surroundings import ordinary_torch


@dataclass(frozen=True)
class LayerError:
    """How well one layer is represented: || W - Ŵ ||² / || W ||²."""

    name: str
    rows: int
    columns: int
    bits_per_weight: float  # of all its packed tensors but the bias
    relative_error: float

    @classmethod
    def of(cls, name: str, layer: PackedLinear, weight: Float[Tensor, "rows columns"]) -> LayerError:
        """Compare a packed layer with the weight it was made from; a weight of zeros that stayed so has no error."""
        power = weight.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        error = (weight - layer.reconstruct(torch.float32)).square().sum() / power
        return cls(name, layer.out_features, layer.in_features, layer.bits_per_weight, error.item())


def layer_errors(original: nn.Module, quantized: nn.Module) -> list[LayerError]:
    """The layers table of a quantized transformer, in order of execution."""
    return [
        LayerError.of(name, layer, matrix_of(original.get_submodule(name)).float())
        for name, layer in packed_layers(quantized).items()
    ]


@ordinary_torch()
@torch.no_grad()
def noise_nmse(
    original: Any,
    quantized: Any,
    *,
    num_trajectories: int = 16,
    num_inference_steps: int = 25,
    call: Mapping[str, Any] = NO_CALL,
    prompts: Sequence[str] = HELD_OUT,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> float:
    """E || ε_original - ε_quantized ||² / E || ε_original ||² of the guided prediction, on held-out zero-data trajectories.

    Both pipelines sample the same conditions from the same noise, and the quantized one is led back to the original's latents
    after every step: so its own code guides, and each error is that of one step.
    """
    sampling = rehearse(original, call, num_inference_steps, prompts)
    generator = named_generator(seed, "held-out trajectories")
    conditions = random_conditions(original, num_trajectories, generator, prompts)
    state = generator.get_state()
    steps: list[tuple[Tensor, Tensor]] = []
    sampled = partial(sample_trajectories, num_inference_steps=num_inference_steps, call=sampling.call)

    def keep_step(step: GuidedStep) -> None:
        steps.append((step.prediction, step.latents))
        on_progress(Progress("measure", len(steps), 2 * max(len(steps), num_inference_steps)))

    sampled(original, conditions, generator, keep_step)
    error = power = 0.0

    def compare_step(step: GuidedStep) -> Tensor:
        nonlocal error, power
        wanted, latents = steps[step.number]
        error += exact(wanted - step.prediction).square().sum().item()
        power += exact(wanted).square().sum().item()
        done, total = len(steps) + step.number + 1, 2 * len(steps)
        on_progress(Progress("measure", done, total, {"noise_nmse": _part(error, power)}))
        return latents

    sampled(quantized, conditions, generator.set_state(state), compare_step)
    return _part(error, power)


def _part(error: float, power: float) -> float:
    """An error over the power of what it is an error of; where there is no power, any error is infinite."""
    return error / power if power else math.inf if error else 0.0


@dataclass(frozen=True)
class Comparison:
    """Original against quantized; everything `report.json` holds."""

    noise_nmse: float
    psnr_db: float  # mean over the pairs
    ssim: float
    original_bytes: int  # tensors of the transformer in memory order: as stored
    quantized_bytes: int
    original_seconds_per_step: float
    quantized_seconds_per_step: float
    peak_memory_bytes: int  # of this process, both models loaded (of the device, on CUDA)
    num_pairs: int
    num_inference_steps: int
    guidance_scale: float  # 0 for pipelines without one
    seed: int
    call: dict[str, Any] = field(default_factory=dict)  # other arguments of the pipelines' calls

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FormatError(
                    f"a comparison holds finite numbers, and its {name} is {value}: the two models have nothing in common, or "
                    "one of them is damaged; compare a quantized model with the one it was made from"
                )


def compare(
    original: Any,
    quantized: Any,
    original_bytes: int,
    quantized_bytes: int,
    *,
    conditions: Sequence[Condition],
    seed: int = 0,
    num_inference_steps: int = 25,
    call: Mapping[str, Any] = NO_CALL,
    prompts: Sequence[str] = HELD_OUT,
    on_progress: OnProgress = ignore,
) -> tuple[Comparison, list[SamplePair]]:
    """Same-seed pairs of the conditions (seed, seed + 1, ... in turn) and all figures.

    Args:
        call: further arguments of both pipelines' calls.
        prompts: that the error of the prediction is measured on, for a model of prompts.

    Raises:
        FormatError: if a figure is not finite; others as `sample`.
    """
    for pipeline in (original, quantized):
        check_sampling(pipeline, num_inference_steps, call)
    seeds = [seed + i for i in range(len(conditions))]
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "call": call, "on_progress": on_progress}
    nmse = noise_nmse(original, quantized, seed=seed, prompts=prompts, **settings)
    images, seconds = [], []
    for pipeline in (original, quantized):
        started = time.perf_counter()
        images.append(sample(pipeline, conditions, seeds, **settings))
        seconds.append((time.perf_counter() - started) / num_inference_steps / len(conditions))
    pairs = [SamplePair(condition, s, a, b) for condition, s, a, b in zip(conditions, seeds, *images, strict=True)]
    told = guided_call(original, call)
    report = Comparison(
        noise_nmse=nmse,
        psnr_db=float(np.mean([pair.psnr for pair in pairs])),
        ssim=float(np.mean([pair.ssim for pair in pairs])),
        original_bytes=original_bytes,
        quantized_bytes=quantized_bytes,
        original_seconds_per_step=seconds[0],
        quantized_seconds_per_step=seconds[1],
        peak_memory_bytes=peak_memory(original.transformer.device),
        num_pairs=len(pairs),
        num_inference_steps=num_inference_steps,
        guidance_scale=float(told.pop("guidance_scale", 0.0) or 0.0),
        seed=seed,
        call=told,
    )
    return report, pairs
