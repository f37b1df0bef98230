"""Where the remaining error is: what each quantized layer, alone, adds to the error of the guided noise.

For inputs x of the original model, quantizing a layer puts its outputs off by δ = (W - Ŵ) x + b - b̂, and the guided noise ε̂ by
J δ. With v ~ N(0, I), E (v·J δ)² = || J δ ||², and vᵀ J = gᵀ comes from one backward pass for all layers at once. So

    error of a layer = E (Σ_t g_t·δ_t)² / E || ε̂ ||²           (t: all tokens of an image, with its class and with none)

and to first order this is the `noise_nmse` of a model in which only that layer is quantized (with each step's error relative
to that step). The parts need not add up to the whole: layers are fitted to make good what those before them got wrong.
"""

from __future__ import annotations

import math

import torch
from diffusers import DiTPipeline
from torch import Tensor

from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.packed import PackedLinear
from vq4dit.models.zero_data import num_trajectories_for
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.randomness import named_generator
from vq4dit.recipes.fisher import Probe, probe_outputs
from vq4dit.surroundings import ordinary_torch, with_gradients

TOKENS_TOGETHER = 2048  # whose activations are held for the backward pass


def check_comparable(original: DiTPipeline, quantized: DiTPipeline) -> None:
    """Raise `UnsupportedModelError` unless the original has every quantized layer, in the same shape."""
    for name, layer in packed_layers(quantized.transformer).items():
        linear = dict(original.transformer.named_modules()).get(name)
        wanted = (layer.out_features, layer.in_features)
        found = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if found != wanted:
            has = "has none" if linear is None else f"has {found[0]} x {found[1]}"
            raise UnsupportedModelError(
                f"the quantized model has a layer {name} of {wanted[0]} x {wanted[1]}, the original {has}: compare it with the "
                "model it was made from"
            )


@ordinary_torch()
@torch.no_grad()
def layer_noise_errors(
    original: DiTPipeline,
    quantized: DiTPipeline,
    *,
    num_trajectories: int = 16,
    num_inference_steps: int = 10,
    guidance_scale: float = 4.0,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> dict[str, float]:
    """The error of every quantized layer by name, in order of execution, on held-out zero-data trajectories.

    An estimate: by default a figure's relative standard deviation is 0.1 to 0.4. Of large models a few trajectories are walked
    at a time (`num_trajectories` in all), and it takes about twice as long as `noise_nmse` with the same numbers.
    """
    check_comparable(original, quantized)
    original = with_gradients(original)
    added = _Added(original, quantized)
    if not added.found:
        return added.found
    together = min(num_trajectories, num_trajectories_for(original, TOKENS_TOGETHER, 1))
    walks = -(-num_trajectories // together)
    steps = _Steps(num_inference_steps * walks, on_progress)
    probe_outputs(
        original,
        list(added.found),
        added.listen,
        named_generator(seed, "held-out trajectories"),
        num_trajectories=num_trajectories,
        together=together,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        compared_scales=[guidance_scale],
        on_step=steps.count,
    )
    images = num_trajectories * steps.seen / walks  # as many of each step
    errors = {name: error / images for name, error in added.found.items()}
    if strange := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise UnsupportedModelError(
            f"what the layer {strange[0]} adds to the error is no finite number: compare without --layers"
        )
    return errors


class _Added:
    """What each layer adds to the squared error of the guided noise, summed over what was heard of it."""

    def __init__(self, original: DiTPipeline, quantized: DiTPipeline):
        self.changes = {name: _change(original, name, layer) for name, layer in packed_layers(quantized.transformer).items()}
        self.found = dict.fromkeys(self.changes, 0.0)
        config = original.transformer.config
        self.values = config.in_channels * config.sample_size**2  # rms(ε̂) is divided by already

    def listen(self, name: str, inputs: Tensor, gradient: Tensor, _: Probe) -> None:
        weight, bias = self.changes[name]
        products = (gradient.float() * (inputs.float() @ weight.T + bias)).flatten(1).sum(1)
        with_class, without = products.chunk(2)
        self.found[name] += (with_class + without).square().sum().item() / self.values


class _Steps:
    """Counts denoising steps, and tells them."""

    def __init__(self, total: int, on_progress: OnProgress):
        self.seen, self.total, self.on_progress = 0, total, on_progress

    def count(self) -> None:
        self.seen += 1
        self.on_progress(Progress("measure", min(self.seen, self.total), self.total))


def _change(original: DiTPipeline, name: str, layer: PackedLinear) -> tuple[Tensor, Tensor]:
    """W - Ŵ and b - b̂."""
    linear = original.transformer.get_submodule(name)
    weight = linear.weight.float() - layer.reconstruct(torch.float32)
    return weight, linear.bias.float() - layer.bias.float() if layer.bias is not None else weight.new_zeros(())
