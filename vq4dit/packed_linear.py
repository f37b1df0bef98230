"""A linear layer whose weight is held as packed bytes, whatever is in them.

A layer can keep its decoded weight beside the packed bytes (`decode`: as fast as the original) or look the weight up in every
forward pass (`drop_decoded`: as small as the file). The packed tensors are what is saved, always, and nothing that is done to
a model's types changes what they say.

Somebody may write into the weight: a LoRA that is merged does. Then the layer computes with what was written, knows that its
packed tensors no longer describe it, and can take back what was added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vq4dit.casts import as_bytes
from vq4dit.errors import FormatError
from vq4dit.lazy_weight import LazyWeight

ROUNDING = 16  # times a type's eps, relative to the largest weight: what some additions and subtractions leave


class Written(NamedTuple):
    """What was done to a decoded weight: something was added (by two sums that tell it from others), or all of it replaced."""

    added: tuple[float, float] | None


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
    written: list[Written]  # since it was decoded

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
        self.keeps_decoded, self.written = False, []
        self.register_buffer("decoded_weight", None, persistent=False)
        bias_values = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", frozen(bias_values) if bias else None)

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
        self.dtype = dtype or self.dtype
        with torch.inference_mode(False):  # a model may be loaded there and trained (beside an adapter) elsewhere
            self.decoded_weight = self.reconstruct(self.dtype)
        self.keeps_decoded, self.written = True, []

    def drop_decoded(self) -> None:
        """Forget the decoded weight; every forward pass looks it up again."""
        self.decoded_weight, self.keeps_decoded, self.written = None, False, []

    @property
    def weight(self) -> Tensor:
        """(rows, columns): what `forward` multiplies by, decoded if somebody asks for its numbers."""
        decoded = self.decoded_weight
        return LazyWeight(self, self.dtype if decoded is None else decoded.dtype, self.device)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if isinstance(value, LazyWeight):
            if value.layer is self:  # PEFT gives a layer its own weight back
                return
            value = value.layer.numbers()
        if value.shape != (shape := (self.out_features, self.in_features)):
            raise ValueError(f"the weight of this layer is {shape[0]} x {shape[1]}, got {tuple(value.shape)}")
        self.was_written(value, None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would make a parameter of it
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def numbers(self) -> Float[Tensor, "rows columns"]:
        """The weight as it is used now: what was kept or written, or decoded for once."""
        if self.decoded_weight is not None:
            return self.decoded_weight
        with torch.inference_mode(False):
            return self.reconstruct(self.dtype)

    def was_written(self, weight: Float[Tensor, "rows columns"], added: Tensor | None) -> None:
        """Use this weight from now on, in which something was `added` or (None) all may have changed."""
        self.decoded_weight = weight.detach()  # what is merged may know how it was learned
        self.written.append(Written(None if added is None else _sums(added)))

    def takes_back(self, amount: Tensor) -> bool:
        """Subtract something that was added before; False, and nothing done, if it was not.

        (w + δ) - δ is not w in floating point. So that a LoRA that was fused and is unfused leaves nothing behind, it is known
        what was added: once all of it is taken back the packed weight is there again, bit by bit.
        """
        if self.decoded_weight is None or not self.written:
            return False
        amount, dtype = amount.detach(), self.decoded_weight.dtype
        undone = Written(_sums(amount))
        if undone in self.written:
            self.written.remove(undone)
        elif len(self.written) == 1 and torch.equal(self.decoded_weight, self.reconstruct(dtype) + amount):
            self.written.clear()
        else:
            return False
        if self.written:
            self.decoded_weight -= amount
        elif self.keeps_decoded:
            self._keep_decoded(dtype)
        else:
            self.drop_decoded()
        return True

    @property
    def is_changed(self) -> bool:
        """Whether somebody wrote into the decoded weight, so that the packed tensors no longer describe the layer."""
        decoded = self.decoded_weight
        return decoded is not None and not torch.equal(decoded, self.reconstruct(decoded.dtype))

    def told_change(self, name: str) -> str:
        """What was done to a weight that is changed, as far as it is known, in words."""
        weight = self.numbers()
        packed = self.reconstruct(weight.dtype)
        left = float((weight.float() - packed.float()).abs().max() / packed.float().abs().max().clamp(min=1e-30))
        if self.written and left < ROUNDING * torch.finfo(weight.dtype).eps:
            return (
                f"the weight of {name} was changed after it was decoded, and changed back (an adapter that was merged and is "
                f"unmerged): what is left is rounding, {left:.1g} of its largest value"
            )
        if any(written.added is None for written in self.written):
            return f"the weight of {name} was replaced after it was decoded (by a merged LoRA or another adapter, or by hand)"
        if self.written:
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
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dtype = self.dtype if dtype.itemsize < 2 else dtype
        self.decoded_weight = None if decoded is None else self._applied(fn, decoded)
        return self

    def _applied(self, fn: Callable[[Tensor], Tensor], decoded: Tensor) -> Tensor:
        told = fn(decoded[:0])
        if told.dtype == decoded.dtype:
            return fn(decoded)
        if told.dtype.itemsize < 2:
            return decoded.to(told.device)
        if self.written or told.device.type == "meta":
            return fn(decoded)
        return self.reconstruct(told.dtype)  # rounded once, as if it had been decoded so

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Other packed tensors are another weight: what was decoded or written before is not it."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if not any(f"{prefix}{name}" in state_dict for name in (*self.EXACT, *self.BYTES)):
            return
        if self.keeps_decoded and self.device.type != "meta":
            self.decode(None, prefix.removesuffix("."))
        else:
            self.drop_decoded()


def check_weight(weight: Float[Tensor, "rows columns"], name: str) -> None:
    """Raise `FormatError` if a decoded weight is not finite: scales may multiply to more than a type holds."""
    if not torch.isfinite(weight).all():
        raise FormatError(
            f"{name}: its weight is not finite, or too large for {weight.dtype}: load the model with dtype=torch.bfloat16 or "
            "torch.float32. If that was so, the file is damaged: download or quantize it again"
        )


def _sums(values: Tensor) -> tuple[float, float]:
    """Two numbers that tell what was added once from everything else that might be taken away."""
    values = values.detach().double()
    return values.sum().item(), values.square().sum().item()


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
