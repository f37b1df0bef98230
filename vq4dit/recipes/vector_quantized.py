"""The recipes `kmeans` and `paper`: every sub-vector becomes a codeword of its layer's codebook.

`kmeans` takes the nearest codeword. `paper` (VQ4DiT, arXiv:2408.17131) keeps n candidates for each sub-vector and learns on
zero data which of them it takes, and where the codewords lie (`soft_layers.py`, `calibration.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import QuantizationSettings
from vq4dit.denoisers import denoiser_of
from vq4dit.layers.codebook import nearest_codewords, split_subvectors
from vq4dit.layers.linear_maps import LinearMap, matrix_of, matrix_shape, put_layer
from vq4dit.layers.vector import VQLinear
from vq4dit.models.student import student_with
from vq4dit.randomness import named_generator
from vq4dit.recipes.calibration import Calibration
from vq4dit.recipes.kmeans import fit_codebook
from vq4dit.recipes.plan import Plan
from vq4dit.recipes.soft_layers import SoftVQLinear, start_logits
from vq4dit.recipes.stages import Learning, Piece, Stage, Stages, Tensors, Tick


def subvectors_of(linear: LinearMap, dim: int) -> Float[Tensor, "n {dim}"]:
    return split_subvectors(matrix_of(linear).float(), dim)


def kmeans_stages(pipeline: Any, plan: Plan, settings: QuantizationSettings) -> Stages:
    """A codebook for every layer, and the nearest codewords."""
    layers: dict[str, nn.Module] = {}

    def put(name: str, linear: LinearMap, codebook: Tensor, candidates: Tensor) -> None:
        shape, dtype = matrix_shape(linear), linear.weight.dtype
        layers[name] = VQLinear.from_assignments(codebook, candidates[:, 0], shape, linear.bias, dtype=dtype)

    yield clustering(plan.targets, settings, 1, put)
    return student_with(denoiser_of(pipeline), layers)


def paper_stages(pipeline: Any, plan: Plan, settings: QuantizationSettings) -> Stages:
    """A codebook and n candidates for every sub-vector, then zero-data block-wise calibration; the largest ratio wins."""
    config = settings.calibration
    soft: dict[str, SoftVQLinear] = {}

    def put(name: str, linear: LinearMap, codebook: Tensor, candidates: Tensor) -> None:
        subvectors = subvectors_of(linear, settings.subvector_dim)
        logits = start_logits(subvectors, codebook, candidates, config.ratio_start)
        soft[name] = SoftVQLinear(codebook, candidates, logits, matrix_shape(linear), linear.bias)

    yield clustering(plan.targets, settings, config.num_candidates, put)
    student = student_with(denoiser_of(pipeline), soft)
    assert plan.sampling is not None  # `check` makes one for recipes that sample
    generator = named_generator(settings.seed, "zero data")
    calibration = Calibration(pipeline, student, plan.sampling, config, generator)
    yield Learning("calibrate", config.steps, calibration, "calibration")
    for name, layer in soft.items():
        put_layer(student, name, layer.harden(plan.targets[name].weight.dtype))
    return student


def clustering(
    targets: dict[str, LinearMap],
    settings: QuantizationSettings,
    num_candidates: int,
    put: Callable[[str, LinearMap, Tensor, Tensor], None],
) -> Stage:
    """The stage that fits every layer's codebook, and finds each sub-vector's candidates, nearest first.

    Args:
        put: takes a layer's name, the layer, codebook (k, d) and candidates (sub-vectors, num_candidates).
    """

    def cluster(name: str, linear: LinearMap, _: Tick) -> Iterable[tuple[str, Tensors]]:
        subvectors = subvectors_of(linear, settings.subvector_dim)
        codebook = fit_codebook(subvectors, settings.num_codewords, generator=named_generator(settings.seed, name))
        candidates = nearest_codewords(subvectors, codebook, num_candidates)[1]
        return [(f"layers/{name}", {"codebook": codebook, "candidates": candidates})]

    def use(name: str, linear: LinearMap, pieces: Mapping[str, Tensors]) -> None:
        piece = pieces[f"layers/{name}"]
        put(name, linear, piece["codebook"].to(linear.weight.device), piece["candidates"].to(linear.weight.device))

    def pieces() -> Iterator[Piece]:
        for name, linear in targets.items():
            yield Piece(partial(cluster, name, linear), (f"layers/{name}",), partial(use, name, linear))

    return Stage("cluster", len(targets), pieces())
