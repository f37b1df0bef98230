"""The recipe: cluster every layer, calibrate, harden.

    kmeans   codebooks by k-means, nearest assignments, done
    paper    VQ4DiT: k-means, n candidates per sub-vector, zero-data block-wise calibration, the largest ratio wins
    best     layer by layer with error feedback, a scale per row; then all that is not an assignment is tuned

`quantize` does it in one go. `run` does it as a job on disk that can stop and go on; both end in the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.calibration import Calibration
from vq4dit.codebook import nearest_codewords, split_subvectors
from vq4dit.config import QuantizationSettings, VQ4DiTConfig
from vq4dit.diffusers_quantizer import attach, vq_layers
from vq4dit.dit import equal_embedders, find_targets
from vq4dit.errors import UnsupportedModelError
from vq4dit.job import Job, TimeBudget
from vq4dit.kmeans import fit_codebook
from vq4dit.layer_by_layer import calibration_walk, fit_layer, groups_in_turn
from vq4dit.layers import SoftVQLinear, TunableVQLinear, VQLinear, start_logits
from vq4dit.progress import OnProgress, Progress, Stage, ignore
from vq4dit.sensitivity import output_sensitivities
from vq4dit.student import rest_dtype, round_rest, student_with
from vq4dit.tuning import Tuning, num_updates, record_samples, walks
from vq4dit.zero_data import check_supported, is_large

CHECKPOINT_SECONDS = 15.0
CHECKPOINT_SHARE = 0.1  # at most this part of the time goes into writing checkpoints
WRITE_BYTES_PER_SECOND = 2e8  # a guess, until the first checkpoint tells


def quantize(pipeline: Any, settings: QuantizationSettings | None = None, on_progress: OnProgress = ignore) -> Any:
    """Quantize the transformer of a pipeline; the original stays as it is.

    Returns:
        A pipeline of the same kind, whose other parts are shared with the original. `save_pretrained` packs it.

    Raises:
        UnsupportedModelError: see `check`.
    """
    settings = settings or QuantizationSettings()
    check(pipeline, settings)
    with tempfile.TemporaryDirectory() as folder:
        with Job.open(Path(folder), settings, pipeline, resume=False) as job:
            return run(job, pipeline, on_progress=on_progress)


def run(job: Job, pipeline: Any, seconds: float | None = None, on_progress: OnProgress = ignore) -> Any | None:
    """Go on with a job until it is done, or until `seconds` are nearly over.

    Returns:
        The quantized pipeline, or None if time ran out first: everything finished is on disk, call it again.
    """
    budget = TimeBudget(seconds)
    targets = check(pipeline, job.settings)
    if job.settings.recipe == "best":
        return _best(job, pipeline, targets, budget, on_progress)
    if not _cluster(job, targets, budget, on_progress):
        return None
    if job.settings.recipe == "kmeans":
        hardened = {name: _clustered_layer(job, name, linear) for name, linear in targets.items()}
        return _finish(pipeline, student_with(pipeline.transformer, hardened), job.settings)
    soft = {name: _soft_layer(job, name, linear) for name, linear in targets.items()}
    student = student_with(pipeline.transformer, soft)
    with torch.enable_grad():
        if not calibrate(job, pipeline, student, budget, on_progress):
            return None
    for name, layer in soft.items():
        student.set_submodule(name, layer.harden(targets[name].weight.dtype))
    return _finish(pipeline, student, job.settings)


def _best(job: Job, pipeline: Any, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress) -> Any | None:
    student = _fit_layers(job, pipeline, targets, budget, on_progress)
    if student is None:
        return None
    large, on_cpu = is_large(pipeline.transformer), pipeline.transformer.device.type == "cpu"
    if updates := num_updates(job.settings.calibration, large=large, on_cpu=on_cpu):
        tunable = {name: TunableVQLinear(layer) for name, layer in vq_layers(student).items()}
        for name, layer in tunable.items():
            student.set_submodule(name, layer)
        if not _tune(job, pipeline, student, updates, budget, on_progress):
            return None
        for name, layer in tunable.items():
            student.set_submodule(name, layer.harden(targets[name].weight.dtype))
        dtypes = {name: p.dtype for name, p in pipeline.transformer.named_parameters()}
        for name, p in student.named_parameters():  # those of hard layers but the bias are not in the original
            p.data = p.data.to(dtypes.get(name, p.dtype))
        round_rest(student, rest_dtype(pipeline.transformer))
    return _finish(pipeline, student, job.settings)


def _tune(job: Job, pipeline: Any, student: nn.Module, updates: int, budget: TimeBudget, on_progress: OnProgress) -> bool:
    """Run the tuning of `best` from its newest checkpoint to its end; False if time ran out."""
    config = job.settings.calibration
    begun = Progress("tune", 0, updates)  # a sign of life, and a moment to stop
    pieces, slowest = [], 0.0
    for first, count in walks(pipeline, updates * config.tuning_batch).items():
        pieces.append(f"samples-{first}")
        if job.has(pieces[-1]):
            continue
        if slowest and not budget.allows(2 * slowest):  # every slice makes at least one walk
            return False
        started = time.monotonic()
        generator = layer_generator(job.settings.seed, f"tuning {first}" if first else "tuning")
        job.write(pieces[-1], record_samples(pipeline, count, config.guidance_scale, generator, lambda: on_progress(begun)))
        slowest = max(slowest, time.monotonic() - started)
    device = next(student.parameters()).device
    read = [job.read(piece) for piece in pieces]
    samples = {name: torch.cat([part[name] for part in read]).to(device) for name in read[0]}
    with torch.enable_grad():
        tuning = Tuning(pipeline, student, samples, config, updates, layer_generator(job.settings.seed, "order of samples"))
        finished = _advance(job, "tuning", tuning, updates, budget, on_progress, "tune")
    tuning.student.disable_gradient_checkpointing()
    return finished


def check(pipeline: Any, settings: QuantizationSettings) -> dict[str, nn.Linear]:
    """Everything that can be wrong, found before minutes are spent; returns the layers to quantize.

    Raises:
        UnsupportedModelError: if the model is quantized already, has no blocks, its pipeline cannot make zero data for the
            recipe, or a weight is not finite.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedModelError(
            f"a {type(pipeline).__name__} has no transformer; vq4dit quantizes diffusion transformers such as "
            "facebook/DiT-XL-2-256"
        )
    if getattr(transformer, "is_quantized", False):
        raise UnsupportedModelError(
            f"this model is quantized already ({pipeline.transformer.quantization_method.value}): start from the original model"
        )
    if settings.recipe != "kmeans":
        check_supported(pipeline)
    targets, _ = find_targets(transformer, settings.subvector_dim, settings.num_codewords, settings.keep)
    for name, p in transformer.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise UnsupportedModelError(
                f"{name} has values that are not finite (NaN or infinity): the file is damaged, or was converted to a type "
                "too small for it"
            )
    for name, linear in targets.items():
        for p in linear.parameters():
            if p.abs().max() > torch.finfo(torch.float16).max:
                raise UnsupportedModelError(
                    f"{name} has values above 65504, the largest that an fp16 codebook holds: leave it in 16 bit with "
                    f"--keep {name}"
                )
    return targets


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Randomness of one layer: depends on the seed and the layer's name, not on the order of work."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def subvectors_of(linear: nn.Linear, dim: int) -> Float[Tensor, "n {dim}"]:
    return split_subvectors(linear.weight.detach().float(), dim)


def _cluster(job: Job, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress) -> bool:
    """Fit a codebook and find the candidates of every layer that has no piece yet; False if time ran out."""
    settings = job.settings
    count = 1 if settings.recipe == "kmeans" else settings.calibration.num_candidates
    slowest = 0.0
    for done, (name, linear) in enumerate(targets.items()):
        if not job.has(f"layers/{name}"):
            if slowest and not budget.allows(2 * slowest):  # every slice clusters at least one layer
                return False
            started = time.monotonic()
            subvectors = subvectors_of(linear, settings.subvector_dim)
            codebook = fit_codebook(subvectors, settings.num_codewords, generator=layer_generator(settings.seed, name))
            _, candidates = nearest_codewords(subvectors, codebook, count)
            job.write(f"layers/{name}", {"codebook": codebook, "candidates": candidates})
            slowest = max(slowest, time.monotonic() - started)
        on_progress(Progress("cluster", done + 1, len(targets)))
    return True


def _fit_layers(
    job: Job, pipeline: Any, targets: dict[str, nn.Linear], budget: TimeBudget, on_progress: OnProgress
) -> nn.Module | None:
    """Quantize layer by layer (`best`), one piece for each; the student, or None if time ran out."""
    settings = job.settings
    student = student_with(pipeline.transformer, {})
    if all(job.has(f"layers/{name}") for name in targets):  # a turn of the tuning: nothing is left to be walked for
        for name, linear in targets.items():
            student.set_submodule(name, _fitted_layer(job, name, linear))
        on_progress(Progress("fit", len(targets), len(targets)))
        return student
    guidance_scale = settings.calibration.guidance_scale
    begun = Progress("fit", 0, len(targets))  # a sign of life, and a moment to stop
    if not job.has("sensitivities"):
        started = time.monotonic()
        generator = layer_generator(settings.seed, "sensitivities")
        found = output_sensitivities(pipeline, list(targets), guidance_scale, generator, lambda: on_progress(begun))
        job.write("sensitivities", found)
        if not budget.allows(2 * (time.monotonic() - started)):  # the walk that follows takes about as long
            return None
    sensitivities = job.read("sensitivities")
    generator = layer_generator(settings.seed, "layer by layer")
    walk = calibration_walk(pipeline, guidance_scale, generator, lambda: on_progress(begun))
    done, slowest = 0, 0.0
    for group in groups_in_turn(pipeline.transformer, student, walk, list(targets)):
        missing = [name for name in group.names if not job.has(f"layers/{name}")]
        if missing:
            if slowest and not budget.allows(2 * slowest):  # every slice fits at least one group
                return None
            started = time.monotonic()
            statistics = group.statistics()
            for name in missing:
                quantized, bias = fit_layer(
                    targets[name],
                    statistics,
                    sensitivities[name].to(targets[name].weight.device),
                    settings.num_codewords,
                    settings.subvector_dim,
                    layer_generator(settings.seed, name),
                )
                job.write(f"layers/{name}", quantized._asdict() | ({} if bias is None else {"bias": bias}))
            slowest = max(slowest, time.monotonic() - started)
        for name in group.names:
            student.set_submodule(name, _fitted_layer(job, name, targets[name]))
        done += len(group.names)
        on_progress(Progress("fit", done, len(targets)))
    return student


def _fitted_layer(job: Job, name: str, linear: nn.Linear) -> VQLinear:
    piece = {key: tensor.to(linear.weight.device) for key, tensor in job.read(f"layers/{name}").items()}
    shape = (linear.out_features, linear.in_features)
    layer = VQLinear.from_assignments(
        piece["codebook"], piece["assignments"], shape, piece.get("bias"), piece["row_scale"], dtype=linear.weight.dtype
    )
    layer.decode(linear.weight.dtype)
    return layer


def _piece(job: Job, name: str, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    piece = job.read(f"layers/{name}")
    return piece["codebook"].to(linear.weight.device), piece["candidates"].to(linear.weight.device)


def _clustered_layer(job: Job, name: str, linear: nn.Linear) -> VQLinear:
    codebook, candidates = _piece(job, name, linear)
    shape = (linear.out_features, linear.in_features)
    return VQLinear.from_assignments(codebook, candidates[:, 0], shape, linear.bias, dtype=linear.weight.dtype)


def _soft_layer(job: Job, name: str, linear: nn.Linear) -> SoftVQLinear:
    codebook, candidates = _piece(job, name, linear)
    subvectors = subvectors_of(linear, job.settings.subvector_dim)
    logits = start_logits(subvectors, codebook, candidates, job.settings.calibration.ratio_start)
    return SoftVQLinear(codebook, candidates, logits, (linear.out_features, linear.in_features), linear.bias)


def calibrate(job: Job, pipeline: Any, student: nn.Module, budget: TimeBudget, on_progress: OnProgress) -> bool:
    """Run the calibration of `paper` from its newest checkpoint to its end; False if time ran out."""
    config = job.settings.calibration
    calibration = Calibration(pipeline, student, config, layer_generator(job.settings.seed, "zero data"))
    return _advance(job, "calibration", calibration, config.steps, budget, on_progress, "calibrate")


def _advance(
    job: Job,
    piece: str,
    learning: Calibration | Tuning,
    steps: int,
    budget: TimeBudget,
    on_progress: OnProgress,
    stage: Stage,
) -> bool:
    """Learn from the newest checkpoint to `steps`, with a checkpoint now and then; False if time ran out."""
    if job.has(piece):
        learning.restore(job.read(piece))
    step_seconds = 0.0
    write_seconds = sum(tensor.nbytes for tensor in learning.tensors().values()) / WRITE_BYTES_PER_SECOND
    first_step = learning.step
    written = time.monotonic()
    while learning.step < steps:
        started = time.monotonic()
        moved_on = learning.step > first_step  # every slice makes at least one step, else a job might never end
        if moved_on and not budget.allows(2 * step_seconds + 2 * write_seconds):
            job.write(piece, learning.tensors())
            return False
        metrics = learning.advance()
        step_seconds = time.monotonic() - started
        on_progress(Progress(stage, learning.step, steps, metrics))
        if time.monotonic() - written > max(CHECKPOINT_SECONDS, write_seconds / CHECKPOINT_SHARE):
            started = time.monotonic()
            job.write(piece, learning.tensors())
            written = time.monotonic()
            write_seconds = written - started
    return True


def _finish(pipeline: Any, student: nn.Module, settings: QuantizationSettings) -> Any:
    """The pipeline with the student in place of the transformer."""
    shared = equal_embedders(student)
    dtype = str(rest_dtype(pipeline.transformer)).removeprefix("torch.")
    config = VQ4DiTConfig(bits=settings.bits, recipe=settings.recipe, seed=settings.seed, dtype=dtype, shared_embedders=shared)
    attach(student, config)
    quantized = copy.copy(pipeline)  # `type(pipeline)(**components)` would lose the class labels
    quantized.register_modules(transformer=student)
    if labels := getattr(pipeline, "labels", None):  # DiTPipeline reads them from model_index.json but does not write them
        names = {str(index): [name for name, i in labels.items() if i == index] for index in sorted(set(labels.values()))}
        quantized.register_to_config(id2label={index: ", ".join(words) for index, words in names.items()})
    return quantized
