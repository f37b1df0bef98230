"""Look at the result: how far the quantized model's noise and images are from the original's, and what it weighs.

`noise_nmse` is the figure to trust: the squared error of the predicted noise over its power, guidance on, on zero-data
trajectories that calibration never saw. Images follow one noise all the way, so small errors move them: PSNR and SSIM
compare same-seed images and say how much a person sees. Always measured on the hardened, packed model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from vq4dit.devices import exact
from vq4dit.errors import BROKEN, FormatError, UnsupportedModelError, brief
from vq4dit.layers.packed import PackedLinear
from vq4dit.memory import is_out_of_memory, peak_memory
from vq4dit.models.zero_data import (
    NULL_CLASS,
    TeacherStep,
    check_class_conditional,
    check_steps,
    check_supported,
    guide,
    new_scheduler,
    null_class,
    num_classes,
    predicted_noise,
    teacher_steps,
)
from vq4dit.pipelines.quantizer import packed_layers, parts_of
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


class SamplePair(NamedTuple):
    """The same class and seed through both models: (h, w, 3) in [0, 1]."""

    label: int
    seed: int
    original: np.ndarray
    quantized: np.ndarray

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB."""
        return float(10 * np.log10(1 / max(np.mean((self.original - self.quantized) ** 2), 1e-12)))

    @property
    def ssim(self) -> float:
        """Structural similarity, 1 for equal images."""
        return structural_similarity_index_measure(_as_batch(self.quantized), _as_batch(self.original), data_range=1.0).item()

    @property
    def difference(self) -> np.ndarray:
        """Absolute difference, four times amplified, dark where the images agree."""
        return np.clip(4 * np.abs(self.original - self.quantized), 0, 1)


def _as_batch(image: np.ndarray) -> Float[Tensor, "1 3 h w"]:
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)


@ordinary_torch()
def sample(
    pipeline: DiTPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    batch_size: int = 16,
    on_progress: OnProgress = ignore,
) -> Float[np.ndarray, "n h w 3"]:
    """Images of the classes; image i starts from the noise of seeds[i] whatever else is in the batch.

    Raises:
        UnsupportedModelError: if guidance needs images of no class, and the pipeline cannot ask for them; if its parts do not
            work together, or make no finite images.
        VQ4DiTError: if its scheduler knows fewer steps.
    """
    check_sampling(pipeline, num_inference_steps, guidance_scale)
    images: list[np.ndarray] = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images.extend(_drawn(pipeline, list(labels[part]), guidance_scale, generators, num_inference_steps))
        on_progress(Progress("sample", len(images), len(labels)))
    return np.stack(images)


def _drawn(
    pipeline: DiTPipeline, labels: list[int], guidance_scale: float, generators: list[torch.Generator], num_inference_steps: int
) -> Float[np.ndarray, "n h w 3"]:
    """One batch of images; what the pipeline's own code raises is told in our words."""
    try:
        with evaluating(*parts_of(pipeline)):
            images = pipeline(
                labels,
                guidance_scale=guidance_scale,
                generator=generators,
                num_inference_steps=num_inference_steps,
                output_type="np",
            ).images
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} cannot make images with the settings of its parts ({brief(error)}): correct their "
            "config.json, or download the model again"
        ) from error
    if not np.isfinite(images).all():
        raise UnsupportedModelError(
            "the images have values that are not finite (NaN or infinity): a weight or a setting of the model is damaged; "
            "download it again"
        )
    return images


def check_sampling(pipeline: DiTPipeline, num_inference_steps: int, guidance_scale: float) -> None:
    """Raise `VQ4DiTError` unless a pipeline can draw with so many steps and so much guidance."""
    check_class_conditional(pipeline)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    check_steps(pipeline, num_inference_steps)
    if guidance_scale > 1 and null_class(pipeline) < NULL_CLASS:
        raise UnsupportedModelError(
            f"with guidance DiTPipeline asks for class {NULL_CLASS}, which means none, and this model's embedder ends at "
            f"{null_class(pipeline)}: its images can be made at a guidance scale of 1"
        )


def label_ids(pipeline: DiTPipeline, labels: Sequence[str]) -> list[int]:
    """Class numbers of names or numbers.

    Raises:
        ValueError: if there is no such class.
    """
    ids = []
    for label in labels:
        is_number = label.isascii() and label.isdecimal() and len(label) < 10
        if is_number and int(label) < num_classes(pipeline):
            ids.append(int(label))
        elif label in pipeline.labels:
            ids.append(pipeline.labels[label])
        else:
            some = ", ".join(list(pipeline.labels)[:6])
            raise ValueError(f"there is no class {label!r:.60}; there are {num_classes(pipeline)}, such as {some or '0'}")
    return ids


def grid(images: Sequence[np.ndarray] | np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Images of one size side by side on white."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return as_image(canvas)


def image_bytes(pipeline: DiTPipeline) -> int:
    """Bytes of an image of this pipeline, uncompressed: what its file takes at most, but for a header."""
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return 3 * (pipeline.transformer.config.sample_size * scale) ** 2 + 1000


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


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
