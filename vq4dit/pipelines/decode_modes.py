"""When packed layers are decoded: once, and kept so, or in every forward pass, or as memory allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from vq4dit.layers.packed import PackedLinear
from vq4dit.memory import available_memory
from vq4dit.models.adapters import adapter_layers
from vq4dit.models.blocks import parts_of

DECODE_MODES = ("auto", "load", "forward")
chosen_mode: ContextVar[str] = ContextVar("decode_mode", default="auto")


def _check_mode(mode: str) -> None:
    if mode not in DECODE_MODES:
        raise ValueError(f"decode mode must be one of {DECODE_MODES}, got {mode!r}")


@contextmanager
def decode_mode(mode: str) -> Iterator[None]:
    """Choose when models loaded inside this block are decoded.

    "load": once, at load; as fast as the original. "forward": in every forward pass; memory as small as the file.
    "auto" (the default): at load if the decoded weights fit in half of the memory that is free, and again by the memory of
    another device when the model is moved there.

    The choice holds in the thread that made it: a thread that is started here has the default, and chooses for itself.
    """
    _check_mode(mode)
    token = chosen_mode.set(mode)
    try:
        yield
    finally:
        chosen_mode.reset(token)


class Room:
    """Whether all decoded weights of a model fit in half of the memory that is free, asked wherever the model comes."""

    def __init__(self, layers: Collection[PackedLinear], dtype: torch.dtype | None = None):
        self._needed = sum(layer.in_features * layer.out_features * (dtype or layer.dtype).itemsize for layer in layers)
        self._last: tuple[torch.device, bool] | None = None  # one answer for all layers that come together

    def suffices(self, device: torch.device) -> bool:
        if self._last is None or self._last[0] != device:
            self._last = device, self._needed <= available_memory(device) / 2
        return self._last[1]


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def set_decode_mode(model: Any, mode: str, dtype: torch.dtype | None = None) -> None:
    """Switch a loaded model between decoded (`"load"`) and packed (`"forward"`) layers; see `decode_mode`.

    Whatever was written into weights (a merged LoRA) is forgotten: they are what the packed tensors say again.

    Args:
        model: a model, or a pipeline: then all of its parts.
        dtype: of the decoded weights; None is that of each layer.

    Raises:
        ValueError: if there is no such mode, or an adapter that is still attached is fused: it would be taken out again later.
    """
    _check_mode(mode)
    for part in parts_of(model):
        layers = packed_layers(part)
        if fused := sorted({adapter for wrapper in adapter_layers(part).values() for adapter in wrapper.merged_adapters}):
            raise ValueError(
                f"the adapter {', '.join(fused)} is fused into this model: take it out first (unfuse_lora, unmerge_adapter), "
                "or keep it for good (unload_lora, merge_and_unload)"
            )
        room = Room(layers.values(), dtype) if mode == "auto" else None
        for name, layer in layers.items():
            layer.room = room
            if layer.device.type == "meta" or mode == "forward" or (room and not room.suffices(layer.device)):
                layer.drop_decoded()
            else:
                layer.decode(dtype, name)
