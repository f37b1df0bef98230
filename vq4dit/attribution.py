"""Where the remaining error is: what each quantized layer, alone, adds to the error of the guided noise.

For inputs x of the original model, quantizing a layer puts its outputs off by δ = (W - Ŵ) x + b - b̂, and the guided noise ε̂ by
J δ. With v ~ N(0, I), E (v·J δ)² = || J δ ||², and vᵀ J = gᵀ comes from one backward pass for all layers at once. So

    error of a layer = E (Σ_t g_t·δ_t)² / E || ε̂ ||²           (t: all tokens of an image, with its class and with none)

and to first order this is the `noise_nmse` of a model in which only that layer is quantized (with each step's error relative
to that step). The parts need not add up to the whole: layers are fitted to make good what those before them got wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiTPipeline
from torch import Tensor

from vq4dit.diffusers_quantizer import vq_layers
from vq4dit.quantization import layer_generator
from vq4dit.sensitivity import probe_outputs


@torch.no_grad()
def layer_noise_errors(
    original: DiTPipeline,
    quantized: DiTPipeline,
    *,
    num_trajectories: int = 16,
    num_inference_steps: int = 10,
    guidance_scale: float = 4.0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The error of every quantized layer by name, in order of execution, on held-out zero-data trajectories.

    An estimate: with 160 images (16 trajectories of ten steps) each figure is good to about a tenth.
    """
    layers = vq_layers(quantized.transformer)
    config = original.transformer.config
    values = config.in_channels * config.sample_size**2
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        linear = original.transformer.get_submodule(name)
        bias = linear.bias.float() - layer.bias.float() if layer.bias is not None else torch.zeros(())
        changes[name] = linear.weight.float() - layer.reconstruct(torch.float32), bias.to(linear.weight.device)
    found = dict.fromkeys(layers, 0.0)
    if not found:
        return found

    def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
        weight, bias = changes[name]
        products = (gradient.float() * (inputs.float() @ weight.T + bias)).flatten(1).sum(1)
        with_class, without = products.chunk(2)
        relative = (with_class + without).square().mean() / values  # rms(ε̂) is divided by already
        found[name] += relative.item() / num_inference_steps

    probe_outputs(
        original,
        list(layers),
        add,
        layer_generator(seed, "held-out trajectories"),
        num_trajectories=num_trajectories,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        compared_scales=[guidance_scale],
        on_step=on_step,
    )
    return found
