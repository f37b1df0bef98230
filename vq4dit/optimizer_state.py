"""Parameters that learn, and their optimizer's state, as named tensors: what a checkpoint of learning holds.

The state exists from the start, with zeros as the optimizer itself would begin, so that it can be restored in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


def start_state(optimizer: torch.optim.Optimizer, *moments: str) -> None:
    """Give every parameter its state: the step, and a tensor of zeros for each of the optimizer's `moments`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros(())} | {moment: torch.zeros_like(p) for moment in moments}


def state_tensors(parameters: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """NAME: the parameter; NAME/MOMENT: its state. The step is the same for all and is left to the caller."""
    stored: dict[str, Tensor] = {}
    for name, p in parameters:
        state = optimizer.state[p].items()
        stored |= {name: p} | {f"{name}/{moment}": value for moment, value in state if moment != "step"}
    return stored


@torch.no_grad()
def restore_state(parameters: Named, optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor], step: int) -> None:
    """Put back what `state_tensors` gave after `step` updates."""
    for name, p in parameters:
        p.copy_(stored[name])
        for moment, value in optimizer.state[p].items():
            if moment == "step":
                value.fill_(step)
            else:
                value.copy_(stored[f"{name}/{moment}"])
