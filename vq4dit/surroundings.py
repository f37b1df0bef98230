"""What the caller's torch is set to, and must not show in a result: default type and device, autocast, training mode and more.

torch lets a program change what `torch.zeros` makes, in which type a product is computed, how exactly, and by which kernel,
whether gradients can be had at all, and what dropout does. What is computed here (layers to quantize, errors to measure,
pictures to compare) is the same numbers whatever that is. Who asks for deterministic algorithms keeps them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.backends import cuda

from vq4dit.denoisers import denoisers_of

# One for all threads of a process: how to read it, how to set it, and what it is ordinarily.
OF_THE_PROCESS: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = [
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),  # these choose kernels on the CPU as well
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
]
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Numbers are fp32 on the CPU and computed so unless something else is said, and gradients can be made. Also a decorator.

    What is one for all threads of a process is set only where it is another one.
    """
    found = [(get(), put, ordinary) for get, put, ordinary in OF_THE_PROCESS]
    changed = [(value, put, ordinary) for value, put, ordinary in found if value != ordinary]
    for _, put, ordinary in changed:
        put(ordinary)
    try:
        with torch.inference_mode(False), ExitStack() as of_this_thread:
            for kind in AUTOCAST:
                if torch.is_autocast_enabled(kind):
                    of_this_thread.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                of_this_thread.enter_context(torch.device("cpu"))
            yield
    finally:
        for value, put, _ in changed:
            put(value)


def with_gradients(pipeline: Any) -> Any:
    """The same pipeline, with copies of transformers that were made in inference mode: no gradient can pass those."""
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        return pipeline
    unable = {name: part for name, part in denoisers_of(pipeline).items() if any(p.is_inference() for p in _tensors(part))}
    if not unable:
        return pipeline
    able = copy.copy(pipeline)  # `type(pipeline)(**components)` would lose the class labels
    able.register_modules(**{name: copy.deepcopy(part) for name, part in unable.items()})
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


@contextmanager
def without_parameter_gradients(*models: nn.Module) -> Iterator[None]:
    """For a while no parameter takes a gradient; afterwards those do that did."""
    asked = [p for model in models for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            with torch.inference_mode(p.is_inference()):
                p.requires_grad_(True)
