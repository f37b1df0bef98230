"""The three recipes, as jobs that can stop and go on.

    kmeans   codebooks by k-means, nearest assignments, done
    paper    VQ4DiT: k-means, n candidates per sub-vector, zero-data block-wise calibration, the largest ratio wins
    best     integers instead of codewords, with bits where they matter, layer by layer with error feedback (`entropy_coded.py`)

`quantize` does it in one go. `run` does it as a job on disk that can stop and go on; both end in the same bytes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vq4dit.config import QuantizationSettings, Recipe, VQ4DiTConfig, check_settings
from vq4dit.denoisers import denoiser_of, denoisers_of, names_in_denoiser, transformers_in
from vq4dit.disk.job import Job, TimeBudget
from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.schema import format_version
from vq4dit.models.adapters import adapter_layers, adapter_names
from vq4dit.models.blocks import equal_embedders, find_targets
from vq4dit.models.conditions import condition_kind
from vq4dit.models.prompts import PROMPTS
from vq4dit.models.rehearsal import rehearse
from vq4dit.models.student import rest_dtype
from vq4dit.models.trajectories import STEPS
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.provenance import made_by
from vq4dit.pipelines.quantizer import attach
from vq4dit.progress import OnProgress, ignore
from vq4dit.recipes.entropy_coded import entropy_coded_stages
from vq4dit.recipes.plan import Plan
from vq4dit.recipes.stages import Stages, run_stages
from vq4dit.recipes.vector_quantized import kmeans_stages, paper_stages
from vq4dit.surroundings import ordinary_torch, with_gradients

FINITE_CHUNK = 2**22  # values looked at in one go
RECIPES: dict[Recipe, Callable[[Any, Plan, QuantizationSettings], Stages]] = {
    "kmeans": kmeans_stages,
    "paper": paper_stages,
    "best": entropy_coded_stages,
}


@ordinary_torch()
def quantize(pipeline: Any, settings: QuantizationSettings | None = None, on_progress: OnProgress = ignore) -> Any:
    """Quantize the transformer of a pipeline; the original stays as it is.

    Args:
        settings: by default the recipe `best` at 2 bits.

    Returns:
        A pipeline of the same kind, whose other parts are shared with the original. `save_pretrained` packs it.

    Raises:
        UnsupportedModelError: see `check`.
    """
    settings = QuantizationSettings() if settings is None else settings
    check(pipeline, settings)
    with tempfile.TemporaryDirectory() as folder:
        with Job.open(Path(folder), settings, pipeline, resume=False) as job:
            return run(job, pipeline, on_progress=on_progress)


@ordinary_torch()
def run(job: Job, pipeline: Any, seconds: float | TimeBudget | None = None, on_progress: OnProgress = ignore) -> Any | None:
    """Go on with a job until it is done, or until `seconds` are nearly over.

    Args:
        seconds: from now on; None is as long as it takes, and a `TimeBudget` says it anew whenever it is asked.

    Returns:
        The quantized pipeline, or None if time ran out first: everything finished is on disk, call it again.
    """
    budget = seconds if isinstance(seconds, TimeBudget) else TimeBudget(seconds)
    pipeline = with_gradients(pipeline)
    plan = check(pipeline, job.settings)
    stages = RECIPES[job.settings.recipe](pipeline, plan, job.settings)
    student = run_stages(job, stages, budget, on_progress)
    return None if student is None else _finish(pipeline, student, job)


@ordinary_torch()
@torch.no_grad()
def check(pipeline: Any, settings: QuantizationSettings) -> Plan:
    """Everything that can be wrong, found before minutes are spent; returns what will be done.

    Raises:
        UnsupportedModelError: if the model is quantized already, carries an adapter, is offloaded, is stored in less than 16
            bit or has no blocks, its pipeline cannot make zero data for the recipe, or a weight of any part is not finite.
        ValueError: if these are no settings.
    """
    check_settings(settings)
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        raise UnsupportedModelError(
            f"a {type(pipeline).__name__} has no transformer; vq4dit quantizes diffusion transformers such as "
            "facebook/DiT-XL-2-256"
        )
    denoiser = denoiser_of(pipeline)
    for transformer in transformers_in(denoiser).values():
        _check_original(transformer)
    if settings.recipe != "kmeans":
        condition_kind(pipeline)
    targets, kept = find_targets(denoiser, settings.subvector_dim, settings.num_codewords, settings.keep)
    _check_finite(pipeline)
    for name, linear in targets.items():
        for p in linear.parameters():
            if p.abs().max() > torch.finfo(torch.float16).max:
                found = f"{name} has values above 65504, the largest that fp16 holds"
                raise UnsupportedModelError(
                    f"{found}: leave it in 16 bit with --keep {name}",
                    page=f"{found}: name it under the layers to keep in 16 bit",
                )
    steps = settings.calibration.num_inference_steps if settings.recipe == "paper" else STEPS
    samples = settings.recipe != "kmeans"
    sampling = rehearse(pipeline, settings.call_arguments, steps, settings.prompts or PROMPTS) if samples else None
    return Plan(targets, kept, sampling)


def _check_original(transformer: Any) -> None:
    """Raise `UnsupportedModelError` unless this is a model as it was trained, whole and in memory."""
    if getattr(transformer, "is_quantized", False):
        method = transformer.quantization_method
        raise UnsupportedModelError(f"this model is quantized already ({method.value}): start from the original model")
    if attached := adapter_layers(transformer):
        name, wrapper = next(iter(attached.items()))
        raise UnsupportedModelError(
            f"the adapter {', '.join(adapter_names(wrapper))} is attached to {name}: merge it (pipeline.fuse_lora and then "
            "pipeline.unload_lora_weights, or merge_and_unload of the PEFT model) or unload it before quantizing"
        )
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if tensor.device.type == "meta":
            raise UnsupportedModelError(
                f"{name} is not in memory (the model is offloaded, or was made on the meta device): load the pipeline without "
                "device_map and offloading, it is quantized on the device where it lies"
            )
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{name} is of type {tensor.dtype}, as layerwise casting stores it: quantize the model as it was loaded, in "
                "fp32, fp16 or bf16"
            )


def _check_finite(pipeline: Any) -> None:
    """Raise `UnsupportedModelError` if a weight is not finite: of the transformer, or of a part that is copied beside it."""
    parts = {"transformer": pipeline.transformer, **pipeline.components}
    for part, module in parts.items():
        for name, p in module.named_parameters() if isinstance(module, nn.Module) else ():
            if not _is_finite(p):
                raise UnsupportedModelError(
                    f"{name if part == 'transformer' else f'{part}.{name}'} has values that are not finite (NaN or infinity): "
                    "the file is damaged, or was converted to a type too small for it"
                )


def _is_finite(values: Tensor) -> bool:
    """Looked at in pieces: parts that are not quantized may be large. What is not in memory is not looked at."""
    if not values.is_floating_point() or values.device.type == "meta":
        return True
    return all(bool(torch.isfinite(piece.float()).all()) for piece in values.detach().flatten().split(FINITE_CHUNK))


def _finish(pipeline: Any, student: nn.Module, job: Job) -> Any:
    """The pipeline with what was quantized in place of its transformers; these know how they were made."""
    quantized = copy.copy(pipeline)  # `type(pipeline)(**components)` would lose the class labels
    originals = denoisers_of(pipeline)
    for name, inside in names_in_denoiser(originals).items():
        original: nn.Module = originals[name]
        made: Any = student.get_submodule(inside)
        if packed_layers(made):  # otherwise all of its layers are kept, and it stays what it is
            attach(made, _config_of(original, made, job.settings))
            made.vq4dit_origin = made_by(job.settings, job.fingerprint)
            quantized.register_modules(**{name: made})
    if labels := getattr(pipeline, "labels", None):  # DiTPipeline reads them from model_index.json but does not write them
        names = {str(index): [name for name, i in labels.items() if i == index] for index in sorted(set(labels.values()))}
        quantized.register_to_config(id2label={index: ", ".join(words) for index, words in names.items()})
    return quantized


def _config_of(original: nn.Module, made: nn.Module, settings: QuantizationSettings) -> VQ4DiTConfig:
    """What the file of a quantized transformer says of it."""
    return VQ4DiTConfig(
        format_version=format_version(packed_layers(made).values()),
        bits=settings.bits,
        recipe=settings.recipe,
        seed=settings.seed,
        dtype=str(rest_dtype(original)).removeprefix("torch."),
        shared_embedders=equal_embedders(made),
    )
