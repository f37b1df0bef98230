"""What would be done to a model, and what it would weigh: from its config and safetensors headers, without its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vq4dit.config import CODEBOOKS, Recipe
from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.bitstream import packed_size
from vq4dit.layers.codebook import assignment_bits
from vq4dit.models.blocks import Kept, block_embedders, duplicate_keys, find_targets, named_blocks
from vq4dit.pipelines.load import check_pipeline, other_transformers
from vq4dit.pipelines.repository import read_json, weights
from vq4dit.pipelines.skeleton import check_tensors, empty_transformer

HEADER_BYTES_PER_TENSOR = 110  # of safetensors' JSON: name, type, shape, offsets


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
    rest_bytes: int  # all that is not quantized, in 16 bit, shared embedders once, and the header

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
    file_bytes: int  # of the transformer now; 0 if unknown
    predictions: list[SizePrediction]
    tokens: int  # positions of one image in the transformer
    width: int  # pixels of an image, about


def predict_size(transformer: nn.Module, bits: int, keep: Sequence[str] = (), recipe: Recipe = "best") -> SizePrediction:
    """Bytes of the packed file at a width, assuming that the blocks' embedders are copies of one (DiT's are).

    `best` shares the bits out among the layers as it goes, but takes about as many as the other recipes in all.
    """
    num_codewords, dim = CODEBOOKS[bits]
    targets, kept = find_targets(transformer, dim, num_codewords, keep)
    layers = [layer_size(name, linear, bits, recipe) for name, linear in targets.items()]
    duplicates = duplicate_keys(transformer, block_embedders(transformer))
    quantized = {f"{name}.{part}" for name in targets for part in ("weight", "bias")}
    rest = {k: v for k, v in transformer.state_dict().items() if k not in duplicates and k not in quantized}
    num_tensors = len(rest) + sum(2 + (layer.bias_bytes > 0) for layer in layers)
    sizes = (tensor.numel() * min(tensor.element_size(), 2) for tensor in rest.values())
    return SizePrediction(bits, layers, kept, sum(sizes) + HEADER_BYTES_PER_TENSOR * num_tensors)


def layer_size(name: str, linear: nn.Linear, bits: int, recipe: Recipe) -> LayerSize:
    rows, columns = linear.out_features, linear.in_features
    num_codewords, dim = CODEBOOKS[bits]
    assignments, codebook = packed_size(rows * columns // dim, assignment_bits(num_codewords)), 2 * num_codewords * dim
    if recipe == "best":
        side = rows + columns + 8  # about: a step and a level for each, and how they are coded
        assignments, codebook = max(0, assignments + codebook - side), side
    return LayerSize(name, rows, columns, assignments, codebook, 2 * rows if linear.bias is not None else 0)


def promised_bits(linear: nn.Linear, bits: int) -> float:
    """What the integers of `best` may take in a layer of this shape; in all layers together, that is."""
    return 8.0 * layer_size("", linear, bits, "best").assignments_bytes


def inspect(
    model: str,
    keep: Sequence[str] = (),
    widths: Sequence[int] = tuple(CODEBOOKS),
    *,
    recipe: Recipe = "best",
    revision: str | None = None,
    token: str | None = None,
) -> Inspection:
    """Inspect a pipeline folder or Hub repository without reading its weights, and predict its size at some widths.

    Args:
        revision, token: see `loading.read_json`.

    Raises:
        UnsupportedModelError: if it is quantized already or has no transformer; VQ4DiTError if it cannot be found.
    """
    config = check_pipeline(model, revision, token)
    check_one_transformer(read_json(model, "model_index.json", revision, token), model)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise UnsupportedModelError(f"{model} is quantized already ({method}): start from the original model")
    found = weights(model, "transformer", revision, token)
    transformer = empty_transformer(config, found, f"{model}/transformer/config.json")
    check_tensors(transformer, found.tensors, f"{model}/transformer")
    pixels, patch = _largest(config.get("sample_size"), 32), _largest(config.get("patch_size"), 1)
    return Inspection(
        model=model,
        class_name=config["_class_name"],
        num_blocks=len(named_blocks(transformer)),
        parameters=sum(math.prod(p.shape) for p in transformer.parameters()),
        file_bytes=found.num_bytes,
        predictions=[predict_size(transformer, bits, keep, recipe) for bits in widths],
        tokens=max(1, (pixels // patch) ** 2),
        width=8 * pixels,
    )


def _largest(length: Any, otherwise: int) -> int:
    """A length that a config gives as a number, or as one for each dimension, or not at all."""
    given = length if isinstance(length, list) else [length]
    return max((int(number) for number in given if isinstance(number, int | float) and number >= 1), default=otherwise)


def check_one_transformer(index: dict[str, Any], model: str) -> None:
    """Raise `UnsupportedModelError` if a pipeline has a second transformer, which would stay as large as it is."""
    if others := other_transformers(index):
        raise UnsupportedModelError(
            f"{model} has more than one transformer, and only the first would be quantized: {', '.join(others)} would stay as "
            "large as it is. Two-stage models are not supported yet: pick one with a single transformer"
        )


def tensor_bytes(model: str, revision: str | None = None, token: str | None = None) -> int:
    """Bytes of the transformer's safetensors, those that are loaded.

    Raises:
        VQ4DiTError: if there are none; FormatError if one is damaged.
    """
    return weights(model, "transformer", revision, token).num_bytes
