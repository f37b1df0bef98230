"""Look at the result: how far the quantized model's noise and images are from the original's, and what it weighs.

`noise_nmse` is the figure to trust: the squared error of the predicted noise over its power, guidance on, on zero-data
trajectories that calibration never saw. Same-seed images are in `images.py`. Always measured on the hardened, packed model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.devices import exact
from vq4dit.errors import FormatError
from vq4dit.evaluation.images import SamplePair, check_sampling, sample
from vq4dit.layers.packed import PackedLinear
from vq4dit.memory import peak_memory
from vq4dit.models.supported import check_steps, check_supported
from vq4dit.models.zero_data import TeacherStep, guide, new_scheduler, predicted_noise, teacher_steps
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.randomness import named_generator
from vq4dit.surroundings import evaluating, ordinary_torch


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
        LayerError.of(name, layer, original.get_parameter(f"{name}.weight").detach().float())
        for name, layer in packed_layers(quantized).items()
    ]


@ordinary_torch()
@torch.no_grad()
def noise_nmse(
    original: DiTPipeline,
    quantized: DiTPipeline,
    *,
    num_trajectories: int = 16,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> float:
    """E || ε_original - ε_quantized ||² / E || ε_original ||² with guidance, on held-out zero-data trajectories."""
    check_supported(original)
    check_steps(original, num_inference_steps)
    scheduler = new_scheduler(original)
    channels = original.transformer.config.in_channels
    steps = teacher_steps(
        original,
        named_generator(seed, "held-out trajectories"),
        num_trajectories=num_trajectories,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
    )
    error = power = 0.0
    for done, step in enumerate(steps):
        with evaluating(quantized.transformer):
            student = quantized.transformer(step.latents, timestep=step.timesteps, class_labels=step.class_labels).sample
        wanted, found = (_guided_noise(p, step, guidance_scale, channels, scheduler) for p in (step.prediction, student))
        error += exact(wanted - found).square().sum().item()
        power += exact(wanted).square().sum().item()
        on_progress(Progress("measure", done + 1, num_inference_steps, {"noise_nmse": _part(error, power)}))
    return _part(error, power)


def _part(error: float, power: float) -> float:
    """An error over the power of what it is an error of; where there is no power, any error is infinite."""
    return error / power if power else math.inf if error else 0.0


def _guided_noise(prediction: Tensor, step: TeacherStep, guidance_scale: float, channels: int, scheduler: Any) -> Tensor:
    half = len(step.latents) // 2
    return predicted_noise(guide(prediction, guidance_scale, channels), step.latents[:half], step.timesteps[:half], scheduler)


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
    guidance_scale: float
    seed: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FormatError(
                    f"a comparison holds finite numbers, and its {name} is {value}: the two models have nothing in common, or "
                    "one of them is damaged; compare a quantized model with the one it was made from"
                )


def compare(
    original: DiTPipeline,
    quantized: DiTPipeline,
    original_bytes: int,
    quantized_bytes: int,
    *,
    labels: Sequence[int],
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    on_progress: OnProgress = ignore,
) -> tuple[Comparison, list[SamplePair]]:
    """Same-seed image pairs of the labels (seed, seed + 1, ... in turn) and all figures.

    Raises:
        FormatError: if a figure is not finite; others as `sample`.
    """
    for pipeline in (original, quantized):
        check_sampling(pipeline, num_inference_steps, guidance_scale)
    seeds = [seed + i for i in range(len(labels))]
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "on_progress": on_progress,
    }
    nmse = noise_nmse(original, quantized, seed=seed, **settings)
    images, seconds = [], []
    for pipeline in (original, quantized):
        started = time.perf_counter()
        images.append(sample(pipeline, labels, seeds, **settings))
        seconds.append((time.perf_counter() - started) / num_inference_steps / len(labels))
    pairs = [SamplePair(label, s, a, b) for label, s, a, b in zip(labels, seeds, *images, strict=True)]
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
        guidance_scale=guidance_scale,
        seed=seed,
    )
    return report, pairs
