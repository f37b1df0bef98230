"""Tuning: the integers stay, everything else learns.

After every layer has its integers, the transformer is still full of numbers that can move at no cost in bytes:
biases, and all that stays in 16 bit (embedders, final layer). They are tuned together on the
teacher's own trajectories, steps in random order, so that

    L = Σ_s E w_t || ε̂_s(teacher) - ε̂_s(student) ||² / E || ε̂_s(teacher) ||²

falls, where ε̂_s is the noise under guidance of scale s: s = 1 is the plain prediction, s = 4 counts what distinguishes a
class from none. w_t is what the noise of a step does to the image (`zero_data.image_weights`). Adam with a cosine schedule;
what is learned is what the hard layers will hold, nothing is soft here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiTPipeline
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.config import CalibrationConfig
from vq4dit.errors import CalibrationDivergedError
from vq4dit.optimizer_state import restore_state, start_state, state_tensors
from vq4dit.zero_data import (
    GUIDANCE_SCALES,
    NULL_CLASS,
    guide,
    image_tokens,
    is_large,
    new_scheduler,
    predicted_noise,
    teacher_steps,
)

WALK_STEPS = 10  # few, so that the same number of samples shows more classes and latents: 25 gave errors a tenth higher
WALK_BYTES = 512 * 2**20
BETAS = (0.9, 0.95)


def walks(pipeline: DiTPipeline, config: CalibrationConfig) -> dict[int, int]:
    """How the trajectories that tuning needs are walked: {number of the first: how many side by side}.

    A step holds what every block returned, (2n, tokens, width) fp32 each; n is such that they stay below `WALK_BYTES`.
    """
    c = pipeline.transformer.config
    width = c.num_attention_heads * c.attention_head_dim
    together = max(1, WALK_BYTES // (2 * 4 * image_tokens(pipeline) * width * c.num_layers))
    needed = math.ceil(config.tuning_steps * config.tuning_batch / WALK_STEPS)
    return {first: min(together, needed - first) for first in range(0, needed, together)}


def record_samples(
    pipeline: DiTPipeline,
    num_trajectories: int,
    guidance_scale: float,
    generator: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The steps of one walk of the teacher, n = `num_trajectories` x `WALK_STEPS`; calls `on_step` after each of them.

    Returns:
        `latents` (n, c, h, w), `timesteps` (n,), `weights` (n,), `class_labels` (n,), and the teacher's predictions on the
        latent channels: `conditional` and `unconditional` (n, c, h, w).
    """
    channels = pipeline.transformer.config.in_channels
    parts: dict[str, list[Tensor]] = {}
    for step in teacher_steps(
        pipeline,
        generator,
        num_trajectories=num_trajectories,
        guidance_scale=guidance_scale,
        num_inference_steps=WALK_STEPS,
    ):
        half = len(step.latents) // 2
        conditional, unconditional = step.prediction[:, :channels].chunk(2)
        values = {
            "latents": step.latents[:half],
            "timesteps": step.timesteps[:half],
            "weights": torch.full((half,), step.weight, device=step.latents.device),
            "class_labels": step.class_labels[:half],
            "conditional": conditional,
            "unconditional": unconditional,
        }
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
        on_step()
    joined = {name: torch.cat(values) for name, values in parts.items()}
    return {name: values.float() if values.is_floating_point() else values for name, values in joined.items()}


class Tuning:
    """The state of tuning between two updates; `advance` makes one, `tensors` and `restore` carry it over."""

    def __init__(
        self,
        pipeline: DiTPipeline,
        student: Any,
        samples: dict[str, Tensor],
        config: CalibrationConfig,
        generator: torch.Generator,
    ):
        self.student, self.samples, self.config = student, samples, config
        self.scheduler = new_scheduler(pipeline)
        self.channels = pipeline.transformer.config.in_channels
        self.order = torch.randperm(len(samples["latents"]), generator=generator)
        self.step = 0
        if is_large(pipeline.transformer):
            student.enable_gradient_checkpointing()  # a third more time, far less memory, the same bytes
        learned = [p for p in student.parameters() if p.is_floating_point()]  # packed tensors are bytes
        for p in learned:  # in fp32: squares of small gradients would vanish in 16 bit
            p.data = p.data.float()
            p.requires_grad_(True)
        self.optimizer = torch.optim.Adam(learned, lr=self._rate(), betas=BETAS)
        start_state(self.optimizer, "exp_avg", "exp_avg_sq")

    def advance(self) -> dict[str, float]:
        """One update; the loss before it.

        Raises:
            CalibrationDivergedError: if the loss is not finite.
        """
        start = self.step * self.config.tuning_batch
        chosen = self.order[torch.arange(start, start + self.config.tuning_batch) % len(self.order)]
        batch = {name: values[chosen] for name, values in self.samples.items()}
        errors = self._errors(batch)
        loss = (errors * batch["weights"].unsqueeze(1)).mean(0).sum()
        loss.backward()
        noise_nmse = errors.detach().mean().item()
        if not math.isfinite(noise_nmse):
            raise CalibrationDivergedError(
                f"the loss became {noise_nmse} in step {self.step}: try another seed, and check that the original model gives "
                "sensible images"
            )
        self.optimizer.param_groups[0]["lr"] = self._rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"noise_nmse": noise_nmse}

    def _rate(self) -> float:
        return self.config.tuning_learning_rate * (1 + math.cos(math.pi * self.step / self.config.tuning_steps)) / 2

    def _errors(self, batch: dict[str, Tensor]) -> Float[Tensor, "b scales"]:
        """Squared errors of the noises of each sample, over the mean power of the teacher's in this batch."""
        latents, timesteps, labels = batch["latents"], batch["timesteps"], batch["class_labels"]
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        found = self.student(torch.cat([latents, latents]), timestep=timesteps.repeat(2), class_labels=both).sample
        wanted = torch.cat([batch["conditional"], batch["unconditional"]])
        errors = []
        for scale in GUIDANCE_SCALES:
            noises = (
                predicted_noise(guide(p, scale, self.channels), latents, timesteps, self.scheduler) for p in (wanted, found)
            )
            target, noise = noises
            errors.append((noise - target).square().mean((1, 2, 3)) / target.square().mean())
        return torch.stack(errors, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        return {"step": torch.tensor(self.step)} | state_tensors(self._parameters(), self.optimizer)

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Go on where `tensors` was called."""
        self.step = int(stored["step"])
        restore_state(self._parameters(), self.optimizer, stored, self.step)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.student.named_parameters() if p.requires_grad)
