"""Same-seed images of an original and a quantized model, and how far they are apart.

Images follow one noise all the way, so small errors of it move them: PSNR and SSIM say how much a person sees of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vq4dit.errors import BROKEN, UnsupportedModelError, brief
from vq4dit.memory import is_out_of_memory
from vq4dit.models.supported import check_class_conditional, check_steps
from vq4dit.models.zero_data import NULL_CLASS, null_class, num_classes
from vq4dit.pipelines.decode_modes import parts_of
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.surroundings import evaluating, ordinary_torch


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
