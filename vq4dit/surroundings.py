"""What the caller's torch is set to, and must not show in a result: default type, inference mode, training mode.

torch lets a program change what `torch.zeros` makes, whether gradients can be had at all, and what dropout does. What is
computed here (layers to quantize, errors to measure) is the same numbers whatever that is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Numbers are fp32 unless something else is said, and gradients can be made. Also a decorator.

    The default type is one for all threads of a process: it is set only where it is another one.
    """
    default = torch.get_default_dtype()
    if default != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        if default != torch.float32:
            torch.set_default_dtype(default)


def with_gradients(pipeline: Any) -> Any:
    """The same pipeline, with a copy of its transformer if that was made in inference mode: no gradient can pass it."""
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, nn.Module) or not any(p.is_inference() for p in _tensors(transformer)):
        return pipeline
    able = copy.copy(pipeline)  # `type(pipeline)(**components)` would lose the class labels
    able.register_modules(transformer=copy.deepcopy(transformer))
    return able


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: in training mode DiT drops class labels at random. Every module gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
