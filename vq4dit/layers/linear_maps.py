"""Layers that multiply their inputs by a matrix: linear layers, and 1x1 convolutions, which are linear layers over channels.

A convolution whose kernel is one position wide takes each position's channels x to W x + b, as a linear layer takes each
token's. Its weight (rows, columns, 1, ...) is the same matrix (rows, columns); only the inputs lie otherwise, channels before
positions. All the rest of this library knows matrices (rows, columns) and inputs (..., columns).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LinearMap = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAST = -1  # the dimension of a linear layer's inputs that holds what it multiplies
CONVOLUTIONS: dict[int, type[Any]] = {-2: nn.Conv1d, -3: nn.Conv2d, -4: nn.Conv3d}  # by that dimension
PRODUCTS: dict[int, Callable[..., Tensor]] = {LAST: F.linear, -2: F.conv1d, -3: F.conv2d, -4: F.conv3d}


def is_linear_map(module: nn.Module) -> TypeGuard[LinearMap]:
    """Whether a module multiplies each token, or the channels of each position, by its weight, and does nothing else."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    is_plain = type(module).forward is CONVOLUTIONS[channel_dim(module)].forward and module.groups == 1
    padding = (0,) if module.padding in ("valid", "same") else module.padding
    return is_plain and {*module.kernel_size, *module.stride} == {1} and {*padding} == {0}


def channel_dim(module: nn.Module) -> int:
    """Which dimension of a layer's inputs its matrix multiplies."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LAST - len(module.kernel_size)
    return getattr(module, "channel_dim", LAST)


def matrix_shape(module: Any) -> tuple[int, int]:
    """(rows, columns): outputs and inputs."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.out_channels, module.in_channels
    return module.out_features, module.in_features


def matrix_of(module: Any) -> Float[Tensor, "rows columns"]:
    """The weight as a matrix."""
    return module.weight.detach().view(matrix_shape(module)) if channel_dim(module) != LAST else module.weight.detach()


def tokens_of(module: nn.Module, values: Tensor) -> Float[Tensor, "*batch columns"]:
    """Inputs, outputs or their gradients, with what the matrix multiplies last: (n, positions, channels) of a convolution."""
    dim = channel_dim(module)
    return values if dim == LAST else values.movedim(dim, LAST).flatten(1, -2)


def multiply(
    input: Tensor, weight: Float[Tensor, "rows columns"], bias: Float[Tensor, " rows"] | None, channel_dim: int = LAST
) -> Tensor:
    """W x + b for each token, or at each position."""
    return PRODUCTS[channel_dim](input, weight.reshape(*weight.shape, *(1,) * (LAST - channel_dim)), bias)


def put_layer(model: nn.Module, name: str, layer: Any) -> None:
    """Let a quantized layer take the place of one that multiplies by a matrix, and read its inputs as that one does."""
    layer.channel_dim = channel_dim(model.get_submodule(name))
    model.set_submodule(name, layer)


def ordinary_layer(rows: int, columns: int, channel_dim: int, bias: bool) -> LinearMap:
    """A layer of that kind without numbers (on the meta device)."""
    if channel_dim == LAST:
        return nn.Linear(columns, rows, bias=bias, device="meta")
    return CONVOLUTIONS[channel_dim](columns, rows, 1, bias=bias, device="meta")
