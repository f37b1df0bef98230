"""A linear layer whose weight is held as packed bytes, whatever is in them.

A layer can keep its decoded weight beside the packed bytes (`decode`: as fast as the original) or look the weight up in every
forward pass (`drop_decoded`: as small as the file). The packed tensors are what is saved, always, and nothing that is done to
a model's types changes what they say.

Somebody may write into the weight: a LoRA that is merged does. Then the layer computes with what was written, knows that its
packed tensors no longer describe it, and can take back what was added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.casts import as_bytes, as_scales, check_finite
from vq4dit.errors import FormatError
from vq4dit.lazy_weight import LazyWeight, Memory, Source, Variable
from vq4dit.watched import digest, frozen, is_held_elsewhere, mark

ROUNDING = 16  # times a type's eps, relative to the largest weight: what some additions and subtractions leave


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held as packed tensors, those of the file, and decoded from them.

    It is an `nn.Linear` so that PEFT and others find it. `weight` is not stored: see `vq4dit/lazy_weight.py`. Whatever is
    written into it (a merged LoRA) is used by `forward`, and noticed when saving.

    Packed tensors are parameters, not buffers, because that is what offloading moves; none of them takes gradients.
    """

    EXACT: tuple[str, ...]  # names of packed tensors that are fp32 holding fp16 values: `.to(dtype)` leaves them alone
    BYTES: tuple[str, ...]  # names of packed tensors that are bytes, whatever type somebody gave them
    decoded_weight: Tensor | None
    keeps_decoded: bool  # what `decode` and `drop_decoded` choose
    dtype: torch.dtype  # in which the weight is decoded
    variable: Variable  # what `weight` is now
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

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ in `dtype`, from the packed tensors.

        Raises:
            FormatError: if they were cast to a type that does not hold their values.
        """
        raise NotImplementedError

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

    def _keep_decoded(self, dtype: torch.dtype | None = None) -> None:
        self._forget()
        self.dtype, self.keeps_decoded = dtype or self.dtype, True
        self.hold(self.variable.memory, self._decoded())

    def drop_decoded(self) -> None:
        """Forget the decoded weight; every forward pass looks it up again."""
        self._forget()
        self.keeps_decoded = False

    def _forget(self) -> None:
        self.decoded_weight = None
        self.variable.memory.clear()

    def _decoded(self) -> Float[Tensor, "rows columns"]:
        with torch.inference_mode(False):  # a model may be loaded there and trained (beside an adapter) elsewhere
            return self.reconstruct(self.dtype).detach()  # no view of something else, which would hold the memory as well

    # --- what others see as `weight` ---

    @property
    def weight(self) -> Tensor:
        """(rows, columns): what `forward` multiplies by, decoded if somebody asks for its numbers."""
        decoded = self.decoded_weight
        return LazyWeight(self, self.variable, self.dtype if decoded is None else decoded.dtype, self.device)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if isinstance(value, LazyWeight) and value.layer is self:  # PEFT gives a layer its own weight back
            variable = value.variable
        else:
            variable = Variable(self.memory_of(value))
        with self._exchange():
            self.variable = variable

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
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

    def give(self, variable: Variable, memory: Memory) -> None:
        """Let a variable have other memory."""
        with self._exchange():
            variable.memory = memory

    def memory_of(self, value: Tensor) -> Memory:
        """That of this layer's own weight, or new memory with the numbers of another tensor."""
        if isinstance(value, LazyWeight):
            if value.layer is self:
                return value.variable.memory
            value = value.layer.numbers_of(value.variable.memory)
        if value.shape != (shape := (self.out_features, self.in_features)):
            raise ValueError(f"the weight of this layer is {shape[0]} x {shape[1]}, got {tuple(value.shape)}")
        return Memory(value.detach(), [None])

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Put the numbers in use away, and use those of what is the layer's memory afterwards."""
        self.variable.memory.put_away = self.decoded_weight
        yield
        memory = self.variable.memory
        self.decoded_weight, memory.put_away = memory.put_away, None
        if self.decoded_weight is not None:
            self.hold(memory, self.decoded_weight)
        elif self.keeps_decoded:
            self._keep_decoded()

    # --- its numbers ---

    def numbers(self) -> Float[Tensor, "rows columns"]:
        """The weight as it is used now: what was kept or written, or decoded for once."""
        return self.numbers_of(self.variable.memory)

    def numbers_of(self, memory: Memory) -> Float[Tensor, "rows columns"]:
        """Those in some memory."""
        self.keep_up()
        found = self._in(memory)
        return self._decoded() if found is None else found

    def _in(self, memory: Memory) -> Tensor | None:
        return self.decoded_weight if memory is self.variable.memory else memory.put_away

    def hold(self, memory: Memory, weight: Float[Tensor, "rows columns"]) -> None:
        """Let these be the numbers in some memory."""
        if memory.source is None:
            memory.source = self._source()
        if memory is self.variable.memory:
            self.decoded_weight = weight
        else:
            memory.put_away = weight

    def lend(self, memory: Memory, weight: Float[Tensor, "rows columns"]) -> None:
        """The same, and others have a view of them, through which they may write without a word."""
        self.hold(memory, weight)
        if memory.seal is None:
            memory.seal = digest(weight)

    def was_written(self, memory: Memory, weight: Float[Tensor, "rows columns"], added: Tensor | None) -> None:
        """Use this weight from now on, in which something was `added` or (None) all may have changed."""
        self.hold(memory, weight.detach())  # what is merged may know how it was learned
        memory.written.append(None if added is None else digest(added.detach()))
        memory.seal = memory.seal and digest(weight.detach())

    def notice(self, memory: Memory) -> None:
        """Look whether something was written through a view."""
        weight = self._in(memory)
        if weight is not None and memory.seal is not None and memory.seal != (found := digest(weight)):
            memory.written.append(None)
            memory.seal = found

    def takes_back(self, memory: Memory, amount: Tensor) -> bool:
        """Subtract something that was added before; False, and nothing done, if it was not.

        (w + δ) - δ is not w in floating point. So that a LoRA that was fused and is unfused leaves nothing behind, it is known
        what was added: once all of it is taken back, and nothing else was done, the packed weight is there again, bit by bit.
        """
        weight, amount = self._in(memory), amount.detach()
        if weight is None or not memory.written:
            return False
        if (undone := digest(amount)) in memory.written:
            memory.written.remove(undone)
        elif len(memory.written) == 1 and torch.equal(weight, (self.reconstruct(weight.dtype) + amount).to(weight.dtype)):
            memory.written.clear()
        else:
            return False
        if memory.written:
            weight -= amount
        elif memory.seal is None and not self.keeps_decoded and memory is self.variable.memory:
            self._forget()
            return True
        else:  # in its place: others may have views of it
            weight.copy_(self.reconstruct(weight.dtype))
        memory.seal = memory.seal and digest(weight)
        return True

    def keep_up(self) -> None:
        """Decode again if the packed tensors are others than those that were decoded; forget what nobody looks at any more.

        Raises:
            FormatError: if they are others, and something was written into the weight: it cannot be both.
        """
        memory, decoded = self.variable.memory, self.decoded_weight
        if decoded is None or memory.source is None:
            return
        if not self.keeps_decoded and not memory.written and not is_held_elsewhere(decoded):
            self.notice(memory)
            if not memory.written:
                self._forget()
                return
        source, found = memory.source, self._parameters
        if all(found.get(name) is tensor and mark(tensor) == noted for name, tensor, noted in source.tensors):
            return
        if self.device != source.device:  # moved by somebody who moves each tensor by itself
            return
        memory.source = self._source()
        if memory.source.digest == source.digest:
            return
        self.notice(memory)
        if memory.written:
            memory.source = source
            raise FormatError(
                "the packed tensors of a layer were changed after something was written into its weight (a merged LoRA): take "
                "that out first (unfuse_lora, unmerge_adapter), or make an ordinary model with vq4dit.dequantize(model)"
            )
        self._forget()
        if self.keeps_decoded:
            self.decode()

    def _source(self, known: bytes | None = None) -> Source:
        """What the packed tensors are now; `known` is their digest, if they were only moved."""
        packed = {name: p for name in (*self.EXACT, *self.BYTES) if (p := self._parameters.get(name)) is not None}
        for name, tensor in packed.items():
            if type(tensor) is nn.Parameter:  # somebody's own, or of a pickle
                self._parameters[name] = packed[name] = frozen(tensor.detach())
        if known is None and self.device.type != "meta":
            known = digest(*(as_bytes(p, name) if name in self.BYTES else as_scales(p, name) for name, p in packed.items()))
        tensors = tuple((name, tensor, mark(tensor)) for name, tensor in packed.items())
        return Source(tensors, self.device, known or b"")

    @property
    def is_changed(self) -> bool:
        """Whether somebody wrote into the decoded weight, so that the packed tensors no longer describe the layer."""
        self.keep_up()
        decoded = self.decoded_weight
        return decoded is not None and not torch.equal(decoded, self.reconstruct(decoded.dtype))

    def told_change(self, name: str) -> str:
        """What was done to a weight that is changed, as far as it is known, in words."""
        weight, written = self.numbers(), self.variable.memory.written
        packed = self.reconstruct(weight.dtype)
        left = float((weight.float() - packed.float()).abs().max() / packed.float().abs().max().clamp(min=1e-30))
        if written and left < ROUNDING * torch.finfo(weight.dtype).eps:
            return (
                f"the weight of {name} was changed after it was decoded, and changed back (an adapter that was merged and is "
                f"unmerged): what is left is rounding, {left:.1g} of its largest value"
            )
        if None in written:
            return f"the weight of {name} was replaced after it was decoded (by a merged LoRA or another adapter, or by hand)"
        if written:
            return f"something was added to the weight of {name} after it was decoded, which is what a merged LoRA does"
        return f"the decoded weight of {name} is not what its packed tensors say: one of the two was changed in place"

    @property
    def bits_per_weight(self) -> float:
        """Of all packed tensors in the file: codebook and scales count, the bias does not."""
        packed = {name: p for name, p in self.named_parameters() if name != "bias"}
        num_bytes = sum(p.numel() * (2 if name in self.EXACT else 1) for name, p in packed.items())
        return 8 * num_bytes / (self.in_features * self.out_features)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        if not torch.compiler.is_compiling():
            self.keep_up()
        decoded = self.decoded_weight
        weight = self.reconstruct(input.dtype) if decoded is None else decoded.to(input.dtype)
        return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))

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
    if not torch.isfinite(weight).all():
        raise FormatError(
            f"{name}: its weight is not finite, or too large for {weight.dtype}: load the model with dtype=torch.bfloat16 or "
            "torch.float32. If that was so, the file is damaged: download or quantize it again"
        )
