"""Whether a pipeline can be sampled, and how much one sample shows: found out before the work, by trying.

The size is small: as large as the model is made for, but with no more than about a thousand positions, since what is learned
from more of them in one image is much the same. Then the pipeline draws one sample whose first step is real; in all others its
transformer answers what it answered then, so that the scheduler's steps, the guidance and their ends are tried at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn

from vq4dit.denoisers import denoiser_of, transformers_in
from vq4dit.errors import BROKEN, UnsupportedModelError, VQ4DiTError, brief
from vq4dit.memory import is_out_of_memory
from vq4dit.models.block_replay import replaced_forwards
from vq4dit.models.blocks import named_blocks
from vq4dit.models.conditions import call_arguments, condition_kind, num_classes, parameters_of
from vq4dit.models.prompts import PROMPTS
from vq4dit.models.trajectories import STEPS, GuidedStep, Sampling, random_trajectories

MOST_POSITIONS = 1024  # of one sample's latents, where the pipeline can be told a size
FEWEST_PIXELS = 64  # height and width are halved down to this
MULTIPLE = 32  # of height and width in pixels
PICTURES = ("image", "images", "video", "control_image", "conditions")  # some calls need one though it has a default, None
FRAMES = ("num_frames", "video_length")
SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def rehearse(
    pipeline: Any, call: Mapping[str, Any], num_inference_steps: int = STEPS, prompts: Sequence[str] = PROMPTS
) -> Sampling:
    """Sample once, for real in the first step only.

    Raises:
        UnsupportedModelError: if the pipeline, its scheduler or its transformer does not work with its settings.
        VQ4DiTError: if its scheduler knows fewer steps.
        ValueError: if the pipeline's call has no such argument.
    """
    check_steps(pipeline, num_inference_steps)
    _check_labels(pipeline)
    call_arguments(pipeline, [], num_inference_steps, [], call)  # what the call does not take is misuse, no broken model
    call = {**small_size(pipeline), **call}
    try:
        with torch.no_grad():
            sampling = Sampling(call, prompts)
            return sampling._replace(tokens=_tokens(pipeline, sampling, num_inference_steps))
    except VQ4DiTError:
        raise
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        name, found = type(pipeline).__name__, brief(error)
        if wanted := [other for other in PICTURES if other in parameters_of(pipeline) and other not in call]:
            raise UnsupportedModelError(
                f"{name} draws nothing when it is told a prompt and no {wanted[0]} ({found}): choose the recipe kmeans, which "
                "needs no samples"
            ) from error
        raise UnsupportedModelError(
            f"{name} does not work with the settings of its parts ({found}): correct their config.json, install what it asks "
            "for, or download the model again"
        ) from error


def check_steps(pipeline: Any, num_inference_steps: int) -> None:
    """Raise unless the scheduler can take so many steps."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    known = pipeline.scheduler.config.get("num_train_timesteps", num_inference_steps)
    if num_inference_steps > known > 1:  # a scheduler of a single one has a time without steps, from 1 to 0
        raise VQ4DiTError(
            f"there are at most {known} denoising steps (num_train_timesteps of {type(pipeline.scheduler).__name__}), and "
            f"{num_inference_steps} were asked for: take fewer steps"
        )


def _check_labels(pipeline: Any) -> None:
    if condition_kind(pipeline) != "class_labels":
        return
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if num_classes(pipeline) > classes:
        raise UnsupportedModelError(
            f"the labels go up to class {num_classes(pipeline) - 1}, and the transformer knows {classes} classes: correct "
            "id2label in model_index.json"
        )


def _tokens(pipeline: Any, sampling: Sampling, num_inference_steps: int) -> int:
    """Rows of the layer that sees most of them, in the first step."""
    denoiser = denoiser_of(pipeline)
    rows: dict[nn.Module, int] = {}
    of_step: list[int] = []

    def count(linear: nn.Module, arguments: tuple) -> None:
        rows[linear] = rows.get(linear, 0) + arguments[0].numel() // arguments[0].shape[-1]

    def watch(step: GuidedStep) -> None:
        of_step.append(max(rows.values(), default=1))
        if not (step.prediction.isfinite().all() and step.latents.isfinite().all()):
            raise UnsupportedModelError(
                f"step {step.number} of {type(pipeline).__name__} predicts values that are not finite (NaN or infinity): a "
                "weight or a setting of the model is damaged; download it again"
            )

    linears = [m for block in named_blocks(denoiser).values() for m in block.modules() if isinstance(m, nn.Linear)]
    handles = [linear.register_forward_pre_hook(count) for linear in linears]
    answers = {transformer: _FirstAnswers(transformer.forward, of_step) for transformer in transformers_in(denoiser).values()}
    try:
        with replaced_forwards(answers):
            generator = torch.Generator().manual_seed(0)
            random_trajectories(pipeline, sampling, 1, generator, watch, num_inference_steps=num_inference_steps)
    finally:
        for handle in handles:
            handle.remove()
    return of_step[0]


class _FirstAnswers:
    """In the place of a transformer: in the first step that asks it, it answers for real; in all others, the same again."""

    def __init__(self, forward: Callable[..., Any], steps_before: Sized):
        self.forward, self.steps_before = forward, steps_before
        self.first: int | None = None
        self.answered: list[Any] = []

    def __call__(self, *positional: Any, **named: Any) -> Any:
        if self.first is None:
            self.first = len(self.steps_before)
        is_first = self.first == len(self.steps_before)
        self.answered.append(self.forward(*positional, **named) if is_first else self.answered.pop(0))  # in turn
        return self.answered[-1]


def small_size(pipeline: Any) -> dict[str, int]:
    """Height, width and number of frames in the pipeline's own units, where its call takes them; otherwise nothing."""
    parameters = parameters_of(pipeline)
    size = {name: frames for name in FRAMES if name in parameters and (frames := _few_frames(pipeline, name))}
    height, width = (_pixels(pipeline, side) for side in ("height", "width"))
    if "height" in parameters and height and width:
        most = MOST_POSITIONS * spatial_scale(pipeline) ** 2 / latent_frames(pipeline, max(size.values(), default=1))
        while height * width > most and min(height, width) > FEWEST_PIXELS:
            height, width = (max(FEWEST_PIXELS, MULTIPLE * round(side / 2 / MULTIPLE)) for side in (height, width))
        size |= {"height": height, "width": width}
    return size


def _few_frames(pipeline: Any, name: str) -> int | None:
    """As many as the pipeline draws by default, but not more than make three of the transformer's."""
    default = parameters_of(pipeline)[name].default
    frames = default if isinstance(default, int) else getattr(pipeline.transformer.config, "sample_frames", None)
    stride = _scale(pipeline, TEMPORAL)
    return min(frames, 2 * stride + 1) if isinstance(frames, int) else None


def latent_frames(pipeline: Any, frames: int) -> int:
    """Of a film: those that the transformer sees."""
    return (frames - 1) // _scale(pipeline, TEMPORAL) + 1


def _pixels(pipeline: Any, side: str) -> int | None:
    """Pixels of a sample that the model is made for: no more than its autoencoder is."""
    default = parameters_of(pipeline)[side].default if side in parameters_of(pipeline) else None
    latents = getattr(pipeline, "default_sample_size", None) or getattr(pipeline.transformer.config, "sample_size", None)
    by_latents = latents * _scale(pipeline, SPATIAL) if isinstance(latents, int) else None
    of_vae = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "sample_size", None)
    known = (default if isinstance(default, int) else by_latents, of_vae)
    return min((pixels for pixels in known if isinstance(pixels, int)), default=None)


def spatial_scale(pipeline: Any) -> int:
    """Pixels of one position of the transformer, in height and in width.

    A pipeline that packs latents says more than its patches do: of what height and width must be multiples.
    """
    patch = getattr(pipeline.transformer.config, "patch_size", 1)
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    configs = (getattr(getattr(pipeline, f"{kind}_processor", None), "config", {}) for kind in ("image", "video"))
    multiples = [scale for config in configs if isinstance(scale := config.get("vae_scale_factor"), int)]
    return max(_scale(pipeline, SPATIAL) * (patch if isinstance(patch, int) else 1), *multiples, 1)


def _scale(pipeline: Any, names: Sequence[str]) -> int:
    """By how much an autoencoder makes something smaller; pipelines have several names for it."""
    return next((int(scale) for name in names if (scale := getattr(pipeline, name, None))), 8)
