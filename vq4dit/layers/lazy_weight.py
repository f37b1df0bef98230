"""The `weight` of a packed layer, as everybody else sees it: a tensor whose numbers are decoded when they are asked for.

PEFT, accelerate and summary tools look at `weight.dtype`, `.device` and `.shape` of every linear layer; none of that needs
a number, and looking changes nothing. Who computes with the weight gets decoded numbers, which are forgotten afterwards
unless the layer keeps them anyway. Who writes into it (a LoRA that is merged), or takes a view that could be written into,
changes what the layer multiplies by: then the layer keeps the numbers and is told what was done.

No layer holds such a tensor: it is made anew by every `layer.weight`. What layers hold, save and move are plain tensors.
As with any parameter, three things are told apart: the numbers, the memory that they are in, and the variable that has the
memory. `layer.weight = other` is another variable, so the one that was there can be put back; `weight.data = other` gives the
same variable other memory; `weight += other` writes into that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from vq4dit.layers.watched import ASSIGNMENT, DATA, LOOKS, REQUESTS, WITHOUT_GRADIENTS, asks_for_gradients, shares, version


class Source(NamedTuple):
    """The packed tensors of a layer at some time."""

    tensors: tuple[tuple[str, Tensor, Any], ...]  # name, tensor, and its `mark`
    device: torch.device
    digest: bytes


class Memory:
    """Where a weight's numbers are. Those of the memory that a layer uses are its `decoded_weight`, others are put away here.

    None means that nothing was written: they are what the packed tensors say.
    """

    def __init__(self, put_away: Tensor | None = None, written: Sequence[bytes | None] = ()):
        self.put_away = put_away
        self.written = [*written]  # since it was decoded: digests of what was added, None for anything else
        self.seal: bytes | None = None  # a digest of the numbers, if others have views of them and may write
        self.source: Source | None = None  # what the packed tensors were when there began to be numbers

    def clear(self) -> None:
        """Begin anew: nothing was written."""
        self.put_away, self.written, self.seal, self.source = None, [], None, None


class Variable:
    """What `layer.weight` is, and is given back by who took it away: it has some memory."""

    def __init__(self, memory: Memory):
        self.memory = memory


class LazyWeight(Tensor):
    """(out_features, in_features) of a layer, in the type and on the device in which it would be decoded."""

    layer: Any  # a `PackedLinear`, which is built on this
    variable: Variable

    @staticmethod
    def __new__(cls, layer: Any, variable: Variable, dtype: torch.dtype, device: torch.device) -> LazyWeight:
        shape = (layer.out_features, layer.in_features)
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight.layer, weight.variable = layer, variable
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in ALIASES:
            weight = args[0]
            return cls(weight.layer, Variable(weight.variable.memory), weight.dtype, weight.device)
        if func in REQUESTS:
            if asks_for_gradients(args, kwargs):
                raise ValueError(WITHOUT_GRADIENTS)
            return args[0]
        if func == ASSIGNMENT and isinstance(args[0], LazyWeight):
            weight, value = args
            weight.layer.give(weight.variable, weight.layer.memory_of(value))
            return None
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


ALIASES = {DATA, Tensor.detach, torch.detach}
ADDITION, SUBTRACTION = Tensor.add_, Tensor.sub_


def _compute(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Call a function with numbers in place of lazy weights; whose memory it wrote into or hands out is kept by its layer."""
    first = args[0] if args and isinstance(args[0], LazyWeight) else None
    amount = args[1] if len(args) == 2 and not kwargs and isinstance(args[1], Tensor) else None
    amount = amount.clone() if isinstance(amount, LazyWeight) else amount
    if first is not None and amount is not None and func in (ADDITION, SUBTRACTION):
        first.layer.notice(first.variable.memory)
        if func is SUBTRACTION and first.layer.takes_back(first.variable.memory, amount):
            return first
    lent: dict[int, tuple[LazyWeight, Tensor, int]] = {}

    def lend(weight: LazyWeight) -> Tensor:
        memory = weight.variable.memory
        if id(memory) not in lent:
            numbers = weight.layer.numbers_of(memory)
            lent[id(memory)] = (weight, numbers, version(numbers))
        return lent[id(memory)][1]

    args, kwargs = tree_map_only(LazyWeight, lend, (args, kwargs))
    result = func(*args, **kwargs)
    for weight, numbers, before in lent.values():
        if version(numbers) != before:
            weight.layer.was_written(weight.variable.memory, numbers, amount if func is ADDITION else None)
        elif result is not numbers and any(shares(leaf, numbers) for leaf in tree_leaves(result)):
            weight.layer.lend(weight.variable.memory, numbers)
    if first is not None and result is args[0]:
        return first  # `to`, `contiguous`, `add_`: the same weight again
    return result
