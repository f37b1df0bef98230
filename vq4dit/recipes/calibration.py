"""Zero-data block-wise calibration: learn which candidate every sub-vector takes, and where the codewords lie.

The student is the transformer with `SoftVQLinear` layers. On latents of the teacher's own trajectories its blocks shall
answer like the teacher's, and its ratios shall become decisions (section 3.3 of VQ4DiT, arXiv:2408.17131):

    L_d = E Σ_l || block_l(teacher) - block_l(student) ||²        (eq. 8)
    L_r = Σ (1 - |2r - 1|) / (o·i/d)                               (eq. 9)
    L   = L_d + λ_r L_r                                            (eq. 10)

The student's activations flow from block to block, so this is one joint optimisation. One update per timestep; ratios
that exceed 0.99 are frozen on the way (progressive hardening); at the end the largest ratio wins. Calibration that stops
while ratios are soft flatters itself: quality is always measured on the hardened model.

Hardening is on a schedule: more and more sub-vectors, the most decided first, take their candidate, while the others still
can make good what that cost; the last part of the calibration belongs to the codebooks. And ratios learn slowly. With the
released constants (logits_learning_rate=5e-2, ratio_loss_weight=1, hardening_start=1, hardening_end=1) all are decided within
a hundred steps, before there is anything to decide by, and two candidates are no better than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq4dit.config import CalibrationConfig
from vq4dit.denoisers import denoiser_of, transformers_in
from vq4dit.errors import CalibrationDivergedError
from vq4dit.models.blocks import named_blocks, recorded_outputs
from vq4dit.models.denoiser_calls import DenoiserCall
from vq4dit.models.trajectories import Sampling, random_trajectories
from vq4dit.recipes.soft_layers import SoftVQLinear
from vq4dit.surroundings import evaluating


def block_loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """L_d (eq. 8): the mean over blocks of the mean squared error. Means, not sums, as released; λ_r is relative to that."""
    return torch.stack([F.mse_loss(output, target) for output, target in zip(outputs, targets, strict=True)]).mean()


def ratio_loss(layer: SoftVQLinear) -> Tensor:
    """L_r (eq. 9) of one layer: 0 when every sub-vector is decided, 2 when two candidates are equally likely."""
    return (1 - (2 * layer.ratios - 1).abs()).sum() / len(layer.logits)


class Calibration:
    """The state of a calibration between two updates; `advance` makes one update, `tensors` and `restore` carry it over.

    Of the teacher's trajectory the random state at its start and the number of steps so far are stored: it is sampled again.
    """

    def __init__(
        self,
        pipeline: Any,
        student: nn.Module,
        sampling: Sampling,
        config: CalibrationConfig,
        generator: torch.Generator,
    ):
        self.pipeline, self.student, self.sampling, self.config, self.generator = pipeline, student, sampling, config, generator
        self.layers = {name: m for name, m in student.named_modules() if isinstance(m, SoftVQLinear)}
        self.optimizer = torch.optim.RMSprop(
            [
                {"params": [layer.logits for layer in self._undecided()], "lr": config.logits_learning_rate},
                {"params": self._codebooks_and_biases(), "lr": config.codebook_learning_rate},
            ],
            alpha=config.rmsprop_alpha,
        )
        start_state(self.optimizer, "square_avg")
        self.step = 0
        self.teacher = denoiser_of(pipeline)
        self._blocks, self._teacher_blocks = _blocks_by_part(student), _blocks_by_part(self.teacher)
        self._start_trajectory()

    def advance(self) -> dict[str, float]:
        """One update on the next step of the trajectory; the losses before it.

        Raises:
            CalibrationDivergedError: if a loss is not finite.
        """
        calls = self._next_calls()
        block_mse = 0.0
        for call in calls:
            with torch.no_grad(), evaluating(self.teacher), recorded_outputs(self._teacher_blocks[call.part]) as targets:
                call.run(self.teacher)
            with recorded_outputs(self._blocks[call.part]) as outputs:
                call.run(self.student)
                distillation = block_loss(outputs, targets) / len(calls)
            distillation.backward()
            block_mse += distillation.item()
        undecided = self._undecided()
        ratios = 0.0
        for layer in undecided:  # layer by layer, so that only one layer's ratios are in memory
            loss = ratio_loss(layer) / len(undecided)
            (self.config.ratio_loss_weight * loss).backward()
            ratios += loss.item()
        if not math.isfinite(block_mse + ratios):
            raise CalibrationDivergedError(
                f"the loss became {block_mse + ratios} in step {self.step}: try another seed or a lower learning rate, and "
                "check that the original model gives sensible images"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer in undecided:
            layer.freeze_decided(self.config.decided_ratio, self._scheduled_fraction())
        self.step += 1
        return {"block_mse": block_mse, "ratio_loss": ratios}

    def _scheduled_fraction(self) -> float:
        """Part of the sub-vectors that must be decided after this step: from 0 to 1 between two points of the calibration."""
        start, end = self.config.hardening_start, self.config.hardening_end
        progress = (self.step + 1) / self.config.steps
        return min(1.0, max(0.0, progress - start) / max(end - start, 1e-9))

    def decided_fraction(self) -> float:
        """Part of all sub-vectors that are decided."""
        decided = sum(layer.decided_fraction * len(layer.logits) for layer in self.layers.values())
        return decided / sum(len(layer.logits) for layer in self.layers.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs."""
        own = {
            "step": torch.tensor(self.step),
            "trajectory_start": self._trajectory_start,
            "trajectory_step": torch.tensor(self._trajectory_step),
        }
        return own | state_tensors(self._parameters(), self.optimizer)

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Go on where `tensors` was called."""
        self.step = int(stored["step"])
        restore_state(self._parameters(), self.optimizer, stored, self.step)
        self.generator.set_state(stored["trajectory_start"])
        self._start_trajectory()
        self._trajectory_step = int(stored["trajectory_step"])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield from ((f"{name}.{key}", p) for key, p in layer.named_parameters() if p.requires_grad)

    def _undecided(self) -> list[SoftVQLinear]:
        return [layer for layer in self.layers.values() if layer.logits.requires_grad]

    def _codebooks_and_biases(self) -> list[nn.Parameter]:
        pairs = ((layer.codebook, layer.bias) for layer in self.layers.values())
        return [p for pair in pairs for p in pair if p is not None]

    def _start_trajectory(self) -> None:
        self._trajectory_start, self._trajectory_step = self.generator.get_state(), 0
        self._trajectory: list[list[DenoiserCall]] = []  # by step; sampled when its first step is wanted

    def _next_calls(self) -> list[DenoiserCall]:
        """How the teacher is called in the next step of the trajectory, or in the first one of another."""
        if not self._trajectory:
            with torch.no_grad():
                random_trajectories(
                    self.pipeline,
                    self.sampling,
                    self.config.num_trajectories,
                    self.generator,
                    lambda step: self._trajectory.append(step.calls),
                    num_inference_steps=self.config.num_inference_steps,
                )
        if self._trajectory_step == len(self._trajectory):
            self._start_trajectory()
            return self._next_calls()
        self._trajectory_step += 1
        return self._trajectory[self._trajectory_step - 1]


def _blocks_by_part(denoiser: nn.Module) -> dict[str, list[nn.Module]]:
    return {part: list(named_blocks(transformer).values()) for part, transformer in transformers_in(denoiser).items()}


def start_state(optimizer: torch.optim.Optimizer, *moments: str) -> None:
    """Give every parameter its state: the step, and a tensor of zeros for each of the optimizer's `moments`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros(())} | {moment: torch.zeros_like(p) for moment in moments}


def state_tensors(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """NAME: the parameter; NAME/MOMENT: its state. The step is the same for all and is left to the caller."""
    stored: dict[str, Tensor] = {}
    for name, p in parameters:
        state = optimizer.state[p].items()
        stored |= {name: p} | {f"{name}/{moment}": value for moment, value in state if moment != "step"}
    return stored


@torch.no_grad()
def restore_state(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor], step: int
) -> None:
    """Put back what `state_tensors` gave after `step` updates."""
    for name, p in parameters:
        p.copy_(stored[name])
        for moment, value in optimizer.state[p].items():
            if moment == "step":
                value.fill_(step)
            else:
                value.copy_(stored[f"{name}/{moment}"])
