"""Calls of the denoiser: what a pipeline hands to its transformer while it samples, to be made again later.

A recorded call is the transformer's own arguments, so that whoever makes it again needs to know nothing of the family: not what
a timestep is called, nor whether guidance was one batch or two calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vq4dit.denoisers import transformers_in

Tree = Any  # tensors in tuples, lists and dicts, with other values between them


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with every tensor replaced by the function's result."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        mapped = copy.copy(tree)
        mapped.update({key: map_tensors(function, value) for key, value in tree.items()})
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def tensors_of(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a transformer by its pipeline.

    Args:
        step: of the trajectory, from 0.
        index: of the calls in that step: guidance may take two.
        num_samples: side by side; their rows come in turn.
        part: the name in the denoiser of the transformer that was called; of one that is alone, none.
    """

    step: int
    index: int
    positional: tuple
    named: dict[str, Any]
    num_samples: int = 1
    part: str = ""

    def run(self, denoiser: nn.Module) -> Tensor:
        """What it answers: its prediction, as a tensor."""
        return prediction_of(denoiser.get_submodule(self.part)(*self.positional, **self.named))


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a transformer returned: a tensor, or the only one in it, or all of its tensors in a row."""
    found = tensors_of(output)
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found])


@dataclass
class Recorder:
    """Keeps the calls of a denoiser since the last `take`. What comes again in the next step (prompts) is kept once."""

    num_samples: int = 1
    step: int = 0
    calls: list[DenoiserCall] = field(default_factory=list)
    _known: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # the original is held: so is its id
    _seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # of them, in this step

    def take(self) -> list[DenoiserCall]:
        """The calls of the step that ends now."""
        calls, self.calls = self.calls, []
        self._known, self._seen = self._seen, {}
        self.step += 1
        return calls

    def note(self, part: str, _: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        positional, named = map_tensors(self._keep, (positional, named))
        self.calls.append(DenoiserCall(self.step, len(self.calls), positional, named, self.num_samples, part))

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        key = (id(tensor), tensor._version)
        pair = self._seen.get(key) or self._known.get(key) or (tensor, tensor.detach().clone())
        self._seen[key] = pair
        return pair[1]


@contextmanager
def recorded_calls(denoiser: nn.Module, num_samples: int = 1) -> Iterator[Recorder]:
    """Record for a while how its transformers are called to draw so many samples side by side."""
    recorder = Recorder(num_samples)
    handles = [
        transformer.register_forward_pre_hook(partial(recorder.note, part), with_kwargs=True)
        for part, transformer in transformers_in(denoiser).items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
