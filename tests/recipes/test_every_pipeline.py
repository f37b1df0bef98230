"""Any pipeline of prompts that asks its scheduler for steps can be quantized with every recipe: nothing names a family.

Of each, tiny and random, half a dozen layers are quantized and the others kept, so that it takes seconds.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_pipelines import BUILDERS, CALLS, build
from torch import Tensor, nn

from vq4dit import CalibrationConfig, EntropyCodingConfig, QuantizationSettings, quantize
from vq4dit.denoisers import denoiser_of
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.models.blocks import find_targets
from vq4dit.models.trajectories import STEPS
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.recipes.quantize import check

LAYERS = 6
TRAJECTORIES = 4  # side by side: with fewer, `best` shows as many prompts in more rounds, which takes longer
RECIPES = ("kmeans", "paper", "best")
# Of the published pipeline of stable-audio the scheduler is another one, which needs the package torchsde.


class OwnBlock(nn.Module):
    """Takes names only, and answers with a dictionary."""

    def __init__(self, width: int):
        super().__init__()
        self.mix, self.hear, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, *, state: dict[str, Tensor], heard: Tensor) -> dict[str, Tensor]:
        stream = state["stream"]
        stream = stream + self.out(torch.tanh(self.mix(stream) + self.hear(heard)))
        return {"stream": stream, "oldest": state["oldest"]}


class OwnTransformer(ModelMixin, ConfigMixin):
    """Its blocks run in another order than they are declared in, and the last one reads what the first one was given."""

    @register_to_config
    def __init__(self, channels: int = 4, width: int = 64, depth: int = 3):
        super().__init__()
        self.enter, self.clock = nn.Linear(channels, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(OwnBlock(width) for _ in range(depth))
        self.leave = nn.Linear(width, channels)

    def forward(self, noisy: Tensor, heard: Tensor, *, when: Tensor) -> tuple[Tensor]:
        stream = self.enter(noisy) + self.clock(when.view(-1, 1, 1) / 1000)
        state = {"stream": stream, "oldest": stream}
        for layer in reversed(self.layers):
            state = layer(state=state, heard=heard)
        return (self.leave(state["stream"] + state["oldest"]),)


class OwnPipeline(DiffusionPipeline):
    """Guides in two calls with a rescaling of its own."""

    def __init__(self, transformer: OwnTransformer, reader: nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, reader=reader, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: list[str], num_inference_steps: int = 20, generator: Any = None, emphasis: float = 3.0
    ) -> Tensor:
        heard = self.reader(torch.tensor([[len(text) % 8, ord(text[-1]) % 8] for text in prompt])).mean(1, keepdim=True)
        latents = torch.randn(len(prompt), 16, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            when = t.expand(len(prompt))
            (wanted,) = self.transformer(latents, heard, when=when)
            (otherwise,) = self.transformer(latents, torch.zeros_like(heard), when=when)
            guided = otherwise + emphasis * (wanted - otherwise)
            guided = guided * wanted.std() / guided.std()
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents


class Reader(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 64):
        super().__init__()
        self.letters = nn.Embedding(8, width)

    def forward(self, letters: Tensor) -> Tensor:
        return self.letters(letters)


def own_pipeline() -> OwnPipeline:
    torch.manual_seed(0)
    pipeline = OwnPipeline(OwnTransformer(), Reader(), diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Quantized(NamedTuple):
    """What became of a pipeline, and what it was before."""

    pipeline: Any
    before: dict[str, Any]
    by_recipe: dict[str, Any]
    layers: set[str]
    call: dict[str, Any]


def settings(recipe: str, tokens: int = 1, **more: Any) -> QuantizationSettings:
    """The least that a recipe can do; `tokens` are those of one step of the pipeline."""
    shown = TRAJECTORIES * STEPS * tokens
    return QuantizationSettings(
        recipe=recipe,
        calibration=CalibrationConfig(steps=4, num_inference_steps=2, num_trajectories=1),
        entropy_coding=EntropyCodingConfig(tokens=shown, sensitivity_tokens=shown, beam=1, probes=(1,)),
        **more,
    )


def state_of(pipeline: Any) -> dict[str, Any]:
    """All that a quantization could leave behind in a pipeline: tensors as they are, of the rest a description."""
    found: dict[str, Any] = {"attributes": {name: id(value) for name, value in vars(pipeline).items()}}
    found["scheduler"] = {name: _described(value) for name, value in vars(pipeline.scheduler).items()}
    for part, model in pipeline.components.items():
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            found[f"{part}.{name}"] = (type(module), module.training, _hooks(module), "forward" in vars(module))
        for name, p in model.named_parameters() if isinstance(model, nn.Module) else ():
            found[f"{part}.{name}"] = (p.requires_grad, p.grad, p.detach().double().sum().item(), id(p))
    return found


def _hooks(module: nn.Module) -> list[int]:
    """How many of each kind; text encoders of `transformers` get some of their own when they first read a prompt."""
    of_transformers = type(module).__module__.startswith("transformers.")
    return [] if of_transformers else [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]


def _described(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)


@pytest.fixture(scope="module")
def without_remarks() -> Iterator[None]:
    """Prompts are longer than the few tokens that they may have, and diffusers says so each time."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module", params=["own", *BUILDERS])
def quantized(request: pytest.FixtureRequest, without_remarks: None) -> Quantized:
    pipeline = own_pipeline() if request.param == "own" else build(request.param)
    call = CALLS.get(request.param, {})
    targets = list(find_targets(denoiser_of(pipeline), 4, 256)[0])
    layers = set(random.Random(0).sample(targets, LAYERS))
    before = state_of(pipeline)
    few = {"keep": tuple(name for name in targets if name not in layers), "call": call}
    tokens = check(pipeline, settings("best", **few)).sampling.tokens
    by_recipe = {recipe: quantize(pipeline, settings(recipe, tokens, **few)) for recipe in RECIPES}
    return Quantized(pipeline, before, by_recipe, layers, call)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_packs_the_layers_of_every_pipeline(quantized, recipe):
    assert set(packed_layers(denoiser_of(quantized.by_recipe[recipe]))) == quantized.layers


def test_best_errs_less_than_kmeans(quantized):
    errors = {
        recipe: noise_nmse(
            quantized.pipeline, quantized.by_recipe[recipe], num_trajectories=2, num_inference_steps=2, call=quantized.call
        )
        for recipe in ("kmeans", "best")
    }
    assert 0 < errors["best"] < errors["kmeans"] < 1


def test_the_pipeline_stays_as_it_was(quantized):
    assert state_of(quantized.pipeline) == quantized.before
