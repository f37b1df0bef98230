"""Zero data: the teacher's own sampling trajectories.

No images are needed to calibrate a diffusion model: it makes its inputs itself. Latents start as Gaussian noise, classes
are drawn at random, and the *full-precision* model walks them down with the pipeline's own scheduler and guidance, exactly
as sampling does. Teacher and student both see those latents, so the student's errors do not add up along the way
(section 3.3 of VQ4DiT). Steps come one at a time; memory does not depend on their number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiTPipeline
from jaxtyping import Float, Integer
from torch import Tensor, nn

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.blocks import named_blocks, recorded_outputs
from vq4dit.surroundings import evaluating

NULL_CLASS = 1000  # DiTPipeline hard-codes it
STEPS = 10  # denoising steps of a walk that `best` takes statistics of
ROUNDS = 2  # of walks that share the steps where statistics are taken: the next step of a trajectory tells little that is new
LARGE = 10**8  # weights from which on a pass of the model is long, and activations fill the memory


class TeacherStep(NamedTuple):
    """One denoising step of b trajectories with guidance: rows 0 ... b-1 conditional, b ... 2b-1 unconditional."""

    latents: Float[Tensor, "twice_b c h w"]
    timesteps: Integer[Tensor, " twice_b"]
    class_labels: Integer[Tensor, " twice_b"]
    block_outputs: list[Tensor]  # what each of the teacher's blocks returned
    prediction: Float[Tensor, "twice_b out h w"]  # the teacher's output, before guidance
    guided: Float[Tensor, "b c h w"]  # what the scheduler was given
    number: int  # of the walk's steps, from 0
    weight: float  # what an error of its noise does to the image, see `image_weights`


def new_scheduler(pipeline: DiTPipeline) -> Any:
    """A scheduler of the pipeline's kind and settings, with a state of its own."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


def num_classes(pipeline: DiTPipeline) -> int:
    """Classes that have a label, or all the embedder knows but the null class."""
    if pipeline.labels:
        return max(pipeline.labels.values()) + 1
    return pipeline.transformer.config.num_embeds_ada_norm


def null_class(pipeline: DiTPipeline) -> int:
    """The label that stands for no class: behind all that the embedder knows, of which `DiTPipeline` expects a thousand."""
    return min(NULL_CLASS, pipeline.transformer.config.num_embeds_ada_norm)


def image_tokens(pipeline: DiTPipeline) -> int:
    """Positions that one image has in the transformer."""
    config = pipeline.transformer.config
    return (config.sample_size // config.patch_size) ** 2


def num_trajectories_for(pipeline: DiTPipeline, tokens: int, num_inference_steps: int) -> int:
    """How many guided trajectories show about that many tokens in all their steps together."""
    return max(1, round(tokens / (2 * num_inference_steps * image_tokens(pipeline))))


def is_large(transformer: nn.Module) -> bool:
    """Whether the model has `LARGE` weights or more."""
    return sum(p.numel() for p in transformer.parameters()) >= LARGE


def guide(prediction: Float[Tensor, "twice_b out h w"], guidance_scale: float, channels: int) -> Float[Tensor, "b c h w"]:
    """Classifier-free guidance ε̂ = ε_∅ + s (ε_y - ε_∅) on the latent channels (a learned variance is left out).

    Up to s = 1 it is ε_y, as in `DiTPipeline`.
    """
    conditional, unconditional = prediction[:, :channels].chunk(2)
    if guidance_scale <= 1:
        return conditional
    return unconditional + guidance_scale * (conditional - unconditional)


def predicted_noise(prediction: Tensor, sample: Tensor, timestep: Tensor, scheduler: Any) -> Tensor:
    """What a guided prediction says about the noise, for every prediction type of DDPM-like schedulers.

    With x_t = sqrt(ᾱ) x₀ + sqrt(1-ᾱ) ε:  ε itself; ε = sqrt(ᾱ) v + sqrt(1-ᾱ) x_t;  ε = (x_t - sqrt(ᾱ) x₀) / sqrt(1-ᾱ).
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return prediction
    alpha = scheduler.alphas_cumprod.to(sample.device)[timestep.long()].view(-1, 1, 1, 1)
    if kind == "v_prediction":
        return alpha.sqrt() * prediction + (1 - alpha).sqrt() * sample
    if kind == "sample":
        return (sample - alpha.sqrt() * prediction) / (1 - alpha).sqrt()
    raise UnsupportedModelError(f"the scheduler predicts {kind!r}; noise can be compared for epsilon, v_prediction and sample")


def image_weights(scheduler: Any) -> list[float]:
    """What an error of the noise in each of a scheduler's steps does to the image; 1 on average.

    With σ = sqrt((1-ᾱ)/ᾱ), DDIM moves x_t/sqrt(ᾱ) by Δσ ε̂ (Song et al., arXiv:2010.02502, eq. 14), so an error e of ε̂ enters as
    Δσ e. Later steps take most of it back where the noise is large: of latents with unit variance 1/sqrt(1 + σ²) stays. Their
    product is Δ asinh(σ). Errors of neighbouring steps are alike and add up, and by Cauchy and Schwarz

        (Σ Δ e)² <= (Σ Δ) (Σ Δ e²)

    so squares count by Δ asinh(σ), much the same for all steps but the last: a step weighs what the two would into which it
    could be split.
    """
    alphas = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.cpu().long()].clamp(min=2**-24)  # some begin with 0
    position = torch.cat([((1 - alphas) / alphas).sqrt().asinh(), torch.zeros(1, dtype=torch.float64)])
    weights = (position[:-1] - position[1:]).abs()  # some schedules go back for a moment
    return (weights / weights.mean()).tolist()


def teacher_steps(
    pipeline: DiTPipeline,
    generator: torch.Generator,
    *,
    num_trajectories: int,
    guidance_scale: float,
    num_inference_steps: int,
    replayed: Sequence[Tensor] = (),
    shown: slice = slice(None),
) -> Generator[TeacherStep, None, None]:
    """Walk `num_trajectories` random trajectories side by side, once, as `DiTPipeline.__call__` walks them.

    Yields `num_inference_steps` steps (more for schedulers that evaluate twice). The generator draws labels and noise on
    its own device, so the walk does not depend on the model's.

    Args:
        replayed: guided predictions of the first steps of the same walk, made earlier; those steps are gone through without
            the teacher, and not yielded.
        shown: which of the steps are yielded.
    """
    teacher = pipeline.transformer
    config = teacher.config
    labels = torch.randint(num_classes(pipeline), (num_trajectories,), generator=generator)
    shape = (num_trajectories, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator).to(teacher.device, teacher.dtype)
    null = torch.full_like(labels, null_class(pipeline))
    class_labels = torch.cat([labels, null]).to(teacher.device)
    scheduler = new_scheduler(pipeline)
    scheduler.set_timesteps(num_inference_steps)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    with recorded_outputs(list(named_blocks(teacher).values())) as block_outputs:
        for guided, t in zip(replayed, scheduler.timesteps, strict=False):
            latents = scheduler.step(guided, t, latents, **extra).prev_sample
        steps = list(enumerate(zip(scheduler.timesteps, image_weights(scheduler), strict=True)))
        for number, (t, weight) in steps[len(replayed) :]:
            with torch.no_grad(), evaluating(teacher):  # never around a yield: the listener may want gradients
                model_input = scheduler.scale_model_input(torch.cat([latents, latents]), t)
                timesteps = t.to(teacher.device).expand(len(model_input))
                prediction = teacher(model_input, timestep=timesteps, class_labels=class_labels).sample
                guided = guide(prediction, guidance_scale, config.in_channels)
                latents = scheduler.step(guided, t, latents, **extra).prev_sample
            if number in range(len(steps))[shown]:
                outputs = list(block_outputs)
                yield TeacherStep(model_input, timesteps, class_labels, outputs, prediction, guided, number, weight)


class BlockCall(NamedTuple):
    """How a transformer calls its blocks at one step of a walk."""

    hidden: Float[Tensor, "rows tokens width"]  # as it enters the first block
    arguments: dict[str, Any]  # the others, the same for all blocks
    num_classes: int

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of the hidden states."""
        return block(hidden, **self.arguments)

    def of_every_class(self) -> BlockCall:
        """The same step with one token, once for every class and as often for none."""
        classes = torch.arange(self.num_classes, device=self.hidden.device)
        labels = torch.cat([classes, self.arguments["class_labels"][-1:].expand(len(classes))])
        arguments = {**self.arguments, "class_labels": labels, "timestep": self.arguments["timestep"][:1].expand(len(labels))}
        return BlockCall(self.hidden[:1, :1].expand(len(labels), 1, -1), arguments, self.num_classes)


def record_block_calls(
    pipeline: DiTPipeline,
    generator: torch.Generator,
    *,
    num_trajectories: int,
    guidance_scale: float,
    num_inference_steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[BlockCall]:
    """What enters the teacher's first block at every step, those steps of `ROUNDS` walks in turn."""
    calls: dict[int, BlockCall] = {}
    first = next(iter(named_blocks(pipeline.transformer).values()))
    entered: list[BlockCall] = []

    def record(block: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        entered[:] = [BlockCall(positional[0], named, num_classes(pipeline))]

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for round_number in range(ROUNDS):
            for step in teacher_steps(
                pipeline,
                generator,
                num_trajectories=num_trajectories,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                shown=slice(round_number, None, ROUNDS),
            ):
                calls[step.number] = entered[0]
                on_step()
    finally:
        handle.remove()
    return [calls[number] for number in sorted(calls)]
