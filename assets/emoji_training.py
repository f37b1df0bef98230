"""Training that can stop at any moment: an optimiser with averaged weights, checkpoints that hold the random state too."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT_SECONDS = 180


@dataclass
class Checkpoint:
    """Named tensors plus a few numbers, in one safetensors file, replaced atomically."""

    path: Path

    def save(self, tensors: dict[str, Tensor], **numbers: float) -> None:
        temporary = self.path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"numbers": json.dumps(numbers)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            return {k: file.get_tensor(k).clone() for k in file.keys()}, json.loads(file.metadata()["numbers"])


class Trainer:
    """AdamW on fp32 masters with an exponential moving average; the model itself may be bf16."""

    def __init__(self, parameters: dict[str, Tensor], generator: torch.Generator, ema_decay: float):
        self.names = list(parameters)
        self.live = list(parameters.values())
        self.master = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.ema = [p.detach().clone() for p in self.master]
        self.optimizer = torch.optim.AdamW(self.master, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.generator, self.ema_decay, self.step = generator, ema_decay, 0
        for p in self.master:  # so that the state exists before a checkpoint is read
            self.optimizer.state[p] = {
                "step": torch.tensor(0.0, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @torch.no_grad()
    def begin(self, weights: dict[str, Tensor]) -> None:
        """Start from other weights than the model's."""
        for name, live, m, e in zip(self.names, self.live, self.master, self.ema, strict=True):
            for tensor in (live, m, e):
                tensor.copy_(weights[name])

    def update(self, learning_rate: float) -> None:
        """One optimiser step from the gradients of the live parameters, which are then cleared."""
        for p, m in zip(self.live, self.master, strict=True):
            m.grad = torch.empty_like(m).copy_(p.grad)  # the fused optimiser wants one memory layout for all
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.master)
            torch._foreach_lerp_(self.ema, [m.detach() for m in self.master], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        moments = ((n, self.optimizer.state[m]) for n, m in zip(self.names, self.master, strict=True))
        out = {"generator": self.generator.get_state()}
        for (name, state), m, e in zip(moments, self.master, self.ema, strict=True):
            out |= {
                f"master/{name}": m.detach(),
                f"ema/{name}": e,
                f"m/{name}": state["exp_avg"],
                f"v/{name}": state["exp_avg_sq"],
            }
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        for name, live, m, e in zip(self.names, self.live, self.master, self.ema, strict=True):
            m.copy_(tensors[f"master/{name}"])
            e.copy_(tensors[f"ema/{name}"])
            live.copy_(m)
            state = self.optimizer.state[m]
            state["exp_avg"].copy_(tensors[f"m/{name}"])
            state["exp_avg_sq"].copy_(tensors[f"v/{name}"])
            state["step"].fill_(step)
        if tensors["generator"].shape == self.generator.get_state().shape:
            self.generator.set_state(tensors["generator"])
        else:  # a checkpoint of another kind of device, whose random numbers are others
            self.generator.manual_seed(self.generator.initial_seed() + step)
        self.step = step


@dataclass
class Course:
    """How far a training has come, from 0 to 1: by its steps, or by the time it may take, whichever is further."""

    steps: int
    seconds: float = math.inf
    began: float = field(default_factory=time.monotonic)

    def done(self, step: int) -> float:
        return max(step / self.steps, (time.monotonic() - self.began) / self.seconds)


def learning_rate(step: int, steps: int | Course, peak: float, warmup: int, decay_from: float) -> float:
    """Linear warm-up, a plateau, and a linear decay to 1 % of the peak from the fraction `decay_from` on."""
    done = steps.done(step) if isinstance(steps, Course) else step / steps
    tail = min(1.0, max(0.0, (done - decay_from) / (1 - decay_from)))
    return peak * min(1.0, (step + 1) / warmup) * (1 - 0.99 * tail)


def train(
    trainer: Trainer, checkpoint: Checkpoint, steps: int | Course, schedule, loss_of_batch, batch_size: int, **numbers: float
) -> Iterator[Tensor]:
    """Run to the end, yielding each loss; print one progress line every 50 steps; checkpoint, with `numbers`, now and then."""
    course = steps if isinstance(steps, Course) else Course(steps)
    began, begun_at, saved, mean = time.monotonic(), trainer.step, time.monotonic(), None
    while course.done(trainer.step) < 1:
        loss = loss_of_batch()
        loss.backward()
        trainer.update(schedule(trainer.step))
        value = loss.detach()  # read every 50 steps only: reading waits for a GPU
        mean = value if mean is None else mean.lerp(value, 0.02)
        yield value
        if trainer.step % 50 == 0:
            speed = (trainer.step - begun_at) * batch_size / (time.monotonic() - began)
            done = f"{100 * course.done(trainer.step):.0f} %"
            print(f"step {trainer.step}, {done}  loss {mean:.4f}  {speed:.0f} examples/s", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or course.done(trainer.step) >= 1:
            checkpoint.save(trainer.tensors(), step=trainer.step, **numbers)
            saved = time.monotonic()
