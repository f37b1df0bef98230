"""What enters a block: found by the transformer's own forward pass, whatever it does between its blocks.

A transformer is called again as its pipeline called it. Every block before the one that is asked for answers from a store
instead of computing, and that one only tells what it was given. So embedders, concatenations between streams, skips over many
blocks, and blocks that run in another order than they are declared in all work without being known here. Nothing else runs: it
costs the embedders and what glues the blocks together.

Teacher and student differ in what the store holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vq4dit.denoisers import kind_of
from vq4dit.errors import UnsupportedModelError
from vq4dit.models.blocks import named_blocks
from vq4dit.models.denoiser_calls import DenoiserCall, Tree, map_tensors, tensors_of
from vq4dit.surroundings import evaluating


class BlockArguments(NamedTuple):
    """What a block is given."""

    positional: tuple
    named: dict[str, Any]

    def run(self, block: nn.Module) -> Tree:
        return block(*self.positional, **self.named)


class _Reached(Exception):
    """The block that was asked for has told its arguments: the rest need not run."""


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other `forward`s for a while, on these instances only."""
    had: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    for module, other in forwards.items():
        module.__dict__["forward"] = other
    try:
        yield
    finally:
        for module, forward in had.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def executed_blocks(transformer: nn.Module, call: DenoiserCall) -> list[str]:
    """The blocks' names in the order in which they run.

    Raises:
        UnsupportedModelError: if one runs twice in a pass.
    """
    order: list[str] = []
    handles = [
        block.register_forward_pre_hook(lambda _, arguments, name=name: order.append(name))
        for name, block in named_blocks(transformer).items()
    ]
    try:
        with torch.no_grad(), evaluating(transformer):
            call.run(transformer)
    finally:
        for handle in handles:
            handle.remove()
    if twice := [name for name in order if order.count(name) > 1]:
        raise UnsupportedModelError(
            f"{twice[0]} runs more than once in a pass of this {kind_of(transformer)}, so what enters it is not one "
            "thing: choose the recipe kmeans, which needs no inputs"
        )
    return order


class BlockReplay:
    """Recorded calls of a transformer, gone through block by block.

    Args:
        order: its blocks' names as they run (`executed_blocks`).
        last_reader: for each block the last one that needs its outputs (`last_readers`): then they are dropped.
    """

    def __init__(self, transformer: nn.Module, calls: Sequence[DenoiserCall], order: Sequence[str], last_reader: Sequence[int]):
        self.transformer, self.calls, self.order, self.last_reader = transformer, calls, order, last_reader
        self.outputs: list[list[Tree]] = [[] for _ in calls]

    @torch.no_grad()
    def arguments(self, index: int) -> list[BlockArguments]:
        """What enters the block that runs as number `index`, in every call; those before it must have been `kept`."""
        with evaluating(self.transformer):
            return [
                _arguments(self.transformer, self.order, outputs, call, index)
                for call, outputs in zip(self.calls, self.outputs, strict=True)
            ]

    def keep(self, outputs: Sequence[Tree]) -> None:
        """Store what the next block answered in every call, as long as it is needed."""
        for kept, output in zip(self.outputs, outputs, strict=True):
            kept.append(output)
            for index in range(len(kept) - 1):
                if self.last_reader[index] < len(kept):
                    kept[index] = map_tensors(_hollow, kept[index])


def last_readers(transformer: nn.Module, call: DenoiserCall, order: Sequence[str]) -> list[int]:
    """For each block, the number of the last one whose arguments depend on its outputs directly, not by another block's.

    Found by spoiling: with NaN in one block's stored outputs, whoever reads them is given NaN.
    """
    outputs: list[Tree] = []
    with torch.no_grad(), evaluating(transformer):
        for index, name in enumerate(order):
            arguments = _arguments(transformer, order, outputs, call, index)
            outputs.append(arguments.run(transformer.get_submodule(name)))
        found = []
        for index in range(len(order)):
            spoiled = [*outputs]
            spoiled[index] = map_tensors(_spoil, outputs[index])
            found.append(_last_spoiled(transformer, order, spoiled, call, index))
    return found


def _last_spoiled(transformer: nn.Module, order: Sequence[str], outputs: list[Tree], call: DenoiserCall, first: int) -> int:
    """The last block whose arguments are not numbers; all blocks answer what is stored."""
    last = first + 1

    def answer(index: int, *positional: Any, **named: Any) -> Tree:
        nonlocal last
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_of((positional, named))):
            last = max(last, index)
        return outputs[index]

    forwards = {transformer.get_submodule(name): partial(answer, index) for index, name in enumerate(order)}
    with replaced_forwards(forwards):
        call.run(transformer)
    return last


def _spoil(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


def _hollow(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return tensor if 0 in tensor.stride() or not tensor.ndim else tensor.new_zeros(()).expand(tensor.shape)


def _arguments(
    transformer: nn.Module, order: Sequence[str], outputs: Sequence[Tree], call: DenoiserCall, index: int
) -> BlockArguments:
    reached: list[BlockArguments] = []

    def tell(*positional: Any, **named: Any) -> Tree:
        reached.append(BlockArguments(positional, named))
        raise _Reached

    forwards = {transformer.get_submodule(name): _answer(outputs[number]) for number, name in enumerate(order[:index])}
    with replaced_forwards(forwards | {transformer.get_submodule(order[index]): tell}), suppress(_Reached):
        call.run(transformer)
    if not reached:
        raise UnsupportedModelError(
            f"{order[index]} does not run in every call of this {kind_of(transformer)}, so layers cannot be fitted one "
            "after the other: choose the recipe kmeans, which needs no inputs"
        )
    return reached[0]


def _answer(output: Tree) -> Callable[..., Tree]:
    return lambda *positional, **named: output
