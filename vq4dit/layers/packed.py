"""A linear layer whose weight is held as packed bytes, whatever is in them.

A layer can keep its decoded weight beside the packed bytes (`decode`: as fast as the original) or look the weight up in every
forward pass (`drop_decoded`: as small as the file). The packed tensors are what is saved, always, and nothing that is done to
a model's types changes what they say. What becomes of a weight that somebody writes into: `vq4dit/layers/held_weight.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.errors import FormatError
from vq4dit.layers.casts import as_bytes, as_scales, check_finite
from vq4dit.layers.held_weight import HeldWeight
from vq4dit.layers.lazy_weight import Memory, Variable
from vq4dit.layers.linear_maps import LAST, multiply


class PackedLinear(HeldWeight):
    """A linear layer whose weight is held as packed tensors, those of the file, and decoded from them.

    It is an `nn.Linear` so that PEFT and others find it. `weight` is not stored: see `vq4dit/layers/lazy_weight.py`. Whatever
    is written into it (a merged LoRA) is used by `forward`, and noticed when saving.

    Packed tensors are parameters, not buffers, because that is what offloading moves; none of them takes gradients.
    """

    FIRST_VERSION: int  # of the format that has such layers
    channel_dim: int = LAST  # of its inputs; another one in the place of a 1x1 convolution
    room: Any | None  # if it shall be decoded where memory suffices, and not elsewhere: what tells that of a device

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: there is no weight to make
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.keeps_decoded, self.variable, self.room = False, Variable(Memory()), None
        self.register_buffer("decoded_weight", None, persistent=False)
        bias_values = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias_values, requires_grad=False) if bias else None)

    def check(self, name: str) -> None:
        """Raise `FormatError` if the packed tensors hold no weight."""
        raise NotImplementedError

    def decode(self, dtype: torch.dtype | None = None, name: str = "a layer") -> None:
        """Keep the decoded weight beside the packed one from now on; a `FormatError` tells the layer's name.

        Args:
            dtype: of the decoded weight from now on; None is that of the layer.
        """
        self.check(name)
        self._keep_decoded(dtype)
        check_weight(self.numbers(), name)

    def register_parameter(self, name: str, param: Any) -> None:
        """Refuse what takes the place of a tensor of ours, and would be saved instead of it: a pruned one, say."""
        self._check_own(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As `register_parameter`."""
        self._check_own(name)
        super().register_buffer(name, tensor, persistent)

    def register_module(self, name: str, module: nn.Module | None) -> None:
        """As `register_parameter`: parametrizations are a module."""
        self._check_own(name)
        super().register_module(name, module)

    def __delattr__(self, name: str) -> None:
        if name in (*self.EXACT, *self.BYTES, "bias", "weight"):  # something else shall be in its place
            self._check_own(f"something in place of {name}")
        super().__delattr__(name)

    def _check_own(self, name: str) -> None:
        if name not in (*self.EXACT, *self.BYTES, "bias", "decoded_weight"):
            raise ValueError(
                f"a packed layer has no place for {name}: its tensors cannot be pruned, parametrized or normalised, make an "
                "ordinary model of it first with vq4dit.dequantize(model)"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) and name != "weight":
            self._check_own(name)
        if name == "weight":  # nn.Module would make a parameter of it
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def bits_per_weight(self) -> float:
        """Of all packed tensors in the file: codebook and scales count, the bias does not."""
        packed = {name: p for name, p in self.named_parameters() if name != "bias"}
        num_bytes = sum(p.numel() * (2 if name in self.EXACT else 1) for name, p in packed.items())
        return 8 * num_bytes / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.keep_up()
        decoded = self.decoded_weight
        weight = self.reconstruct(input.dtype) if decoded is None else decoded.to(input.dtype)
        return multiply(input, weight, None if self.bias is None else self.bias.to(input.dtype), self.channel_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Let `.to(dtype)` change the bias and the decoded weight, never codebooks and scales: the file's numbers are exact.

        A type of less than 16 bits (layerwise casting, which stores a layer in fp8 while it is not used) changes nothing:
        the layer is stored in fewer bits than that already.
        """
        for name in self.BYTES:
            if (packed := getattr(self, name)).dtype != torch.uint8:
                packed.data = as_bytes(packed.data, name)
        self.keep_up()
        told = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        suffices = self._finds_room(told.device)
        if suffices is False and not self.variable.memory.written:
            self.drop_decoded()
        exact = {name: getattr(self, name).data for name in self.EXACT if getattr(self, name) is not None}
        bias = None if self.bias is None else self.bias.data
        decoded, self.decoded_weight = self.decoded_weight, None
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                moved.data = before.to(moved.device)
        if bias is not None and self.bias.dtype.itemsize < 2:
            self.bias.data = bias.to(self.bias.device)
        self.dtype = self.dtype if told.dtype.itemsize < 2 else told.dtype
        if decoded is not None:
            self._hold_applied(fn, decoded)
        elif suffices:
            self.decode()
        return self

    def _finds_room(self, device: torch.device) -> bool | None:
        """Whether it shall be decoded on a device where it is moved to; None if nothing changes."""
        if self.room is None or device == self.device or "meta" in (device.type, self.device.type):
            return None
        return self.room.suffices(device)

    def _hold_applied(self, fn: Callable[[Tensor], Tensor], decoded: Tensor) -> None:
        """Keep what became of the decoded weight by a move or a cast."""
        memory, told = self.variable.memory, fn(decoded[:0])
        if memory.source is not None:
            memory.source = self._source(memory.source.digest)
        if told.dtype == decoded.dtype:
            self.decoded_weight = fn(decoded)
            return
        if told.dtype.itemsize < 2:
            self.decoded_weight = decoded.to(told.device)
            return
        self.decoded_weight = decoded
        self.notice(memory)
        if memory.written or told.device.type == "meta":
            self.decoded_weight = fn(decoded)
        else:
            self.decoded_weight = self.reconstruct(told.dtype)  # rounded once, as if it had been decoded so
        memory.seal = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Other packed tensors are another weight: what was decoded or written before is not it.

        Raises:
            FormatError: if they hold no weight; the layer is what it was then.
        """
        given = {key: self._checked(key, tensor) for key, tensor in state_dict.items() if key.startswith(prefix)}
        if not any(f"{prefix}{name}" in given for name in (*self.EXACT, *self.BYTES)):
            super()._load_from_state_dict(given, prefix, *arguments)
            return
        before = {name: (p, p.detach().clone()) for name, p in self._parameters.items() if p is not None}
        decoded, memory = self.decoded_weight, copy.copy(self.variable.memory)
        errors = arguments[-1]
        told = len(errors)
        try:
            self._make_room(given, prefix)
            super()._load_from_state_dict(given, prefix, *arguments)
            if len(errors) == told:
                self._take_over(prefix.removesuffix("."))
                return
        except FormatError:
            self._restore(before)
            self.decoded_weight, self.variable.memory = decoded, memory
            raise
        self._restore(before)

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of a state dict, as strictly looked at as those of a file."""
        name = key.rpartition(".")[2]
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return tensor
        if name in self.BYTES:
            return as_bytes(tensor, key)
        check_finite(key, tensor, None if self.bias is None or name != "bias" else self.bias.dtype)
        return as_scales(tensor, key) if name in self.EXACT else tensor

    def _make_room(self, given: dict[str, Tensor], prefix: str) -> None:
        """Change what has another length in a state dict, and may."""

    def _take_over(self, name: str) -> None:
        """Use the packed tensors that are there now."""
        if self.device.type == "meta":
            self.drop_decoded()
        elif self.keeps_decoded:
            self.decode(None, name)
        else:
            self._forget()
            self.check(name)

    def _restore(self, before: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
        for name, (parameter, values) in before.items():
            self._parameters[name] = parameter
            if parameter.device.type != "meta":
                parameter.data.copy_(values)


def check_weight(weight: Float[Tensor, "rows columns"], name: str) -> None:
    """Raise `FormatError` if a decoded weight is not finite: scales may multiply to more than a type holds."""
    if weight.numel() and not torch.isfinite(torch.stack(weight.aminmax())).all():  # NaN is both
        raise FormatError(
            f"{name}: its weight is not finite, or too large for {weight.dtype}: load the model with dtype=torch.bfloat16 or "
            "torch.float32. If that was so, the file is damaged: download or quantize it again"
        )
