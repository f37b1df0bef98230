"""Same-seed images of an original and a quantized model, and how far they are apart.

Images follow one noise all the way, so small errors of it move them: PSNR and SSIM say how much a person sees of that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vq4dit.denoisers import denoiser_of
from vq4dit.errors import BROKEN, UnsupportedModelError, brief
from vq4dit.memory import is_out_of_memory
from vq4dit.models.blocks import parts_of
from vq4dit.models.conditions import (
    NULL_CLASS,
    Condition,
    call_arguments,
    condition_kind,
    guided_call,
    knows_no_class,
    num_classes,
    parameters_of,
    undecorated_call,
)
from vq4dit.models.prompts import HELD_OUT
from vq4dit.models.rehearsal import FRAMES, check_steps
from vq4dit.models.trajectories import NO_CALL, is_large
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.surroundings import evaluating, ordinary_torch

SHOWN_FRAMES = 8  # of a film, in a picture


class SamplePair(NamedTuple):
    """The same condition and seed through both models: an image (h, w, 3) or a film (frames, h, w, 3) in [0, 1]."""

    condition: Condition
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


def _as_batch(image: np.ndarray) -> Float[Tensor, "frames 3 h w"]:
    frames = image if image.ndim == 4 else image[None]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


@ordinary_torch()
def sample(
    pipeline: Any,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 25,
    call: Mapping[str, Any] = NO_CALL,
    batch_size: int | None = None,
    on_progress: OnProgress = ignore,
) -> Float[np.ndarray, "n ... h w 3"]:
    """Images (or films) of the conditions; number i starts from the noise of seeds[i] whatever else is in the batch.

    Args:
        call: further arguments of the pipeline's call, such as `{"guidance_scale": 4.0}`.
        batch_size: of what is drawn side by side; by default 16, and 1 for large models of prompts, whose images are large too.

    Raises:
        UnsupportedModelError: if guidance needs images of no class, and the pipeline cannot ask for them; if its parts do not
            work together, or make no finite images.
        VQ4DiTError: if its scheduler knows fewer steps.
        ValueError: if the pipeline's call has no such argument.
    """
    check_sampling(pipeline, num_inference_steps, call)
    if batch_size is None:
        batch_size = 1 if is_large(denoiser_of(pipeline)) and condition_kind(pipeline) == "prompt" else 16
    images: list[np.ndarray] = []
    for start in range(0, len(conditions), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images.extend(_drawn(pipeline, list(conditions[part]), call, generators, num_inference_steps))
        on_progress(Progress("sample", len(images), len(conditions)))
    return np.stack(images)


def _drawn(
    pipeline: Any,
    conditions: list[Condition],
    call: Mapping[str, Any],
    generators: list[torch.Generator],
    num_inference_steps: int,
) -> Float[np.ndarray, "n ... h w 3"]:
    """One batch of images; what the pipeline's own code raises is told in our words."""
    arguments = call_arguments(pipeline, conditions, num_inference_steps, generators, call)
    if arguments.get("class_labels"):
        arguments["guidance_scale"] = guided_call(pipeline, call)["guidance_scale"]  # `check_sampling` allowed it
    try:
        with evaluating(*parts_of(pipeline)):
            drawn = pipeline(**arguments, output_type="np")
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} cannot make images with the settings of its parts ({brief(error)}): correct their "
            "config.json, or download the model again"
        ) from error
    pictures = getattr(drawn, "images", None) if hasattr(drawn, "images") else getattr(drawn, "frames", None)
    if pictures is None:
        raise UnsupportedModelError(f"{type(pipeline).__name__} makes neither images nor films: nothing else can be shown yet")
    images = np.asarray(pictures, dtype=np.float32)
    if not np.isfinite(images).all():
        raise UnsupportedModelError(
            "the images have values that are not finite (NaN or infinity): a weight or a setting of the model is damaged; "
            "download it again"
        )
    return images


def check_sampling(pipeline: Any, num_inference_steps: int, call: Mapping[str, Any] = NO_CALL) -> None:
    """Raise `VQ4DiTError` unless a pipeline can draw with so many steps and what else its call is told."""
    kind = condition_kind(pipeline)
    told = guided_call(pipeline, call)
    guidance_scale = told.get("guidance_scale") or 0.0
    if not isinstance(guidance_scale, float | int) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    check_steps(pipeline, num_inference_steps)
    call_arguments(pipeline, [], num_inference_steps, [], call)
    if kind == "class_labels" and guidance_scale > 1 and not knows_no_class(pipeline):
        raise UnsupportedModelError(
            f"with guidance DiTPipeline asks for class {NULL_CLASS}, which means none, and this model's embedder ends at "
            f"{pipeline.transformer.config.num_embeds_ada_norm}: its images can be made at a guidance scale of 1"
        )


def label_ids(pipeline: Any, labels: Sequence[str]) -> list[int]:
    """Class numbers of names or numbers.

    Raises:
        ValueError: if there is no such class.
    """
    known = getattr(pipeline, "labels", None) or {}
    ids = []
    for label in labels:
        is_number = label.isascii() and label.isdecimal() and len(label) < 10
        if is_number and int(label) < num_classes(pipeline):
            ids.append(int(label))
        elif label in known:
            ids.append(known[label])
        else:
            some = ", ".join(list(known)[:6])
            raise ValueError(f"there is no class {label!r:.60}; there are {num_classes(pipeline)}, such as {some or '0'}")
    return ids


def some_conditions(pipeline: Any, count: int = 8) -> list[Condition]:
    """What is drawn if nobody says what: classes spread over all, or prompts that no model is calibrated on."""
    if classes := num_classes(pipeline):
        count = min(count, classes)
        return [i * classes // count for i in range(count)]
    return list(HELD_OUT[:count])


def makes_films(pipeline_class: type) -> bool:
    """Whether pipelines of this class draw films: their call takes a number of frames."""
    return bool(set(FRAMES) & inspect.signature(undecorated_call(pipeline_class)).parameters.keys())


def strip(pixels: np.ndarray, gap: int = 2) -> np.ndarray:
    """An image as it is; of a film at most `SHOWN_FRAMES` frames, spread over it, side by side on white."""
    if pixels.ndim == 3:
        return pixels
    shown = np.linspace(0, len(pixels) - 1, min(SHOWN_FRAMES, len(pixels))).round().astype(int)
    height, width = pixels.shape[1:3]
    canvas = np.ones((height, len(shown) * (width + gap) - gap, 3), dtype=pixels.dtype)
    for index, frame in enumerate(shown):
        canvas[:, index * (width + gap) :][:, :width] = pixels[frame]
    return canvas


def grid(images: Sequence[np.ndarray] | np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Images of one size, or strips of films, side by side on white."""
    tiles = [as_image(image) for image in images]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, tile in enumerate(tiles):
        canvas.paste(tile, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return canvas


def image_bytes(pipeline: Any, call: Mapping[str, Any] = NO_CALL) -> int:
    """Bytes of an image of this pipeline, uncompressed: what its file takes at most, but for a header. Of a film, its strip."""
    defaults = {name: parameter.default for name, parameter in parameters_of(pipeline).items()}
    told = {name: value for name, value in {**defaults, **call}.items() if isinstance(value, int) and value > 0}
    side = _default_side(pipeline)
    frames = SHOWN_FRAMES if makes_films(type(pipeline)) else 1
    return 3 * told.get("height", side) * told.get("width", side) * frames + 1000


def _default_side(pipeline: Any) -> int:
    """Height and width where the call has no number for them: what the model is made for, or 0 if that is unknown."""
    vae = getattr(pipeline, "vae", None)
    scale = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
    if not scale:
        scale = 2 ** (len(vae.config.get("block_out_channels", [1])) - 1) if vae else 1
    latents = getattr(pipeline, "default_sample_size", None) or getattr(pipeline.transformer.config, "sample_size", None)
    return int(scale * latents) if isinstance(latents, int) else 0


def as_image(pixels: np.ndarray) -> Image.Image:
    """An image, or the strip of a film."""
    return Image.fromarray((strip(pixels) * 255).round().astype(np.uint8))
