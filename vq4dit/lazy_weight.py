"""The `weight` of a packed layer, as everybody else sees it: a tensor whose numbers are decoded when they are asked for.

PEFT, accelerate and summary tools look at `weight.dtype`, `.device` and `.shape` of every linear layer; none of that needs
a number, and looking changes nothing. Who computes with the weight gets decoded numbers, which are forgotten afterwards
unless the layer keeps them anyway. Who writes into it (a LoRA that is merged), or takes a view that could be written into,
changes what the layer multiplies by: then the layer keeps the numbers and is told what was done.

No layer holds such a tensor: it is made anew by every `layer.weight`. What layers hold, save and move are plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class LazyWeight(Tensor):
    """(out_features, in_features) of a layer, in the type and on the device in which it would be decoded."""

    layer: Any  # a `PackedLinear`, which is built on this

    @staticmethod
    def __new__(cls, layer: Any, dtype: torch.dtype, device: torch.device) -> LazyWeight:
        shape = (layer.out_features, layer.in_features)
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight.layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in ALIASES:
            return args[0]
        if func in REQUESTS:
            if kwargs.get("requires_grad", args[1] if len(args) > 1 else True):
                raise ValueError(
                    "the weight of a packed layer takes no gradients: train an adapter beside it (peft), or make an ordinary "
                    "model of this one with vq4dit.dequantize(model)"
                )
            return args[0]
        if func == ASSIGNMENT and isinstance(args[0], LazyWeight):
            args[0].layer.weight = args[1]
            return None
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


def _attributes(*names: str) -> set[Callable]:
    """As `__torch_function__` is told that an attribute is read."""
    return {getattr(Tensor, name).__get__ for name in names}


LOOKS = {
    *_attributes(
        "shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "is_leaf", "grad", "grad_fn"
    ),
    *_attributes("is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse", "is_quantized", "_version"),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference),
    *(Tensor.get_device, torch.is_floating_point, torch.is_complex, torch.numel),
}
ALIASES = {*_attributes("data"), Tensor.detach, torch.detach}
REQUESTS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
ASSIGNMENT = Tensor.data.__set__  # type: ignore[attr-defined]
ADDITION, SUBTRACTION = Tensor.add_, Tensor.sub_


def _compute(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Call a function with numbers in place of lazy weights; whose memory it wrote into or hands out is kept by its layer."""
    first = args[0] if args else None
    amount = args[1] if len(args) == 2 and not kwargs and isinstance(args[1], Tensor) else None
    if func is SUBTRACTION and isinstance(first, LazyWeight) and amount is not None and first.layer.takes_back(amount):
        return first
    lent: dict[int, tuple[Any, Tensor, int]] = {}

    def lend(weight: LazyWeight) -> Tensor:
        layer = weight.layer
        if id(layer) not in lent:
            numbers = layer.numbers()
            lent[id(layer)] = (layer, numbers, _version(numbers))
        return lent[id(layer)][1]

    args, kwargs = tree_map_only(LazyWeight, lend, (args, kwargs))
    result = func(*args, **kwargs)
    for layer, numbers, version in lent.values():
        if _version(numbers) != version:
            layer.was_written(numbers, amount if func is ADDITION else None)
        elif result is not numbers and any(_shares(leaf, numbers) for leaf in tree_leaves(result)):
            layer.decoded_weight = numbers
    if isinstance(first, LazyWeight) and result is lent[id(first.layer)][1]:
        return first  # `to`, `contiguous`, `add_`: the same weight again
    return result


def _version(numbers: Tensor) -> int:
    """Counts writes into a tensor (tensors of inference mode do not count)."""
    return 0 if numbers.is_inference() else numbers._version


def _shares(value: Any, numbers: Tensor) -> bool:
    """Whether a result could be used to write into the numbers: a view, or what is no tensor and no plain value."""
    if isinstance(value, Tensor):
        return value.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
    return not isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, type(None)))
