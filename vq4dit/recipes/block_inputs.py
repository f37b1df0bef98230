"""What the linears of one block read, in every recorded call: their inputs, by running the block.

A block runs whole once to see in which order its linears run, and after that only as far as the linear that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from vq4dit.layers.linear_maps import tokens_of
from vq4dit.models.block_replay import BlockArguments, BlockReplay
from vq4dit.models.denoiser_calls import Tree
from vq4dit.surroundings import evaluating


class ReplayedBlock:
    """One block of a model, and what enters it in every recorded call."""

    def __init__(self, replay: BlockReplay, index: int):
        self.calls = replay.calls
        self.module = replay.transformer.get_submodule(replay.order[index])
        self.arguments = replay.arguments(index)
        self.runs: dict[str, int] = {}  # of each linear in one pass of the block

    def inputs_of(self, names: Sequence[str]) -> tuple[dict[str, list[Tensor]], list[Tree]]:
        """Run the block: inputs of the named linears by call, in order of execution, and what the block answers."""
        seen: dict[str, list[list[Tensor]]] = {}

        def note(number: int, name: str, inputs: Tensor) -> None:
            of_calls = seen.setdefault(name, [[] for _ in self.arguments])
            of_calls[number].append(inputs)

        outputs = []
        with torch.no_grad(), evaluating(self.module):
            for number, arguments in enumerate(self.arguments):
                with _watched(self.module, names, partial(note, number)):
                    outputs.append(arguments.run(self.module))
        self.runs = {name: len(of_calls[0]) for name, of_calls in seen.items()}
        return {name: [_together(of_call) for of_call in of_calls] for name, of_calls in seen.items()}, outputs

    def input_of(self, name: str, runs: int = 1, arguments: Sequence[BlockArguments] | None = None) -> list[Tensor]:
        """The inputs of one linear that runs so often in a pass; what comes behind it does not run."""
        found = []
        for of_call in self.arguments if arguments is None else arguments:
            seen: list[Tensor] = []

            def stop(_: str, inputs: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(inputs)
                if len(seen) == runs:
                    raise _Seen

            with torch.no_grad(), evaluating(self.module), _watched(self.module, [name], stop), suppress(_Seen):
                of_call.run(self.module)
            found.append(_together(seen))
        return found

    def has_bias(self, name: str) -> bool:
        return getattr(self.module.get_submodule(name), "bias", None) is not None

    def of_every_class(self, num_classes: int) -> list[BlockArguments] | None:
        """The same calls with one token, once for every class and as often for none; None if the block is told no class."""
        return [_every_class(arguments, num_classes) for arguments in self.arguments] if self._is_told_classes else None

    @property
    def _is_told_classes(self) -> bool:
        return isinstance(self.arguments[0].named.get("class_labels"), Tensor)


def _every_class(arguments: BlockArguments, num_classes: int) -> BlockArguments:
    hidden, named = arguments.positional[0], arguments.named
    classes = torch.arange(num_classes, device=hidden.device)
    last = named["class_labels"][-1:]  # that of none, with guidance
    labels = torch.cat([classes, last.expand(len(classes)) if int(last) >= num_classes else classes])
    named = {**named, "class_labels": labels, "timestep": named["timestep"][:1].expand(len(labels))}
    return BlockArguments((hidden[:1, :1].expand(len(labels), 1, -1), *arguments.positional[1:]), named)


def _together(inputs: list[Tensor]) -> Tensor:
    """What a linear saw in one call: as it was, or flat if it ran more than once."""
    return inputs[0] if len(inputs) == 1 else torch.cat([x.flatten(0, -2) for x in inputs])


class _Seen(Exception):
    """The input that was waited for is known: the rest of the block need not run."""


@contextmanager
def _watched(block: nn.Module, names: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """For a while `note` is told the name and the input of the named linears, before they run."""
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda linear, arguments, name=name: note(name, tokens_of(linear, arguments[0]))
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing_an_input(inputs: dict[str, list[Tensor]], kind: Callable[[str], bool]) -> list[list[str]]:
    """Linears one after the other that read the same, and are of one kind."""
    groups: list[list[str]] = []
    for name, seen in inputs.items():
        if groups and inputs[groups[-1][0]][0] is seen[0] and kind(groups[-1][0]) == kind(name):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
