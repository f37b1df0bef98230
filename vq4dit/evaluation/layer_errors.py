"""Where the remaining error is: what each quantized layer, alone, adds to the error of the guided noise.

For inputs x of the original model, quantizing a layer puts its outputs off by δ = (W - Ŵ) x + b - b̂, and the guided prediction
ε̂ by J δ. With v ~ N(0, I), E (v·J δ)² = || J δ ||², and vᵀ J = gᵀ comes from one backward pass for all layers at once. So

    error of a layer = E (Σ_t g_t·δ_t)² / E || ε̂ ||²           (t: all tokens of an image, in all calls of a step)

and to first order this is the `noise_nmse` of a model in which only that layer is quantized (with each step's error relative
to that step). The parts need not add up to the whole: layers are fitted to compensate what those before them got wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vq4dit.denoisers import denoiser_of
from vq4dit.errors import UnsupportedModelError
from vq4dit.layers.linear_maps import is_linear_map, matrix_of, matrix_shape
from vq4dit.layers.packed import PackedLinear
from vq4dit.models.prompts import HELD_OUT
from vq4dit.models.rehearsal import rehearse
from vq4dit.models.trajectories import NO_CALL, GuidedStep, num_trajectories_for
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.progress import OnProgress, Progress, ignore
from vq4dit.randomness import named_generator
from vq4dit.recipes.fisher import Probe, probe_outputs
from vq4dit.surroundings import ordinary_torch, with_gradients

TOKENS_TOGETHER = 2048  # whose activations are held for the backward pass


def check_comparable(original: Any, quantized: Any) -> None:
    """Raise `UnsupportedModelError` unless the original has every quantized layer, in the same shape."""
    for name, layer in packed_layers(denoiser_of(quantized)).items():
        linear = dict(denoiser_of(original).named_modules()).get(name)
        wanted = (layer.out_features, layer.in_features)
        found = matrix_shape(linear) if linear is not None and is_linear_map(linear) else (None, None)
        if found != wanted:
            has = "has none" if linear is None else f"has {found[0]} x {found[1]}"
            raise UnsupportedModelError(
                f"the quantized model has a layer {name} of {wanted[0]} x {wanted[1]}, the original {has}: compare it with the "
                "model it was made from"
            )


@ordinary_torch()
@torch.no_grad()
def layer_noise_errors(
    original: Any,
    quantized: Any,
    *,
    num_trajectories: int = 16,
    num_inference_steps: int = 10,
    call: Mapping[str, Any] = NO_CALL,
    prompts: Sequence[str] = HELD_OUT,
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
    sampling = rehearse(original, call, num_inference_steps, prompts)
    together = min(num_trajectories, num_trajectories_for(sampling, TOKENS_TOGETHER, 1))
    rounds = -(-num_trajectories // together)
    steps = _Steps(num_inference_steps * rounds, on_progress)

    def end_step(step: GuidedStep) -> None:
        added.end_step(step.prediction.numel(), step.num_samples)
        steps.count()

    probe_outputs(
        original,
        list(added.found),
        added.listen,
        named_generator(seed, "held-out trajectories"),
        sampling=sampling,
        num_trajectories=num_trajectories,
        together=together,
        num_inference_steps=num_inference_steps,
        on_step=end_step,
    )
    errors = {name: error / added.samples for name, error in added.found.items()}
    if strange := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise UnsupportedModelError(
            f"what the layer {strange[0]} adds to the error is no finite number: compare without --layers"
        )
    return errors


class _Added:
    """What each layer adds to the squared relative error of the guided prediction, summed over what was heard of it."""

    def __init__(self, original: Any, quantized: Any):
        self.changes = {name: _change(original, name, layer) for name, layer in packed_layers(denoiser_of(quantized)).items()}
        self.found = dict.fromkeys(self.changes, 0.0)
        self.samples = 0  # of all steps
        self._products: dict[str, list[Tensor]] = {}  # g·δ of this step, a number for each row of a batch

    def listen(self, name: str, inputs: Tensor, gradient: Tensor, _: Probe) -> None:
        weight, bias = self.changes[name]
        products = gradient.float() * (inputs.float() @ weight.T + bias)
        self._products.setdefault(name, []).append(products.flatten(1).sum(1))

    def end_step(self, num_values: int, count: int) -> None:
        """Square what all rows of a sample have together: those with its condition and those with none."""
        for name, products in self._products.items():
            of_sample = torch.stack([_by_sample(rows, count) for rows in products]).sum(0)
            self.found[name] += of_sample.square().sum().item() * count / num_values  # rms(ε̂) is divided by already
        self.samples += count
        self._products = {}


def _by_sample(rows: Tensor, count: int) -> Tensor:
    """One number for each of `count` samples: their rows come in turn. Of other numbers of rows only all together is known."""
    if len(rows) % count:
        return torch.cat([rows.sum().unsqueeze(0), rows.new_zeros(count - 1)])
    return rows.view(-1, count).sum(0)


class _Steps:
    """Counts denoising steps, and tells them."""

    def __init__(self, total: int, on_progress: OnProgress):
        self.seen, self.total, self.on_progress = 0, total, on_progress

    def count(self) -> None:
        self.seen += 1
        self.on_progress(Progress("measure", min(self.seen, self.total), self.total))


def _change(original: Any, name: str, layer: PackedLinear) -> tuple[Tensor, Tensor]:
    """W - Ŵ and b - b̂."""
    linear: Any = denoiser_of(original).get_submodule(name)
    weight = matrix_of(linear).float() - layer.reconstruct(torch.float32)
    return weight, linear.bias.float() - layer.bias.float() if layer.bias is not None else weight.new_zeros(())
