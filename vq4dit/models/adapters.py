"""Adapters of PEFT beside the layers of a model: LoRA and its kind.

PEFT puts a wrapper in the place of a linear layer, which becomes its `base_layer`. A model with wrappers has other names in its
state dict, and computes something else than its own weights say.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def adapter_layers(model: nn.Module, *, empty: bool = False) -> dict[str, Any]:
    """PEFT's wrappers in a model, by name: those with an adapter, or those whose adapters were all deleted."""
    if sys.modules.get("peft") is None:  # nobody can have attached one
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: wrapper for name, wrapper in wrappers.items() if empty != bool(adapter_names(wrapper))}


def adapter_names(wrapper: Any) -> list[str]:
    """The adapters of one wrapper."""
    places: list[Any] = [getattr(wrapper, name, None) for name in (*wrapper.adapter_layer_names, *wrapper.other_param_names)]
    return sorted({name for place in places if hasattr(place, "keys") for name in place.keys()})
