"""What would be done to a model, and what it would weigh: from its config and safetensors headers, without its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vq4dit.config import CODEBOOKS, Recipe
from vq4dit.denoisers import as_one, full_name, names_in_denoiser, transformers_in
from vq4dit.errors import BROKEN, UnsupportedModelError, VQ4DiTError
from vq4dit.layers.bitstream import packed_size
from vq4dit.layers.codebook import assignment_bits, num_subvectors
from vq4dit.layers.entropy_coded import EntropyCodedLinear
from vq4dit.layers.linear_maps import LinearMap, matrix_shape
from vq4dit.models.blocks import Kept, find_targets, kept_parameters, named_blocks, repeated_embedders
from vq4dit.models.conditions import check_call
from vq4dit.models.positions import Positions, positions_of
from vq4dit.models.trajectories import NO_CALL
from vq4dit.pipelines.inventory import weight_bytes
from vq4dit.pipelines.load import check_pipeline, denoiser_parts
from vq4dit.pipelines.references import read_reference
from vq4dit.pipelines.repository import TensorHeader, Weights, read_json, weights
from vq4dit.pipelines.skeleton import check_tensors, empty_model, empty_pipeline, empty_transformer, model_class
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.quiet import without_remarks

HEADER_BYTES_PER_TENSOR = 70  # of safetensors' JSON, besides the name: type, shape, offsets
NO_TENSORS: Mapping[str, TensorHeader] = {}  # of files that are not known


@dataclass(frozen=True)
class LayerSize:
    """One layer and what its packed tensors weigh."""

    name: str
    rows: int
    columns: int
    assignments_bytes: int  # or those of entropy-coded integers, of which some layers get more and others less
    codebook_bytes: int  # or those of steps and levels
    bias_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.assignments_bytes + self.codebook_bytes + self.bias_bytes


@dataclass(frozen=True)
class SizePrediction:
    """The transformer's file at one width."""

    bits: int
    layers: list[LayerSize]
    kept: list[Kept]
    rest_bytes: int  # all that is not quantized, parameters in 16 bit, shared embedders once, and the header

    @property
    def file_bytes(self) -> int:
        return self.rest_bytes + sum(layer.num_bytes for layer in self.layers)

    @property
    def quantized_weights(self) -> int:
        return sum(layer.rows * layer.columns for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized layers, codebooks and scales included."""
        return 8 * sum(layer.num_bytes - layer.bias_bytes for layer in self.layers) / self.quantized_weights

    def paper_accounting(self) -> dict[str, float]:
        """MiB as VQ4DiT's Table counts: assignments, and codebooks and biases in fp32, against fp32 layers."""
        mib = 2.0**20
        assignments = sum(layer.assignments_bytes for layer in self.layers) / mib
        codebooks = 2 * sum(layer.codebook_bytes for layer in self.layers) / mib
        biases = 2 * sum(layer.bias_bytes for layer in self.layers) / mib
        original = 4 * self.quantized_weights / mib + biases
        total = assignments + codebooks + biases
        return {
            "original_mib": original,
            "assignments_mib": assignments,
            "codebooks_mib": codebooks,
            "biases_mib": biases,
            "total_mib": total,
            "ratio": original / total,
        }


@dataclass(frozen=True)
class Inspection:
    """A model as its headers show it."""

    model: str
    class_name: str
    num_blocks: int
    parameters: int
    num_transformers: int  # together with all these blocks and parameters; a pass is made through one of them
    file_bytes: int  # of the transformer now; 0 if unknown
    predictions: list[SizePrediction]
    kept_parameters: dict[str, int]  # that stay in 16 bit, by what they belong to, most first
    positions: Positions  # of a sample, as large as calibration takes it

    other_bytes: dict[str, int] = field(default_factory=dict)  # of what is not quantized, by parts: copied or referenced

    @property
    def parameters_of_a_pass(self) -> float:
        return self.parameters / self.num_transformers


def predict_size(
    denoiser: nn.Module,
    bits: int,
    keep: Sequence[str] = (),
    recipe: Recipe = "best",
    tensors: Mapping[str, TensorHeader] = NO_TENSORS,
) -> SizePrediction:
    """Bytes of the packed file at a width, assuming that the blocks' embedders are copies of one (DiT's are).

    `best` shares the bits out among the layers as it goes, but takes about as many as the other recipes in all.

    Args:
        tensors: of its files. Buffers that they hold in 16 bit take no more in the packed one.
    """
    num_codewords, dim = CODEBOOKS[bits]
    targets, kept = find_targets(denoiser, dim, num_codewords, keep)
    layers = [layer_size(name, linear, bits, recipe) for name, linear in targets.items()]
    duplicates = repeated_embedders(denoiser)
    whole = tuple(
        f"{part}." for part in transformers_in(denoiser) if part and not any(t.startswith(f"{part}.") for t in targets)
    )
    quantized = {f"{name}.{part}" for name in targets for part in ("weight", "bias")}
    rest = {k: v for k, v in denoiser.state_dict().items() if k not in duplicates and k not in quantized}
    buffers = {name for name, _ in denoiser.named_buffers()}
    as_they_are = {k for k in rest if k in buffers or k.startswith(whole)}  # a transformer of kept layers only is copied
    sizes = (
        _stored_bytes(tensors.get(k), v) if k in as_they_are else v.numel() * min(v.element_size(), 2) for k, v in rest.items()
    )
    return SizePrediction(bits, layers, kept, sum(sizes) + _header_bytes(rest, layers, recipe))


def _stored_bytes(header: TensorHeader | None, tensor: Tensor) -> int:
    """What a tensor takes in its file, or in memory where that is not known."""
    narrow = header is not None and header.dtype in ("F16", "BF16")
    return tensor.numel() * 2 if narrow else tensor.nbytes


def _header_bytes(rest: Iterable[str], layers: Iterable[LayerSize], recipe: Recipe) -> int:
    """What naming all tensors of a packed file takes."""
    parts = EntropyCodedLinear.BYTES if recipe == "best" else ("codebook", "packed_assignments")
    packed = (f"{layer.name}.{part}" for layer in layers for part in parts)
    biases = (f"{layer.name}.bias" for layer in layers if layer.bias_bytes)
    return sum(len(name) + HEADER_BYTES_PER_TENSOR for name in (*rest, *packed, *biases))


def layer_size(name: str, linear: LinearMap, bits: int, recipe: Recipe) -> LayerSize:
    rows, columns = matrix_shape(linear)
    num_codewords, dim = CODEBOOKS[bits]
    assignments, codebook = (
        packed_size(num_subvectors((rows, columns), dim), assignment_bits(num_codewords)),
        2 * num_codewords * dim,
    )
    if recipe == "best":
        side = rows + columns + 8  # about: a step and a level for each, and how they are coded
        assignments, codebook = max(0, assignments + codebook - side), side
    return LayerSize(name, rows, columns, assignments, codebook, 2 * rows if linear.bias is not None else 0)


def promised_bits(linear: LinearMap, bits: int) -> float:
    """What the integers of `best` may take in a layer of this shape; in all layers together, that is."""
    return 8.0 * layer_size("", linear, bits, "best").assignments_bytes


def inspect(
    model: str,
    keep: Sequence[str] = (),
    widths: Sequence[int] = tuple(CODEBOOKS),
    *,
    recipe: Recipe = "best",
    call: Mapping[str, Any] = NO_CALL,
    revision: str | None = None,
    token: str | None = None,
) -> Inspection:
    """Inspect a pipeline folder or Hub repository without reading its weights, and predict its size at some widths.

    Args:
        call: what the pipeline's call will be told: a size, say.
        revision, token: see `loading.read_json`.

    Raises:
        UnsupportedModelError: if it is quantized already, refers to parts of others or has no transformer; VQ4DiTError if it
            cannot be found.
    """
    config = check_pipeline(model, revision, token)
    index = read_json(model, "model_index.json", revision, token)
    if read_reference(index, f"{model}/model_index.json"):  # to what somebody else's login may have fetched
        raise UnsupportedModelError(
            f"{model} has parts that are another repository's, as only quantized models have: start from the original model"
        )
    transformers: dict[str, nn.Module] = {}
    tensors: dict[str, TensorHeader] = {}
    num_bytes = 0
    for part, name in names_in_denoiser(denoiser_parts(index)).items():
        transformers[part], found = _empty_part(model, part, revision, token)
        tensors |= {full_name(name, key): header for key, header in found.tensors.items()}
        num_bytes += found.num_bytes
    denoiser = as_one(transformers)
    targets, _ = find_targets(denoiser, CODEBOOKS[widths[0]][1], CODEBOOKS[widths[0]][0], keep)
    return Inspection(
        model=model,
        class_name=config["_class_name"],
        num_blocks=len(named_blocks(denoiser)),
        parameters=sum(math.prod(p.shape) for p in denoiser.parameters()),
        num_transformers=len(transformers),
        file_bytes=num_bytes,
        kept_parameters=kept_parameters(denoiser, targets),
        predictions=[predict_size(denoiser, bits, keep, recipe, tensors) for bits in widths],
        positions=_positions(model, transformers, index, call, revision, token),
        other_bytes={
            part: size for part, size in weight_bytes(model, index, revision, token).items() if part not in transformers
        },
    )


def _empty_part(model: str, part: str, revision: str | None, token: str | None) -> tuple[nn.Module, Weights]:
    """A transformer without its weights, and what its files hold.

    Raises:
        UnsupportedModelError: if it is quantized already.
    """
    config = read_json(model, f"{part}/config.json", revision, token)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise UnsupportedModelError(f"{model} is quantized already ({method}): start from the original model")
    found = weights(model, part, revision, token)
    transformer = empty_transformer(config, found, f"{model}/{part}/config.json")
    check_tensors(transformer, found.tensors, f"{model}/{part}")
    return transformer, found


def _positions(
    model: str,
    transformers: dict[str, nn.Module],
    index: dict[str, Any],
    call: Mapping[str, Any],
    revision: str | None,
    token: str | None,
) -> Positions:
    """Of a sample of the pipeline; the usual ones if its class makes nothing of its configs: whoever loads it is told why."""
    kind, parts = pipeline_class(index["_class_name"]), dict(transformers)
    if call:
        check_call(kind, call)
    try:
        if vae := model_class(*(index.get("vae") or ("", ""))):
            path = "vae/config.json"
            found = weights(model, "vae", revision, token)
            parts["vae"] = empty_model(vae, read_json(model, path, revision, token), found, f"{model}/{path}")
        with without_remarks():
            return positions_of(empty_pipeline(kind, **parts), call)
    except (VQ4DiTError, *BROKEN):
        return Positions()


def tensor_bytes(model: str, revision: str | None = None, token: str | None = None) -> int:
    """Bytes of the transformers' safetensors, those that are loaded.

    Raises:
        VQ4DiTError: if there are none; FormatError if one is damaged.
    """
    index = read_json(model, "model_index.json", revision, token)
    return sum(weights(model, name, revision, token).num_bytes for name in denoiser_parts(index))
