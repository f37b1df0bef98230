"""The decoded weight of a packed layer: kept or not, written into, put away and brought back, and never out of date.

Packed tensors say what a weight is until somebody writes into it: then the layer computes with what was written, knows that
its packed tensors no longer describe it, and can take back what was added. What may have been written without a word (through
a view, NumPy, or into the packed tensors themselves) is found by a digest, and only where there was an occasion for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.errors import FormatError
from vq4dit.layers.casts import as_bytes, as_scales
from vq4dit.layers.lazy_weight import LazyWeight, Memory, Source, Variable
from vq4dit.layers.watched import digest, frozen, is_held_elsewhere, mark

ROUNDING = 16  # times a type's eps, relative to the largest weight: what some additions and subtractions leave


class HeldWeight(nn.Linear):
    """A linear layer whose `weight` is decoded from packed tensors."""

    EXACT: tuple[str, ...]  # names of packed tensors that are fp32 holding fp16 values: `.to(dtype)` leaves them alone
    BYTES: tuple[str, ...]  # names of packed tensors that are bytes, whatever type somebody gave them
    decoded_weight: Tensor | None
    keeps_decoded: bool  # what `decode` and `drop_decoded` choose
    dtype: torch.dtype  # in which the weight is decoded
    variable: Variable  # what `weight` is now

    def reconstruct(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Ŵ in `dtype`, from the packed tensors.

        Raises:
            FormatError: if they were cast to a type that does not hold their values.
        """
        raise NotImplementedError

    def decode(self, dtype: torch.dtype | None = None, name: str = "a layer") -> None:
        """Keep the decoded weight from now on; a `FormatError` tells the layer's name."""
        raise NotImplementedError

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
    def device(self) -> torch.device:
        return next(self.parameters()).device
