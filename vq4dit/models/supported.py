"""Whether trajectories of a pipeline can be made, found out before the work: by its class, then by trying it on nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTPipeline

from vq4dit.errors import BROKEN, UnsupportedModelError, VQ4DiTError, brief
from vq4dit.models.zero_data import STEPS, new_scheduler, num_classes


def check_class_conditional(pipeline: Any) -> None:
    """Raise `UnsupportedModelError` unless this pipeline draws classes, as `DiTPipeline` does."""
    if not isinstance(pipeline, DiTPipeline):
        made_for = (
            "sampling and zero-data trajectories are made for DiTPipeline models such as facebook/DiT-XL-2-256, this is a "
            f"{type(pipeline).__name__}"
        )
        raise UnsupportedModelError(
            f"{made_for}; only quantizing with --recipe kmeans needs none",
            page=f"{made_for}: choose the recipe kmeans, which needs none",
        )


def check_supported(pipeline: Any, num_inference_steps: int = STEPS) -> None:
    """Raise `VQ4DiTError` unless trajectories of so many steps can be made with this pipeline."""
    check_class_conditional(pipeline)
    scheduler = pipeline.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        made_by = (
            "trajectories are made by schedulers that tell how much noise each timestep has (alphas_cumprod), such as DDIM; "
            f"{type(scheduler).__name__} does not"
        )
        raise UnsupportedModelError(
            f"{made_by}: choose another one in scheduler/scheduler_config.json, or --recipe kmeans",
            page=f"{made_by}: choose the recipe kmeans, or another model",
        )
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if num_classes(pipeline) > classes:
        raise UnsupportedModelError(
            f"the labels go up to class {num_classes(pipeline) - 1}, and the transformer knows {classes} classes: correct "
            "id2label in model_index.json"
        )
    check_steps(pipeline, num_inference_steps)
    _try(lambda: _walk_on_nothing(pipeline, num_inference_steps), type(scheduler).__name__, "scheduler/scheduler_config.json")
    _try(lambda: _call_without_weights(pipeline.transformer), type(pipeline.transformer).__name__, "transformer/config.json")


def check_steps(pipeline: DiTPipeline, num_inference_steps: int) -> None:
    """Raise unless the scheduler can take so many steps."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    known = pipeline.scheduler.config.get("num_train_timesteps", num_inference_steps)
    if num_inference_steps > known:
        raise VQ4DiTError(
            f"there are at most {known} denoising steps (num_train_timesteps of {type(pipeline.scheduler).__name__}), and "
            f"{num_inference_steps} were asked for: take fewer steps"
        )


def _try(work: Callable[[], bool], name: str, config: str) -> None:
    """Raise `UnsupportedModelError` if what a config describes fails as soon as it is used: before the work."""
    try:
        works, told = work(), "what it makes is not what went in"
    except BROKEN as error:
        works, told = False, brief(error)
    if not works:
        raise UnsupportedModelError(
            f"{name} does not work with its settings ({told}): correct {config}, or download the model again"
        )


def _walk_on_nothing(pipeline: DiTPipeline, num_inference_steps: int) -> bool:
    """Whether the scheduler's steps come to an end."""
    scheduler = new_scheduler(pipeline)
    scheduler.set_timesteps(num_inference_steps)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
    latents = torch.ones(1, pipeline.transformer.config.in_channels, 2, 2)
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t), t, latents, **extra).prev_sample
    return bool(latents.isfinite().all())


def _call_without_weights(transformer: Any) -> bool:
    """Whether a model of this config, on the meta device, takes latents and returns what can be noise."""
    config = transformer.config
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"), torch.no_grad():
        model = type(transformer).from_config(settings).eval()
        latents = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)
        numbers = torch.zeros(2, dtype=torch.long)
        prediction = model(latents, timestep=numbers, class_labels=numbers).sample
    return prediction[:, : config.in_channels].shape == latents.shape
