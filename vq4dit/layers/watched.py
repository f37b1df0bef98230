"""Parameters that know whether somebody may have changed their numbers.

A weight that is kept decoded must not outlive the packed tensors it was decoded from. They may be written into in place, be
given other memory (`.data = ...`), or be replaced by others, and torch tells of some of that only: what is written through
`.data` or NumPy counts as no new version. So packed tensors count how often their memory is handed out, `mark` says cheaply
whether anything may have happened since it was asked last, and `digest` says whether something did.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class WatchedParameter(nn.Parameter):
    """A parameter that counts the writes into it, and how often its memory was handed out: as `.data`, a view, or to NumPy."""

    changes: int = 0

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in LOOKS or torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in REQUESTS and asks_for_gradients(args, kwargs or {}):
                raise ValueError(WITHOUT_GRADIENTS)
            watched = [(leaf, _state(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, WatchedParameter)]
            result = func(*args, **(kwargs or {}))
            for parameter, before in watched:
                lent = any(shares(leaf, parameter) for leaf in tree_leaves(result) if leaf is not parameter)
                if lent or _state(parameter) != before or parameter.is_inference():
                    parameter.changes += 1
        return result

    def set_(self, *arguments: Any, **named: Any) -> Tensor:
        """The one function that torch does not tell of."""
        self.changes += 1
        return super().set_(*arguments, **named)


def frozen(values: Tensor) -> nn.Parameter:
    """A watched parameter that takes no gradients."""
    return WatchedParameter(values, requires_grad=False)


def mark(tensor: Tensor) -> Any:
    """Something that differs as soon as somebody may have written into a tensor. Costs next to nothing."""
    if isinstance(tensor, WatchedParameter):
        return tensor.changes
    return _state(tensor)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), version(tensor)


def version(tensor: Tensor) -> int:
    """Counts writes into a tensor (tensors of inference mode do not count)."""
    return 0 if tensor.is_inference() else tensor._version


def digest(*tensors: Tensor) -> bytes:
    """Of all bits of the tensors, their types and shapes."""
    found = hashlib.blake2b(digest_size=16)
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def shares(value: Any, tensor: Tensor) -> bool:
    """Whether a result could be used to write into a tensor: a view, or what is no tensor and no plain value."""
    if isinstance(value, Tensor):
        return value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return not isinstance(value, PLAIN)


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is somebody else's as well: of a view, of a NumPy array, or taken as it is."""
    return _holders(tensor) != OWN


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many tensors hold its memory, and how many names the object has that stands for it."""
    storage = tensor.untyped_storage()  # the same object for everybody
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


def asks_for_gradients(args: tuple, kwargs: dict) -> bool:
    """Of a call of one of REQUESTS."""
    return bool(kwargs.get("requires_grad", args[1] if len(args) > 1 else True))


def _attributes(*names: str) -> set[Callable]:
    """As `__torch_function__` is told that an attribute is read."""
    return {getattr(Tensor, name).__get__ for name in names}


PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
LOOKS = {
    *_attributes(
        "shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "is_leaf", "grad", "grad_fn"
    ),
    *_attributes("is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse", "is_quantized", "_version"),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference),
    *(Tensor.get_device, torch.is_floating_point, torch.is_complex, torch.numel),
}
REQUESTS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
WITHOUT_GRADIENTS = (
    "the weight of a packed layer takes no gradients: train an adapter beside it (peft), or make an ordinary model of this one "
    "with vq4dit.dequantize(model)"
)
DATA = Tensor.data.__get__  # type: ignore[attr-defined]
ASSIGNMENT = Tensor.data.__set__  # type: ignore[attr-defined]
OWN = _holders(torch.empty(0, device="cpu"))  # of memory that is nobody else's
