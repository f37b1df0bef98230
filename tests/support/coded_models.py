"""Layers of both kinds, and models that have both kinds of packed layers, made without quantizing anything."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import reference_decoder as reference
import torch
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.config import VQ4DiTConfig
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear
from vq4dit.layers.scale_classes import Sides
from vq4dit.layers.vector import VQLinear
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.quantizer import attach


def separable_integers(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded Gaussians whose standard deviation is a product of one of the row and one of the column, and that product."""
    row = torch.exp2(torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 4 - 2)
    column = torch.exp2(torch.rand(columns, generator=generator, dtype=torch.float64) * 6 - 4)
    spread = row * column
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread).round().short(), spread


def with_levels(row: torch.Tensor, column: torch.Tensor) -> Sides:
    """Sides of these levels, and of steps that differ."""
    return Sides(*(side for level in (row, column) for side in ((120 + torch.arange(len(level)) % 17).to(torch.uint8), level)))


def damages(word: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What may befall bytes that are words of so many."""
    return {
        "end": lambda content: content[:-word],
        "start": lambda content: content[word:],
        "half": lambda content: content[: len(content) // (2 * word) * word],
        "all": lambda content: content[:0],
        "most": lambda content: content[:20],
        "a byte": lambda content: content[:-1],
        "more": lambda content: torch.cat([content, content[-word:]]),
        "more before": lambda content: torch.cat([content[:word], content]),
        "zeros behind": lambda content: torch.cat([content, torch.zeros(word, dtype=torch.uint8)]),
        "zeros": torch.zeros_like,
        "ones": lambda content: torch.full_like(content, 255),
        "backwards": lambda content: content.flip(0),
    }


def new_coded(
    rows: int, columns: int, generator: torch.Generator, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> EntropyCodedLinear:
    integers, _ = separable_integers(rows, columns, generator)
    row_scale, column_scale = (torch.rand(n, generator=generator) / 8 + 0.01 for n in (rows, columns))
    values = torch.randn(rows, generator=generator) if bias else None
    return EntropyCodedLinear.from_integers(integers, row_scale, column_scale, values, dtype)


def single_stream(layer: EntropyCodedLinear) -> dict[str, torch.Tensor]:
    """The packed tensors of the same layer in format version 3."""
    integers, sides, _ = layer.unpack()
    models = [[128, 44], [16, 40], [128, 44], [16, 40]]
    content = reference.encode_integers(integers.numpy(), [side.numpy() for side in sides], models)
    stream = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    return {"coded_integers": stream, "side_models": torch.tensor(models, dtype=torch.uint8)}


def new_single_stream(rows: int, columns: int, generator: torch.Generator) -> SingleStreamLinear:
    """As format versions 3 and 4 have it."""
    layer = new_coded(rows, columns, generator)
    return SingleStreamLinear.from_tensors(single_stream(layer) | {"bias": layer.bias.data}, (rows, columns))


def new_vector_quantized(rows: int, columns: int, generator: torch.Generator) -> VQLinear:
    codebook, assignments = (
        torch.randn(16, 2, generator=generator),
        torch.randint(16, (rows * columns // 2,), generator=generator),
    )
    return VQLinear.from_assignments(codebook, assignments, (rows, columns), torch.randn(rows, generator=generator))


KINDS = {"vector-quantized": new_vector_quantized, "coded": new_coded, "single stream": new_single_stream}


def new_mixed_pipeline():
    """The tiny pipeline; two of three packed layers are of coded integers, the others vector-quantized."""
    quantized = vq4dit.quantize(new_pipeline(), quick_settings(recipe="kmeans"))
    transformer, generator = quantized.transformer, torch.Generator().manual_seed(3)
    for index, (name, layer) in enumerate(packed_layers(transformer).items()):
        if index % 3:
            transformer.set_submodule(name, new_coded(layer.out_features, layer.in_features, generator))
    shared = transformer.config.quantization_config.shared_embedders
    attach(transformer, VQ4DiTConfig(format_version=5, shared_embedders=shared))
    return quantized


def save_mixed(folder: Path) -> Path:
    vq4dit.save(new_mixed_pipeline(), folder)
    return folder


def output_error(weight: torch.Tensor, quantized: torch.Tensor, second_moments: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ): the squared error of a layer's outputs over their power."""
    error = weight - quantized
    return (((error @ second_moments) * error).sum() / ((weight @ second_moments) * weight).sum()).item()
