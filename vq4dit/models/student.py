"""The student: the copy of a transformer that is quantized, while the teacher stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vq4dit.denoisers import transformers_in
from vq4dit.layers.linear_maps import channel_dim
from vq4dit.layers.packed import PackedLinear
from vq4dit.models.blocks import equal_embedders, share_embedders


def student_with(denoiser: nn.Module, layers: Mapping[str, Any]) -> nn.Module:
    """A copy of a denoiser with the given layers in their places, and shared embedders.

    Everything that is not quantized is rounded to 16 bit now: what is measured is what the file will hold. It is frozen;
    only the given layers may learn.
    """
    for name, layer in layers.items():
        layer.channel_dim = channel_dim(denoiser.get_submodule(name))
    student = copy.deepcopy(denoiser, {id(denoiser.get_submodule(name)): layer for name, layer in layers.items()})
    packed = [*layers.values(), *(module for module in student.modules() if isinstance(module, PackedLinear))]
    quantized = {id(p) for layer in packed for p in layer.parameters()}
    for part, transformer in transformers_in(student).items():
        share_embedders(transformer, equal_embedders(transformer))
        dtype = rest_dtype(denoiser.get_submodule(part))
        for p in transformer.parameters():
            if id(p) not in quantized and p.is_floating_point():
                p.requires_grad_(False)
                p.data = p.data.to(dtype).to(p.dtype)
    return student.eval()


def rest_dtype(transformer: nn.Module) -> torch.dtype:
    """The 16-bit type of what is not quantized: fp16, unless the model is bf16 or has values fp16 cannot hold."""
    parameters = [p for p in transformer.parameters() if p.is_floating_point()]
    if any(p.dtype == torch.bfloat16 for p in parameters):
        return torch.bfloat16
    too_large = any(float(p.detach().abs().max()) > torch.finfo(torch.float16).max for p in parameters if p.numel())
    return torch.bfloat16 if too_large else torch.float16
