"""A second device, made of the CPU: what lies there says so, and is never mixed with what lies here, as with a GPU's memory.

Operations on its tensors are done by the CPU, so results are those of here but for roundings. With `FLOAT64 = False` it
refuses float64 as Apple's GPUs do. As a program it quantizes the tiny model there and here by one recipe, and prints how far
they are apart: `python tests/support/far_device.py RECIPE [without-float64]`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
FLOAT64 = True


class Far(Tensor):
    """A tensor of the far device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = Tensor._make_wrapper_subclass(cls, near.shape, **layout, device="far:0")
        far.near = near
        return far

    def __init__(self, near: Tensor):
        pass

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, Far)
        self.near = new.near

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Far:
        return Far(inner["near"])

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return done_near(operation, args, kwargs or {})


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return done_near(operation, args, kwargs or {})


class Factories(TorchFunctionMode):
    """`torch.tensor([1], device="far")` makes its tensor before any operation is seen."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and is_far(kwargs.get("device")):
            del kwargs["device"]
            return function(*args, **kwargs).to("far")
        return function(*args, **kwargs)


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == "far"


def done_near(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Do an operation with the values of far tensors; its results are far if they were, or if that was asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Far) for tensor in tensors)
    copies = operation in (aten._to_copy.default, aten.copy_.default)
    may_mix = copies or operation in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put_.default)
    if there and not may_mix and any(tensor.dim() for tensor in tensors if not isinstance(tensor, Far)):
        raise RuntimeError(f"{operation} was given tensors of two devices")
    if operation is aten.index.Tensor and there and not isinstance(args[0], Far):
        raise RuntimeError("far indices of a near tensor")
    if (asked := kwargs.get("device")) is not None:
        there = is_far(asked)
        kwargs = {**kwargs, "device": "cpu" if there else asked}
    near = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs))
    result = operation(*near[0], **near[1])
    if operation.__name__.split(".")[0].endswith("_") or "out" in kwargs:
        return kwargs.get("out", args[0])
    return tree_map(moved, result) if there and operation is not aten._local_scalar_dense.default else result


def moved(result: Any) -> Any:
    if not isinstance(result, Tensor) or isinstance(result, Far):
        return result
    if result.dtype == torch.float64 and not FLOAT64:
        raise TypeError("this device has no float64")
    return Far(result)


def values(model: Any) -> dict[str, Tensor]:
    return {name: t.near if isinstance(t, Far) else t for name, t in model.state_dict().items()}


def report(recipe: str) -> dict[str, Any]:
    """Quantize, sample and measure on both devices; what agreed."""
    from tiny import new_pipeline, quick_settings

    import vq4dit
    from vq4dit.evaluation.images import sample
    from vq4dit.evaluation.layer_errors import layer_noise_errors
    from vq4dit.evaluation.metrics import layer_errors, noise_nmse

    def made(pipeline: Any) -> list[Any]:
        quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe, calibration={"steps": 4}))
        devices = {str(tensor.device) for tensor in quantized.transformer.state_dict().values()}
        few = {"num_trajectories": 2, "num_inference_steps": 2}
        return [
            values(quantized.transformer),
            sample(quantized, [0, 1], [3, 4], num_inference_steps=2),
            noise_nmse(pipeline, quantized, **few),
            layer_errors(pipeline.transformer, quantized.transformer),
            layer_noise_errors(pipeline, quantized, **few),
            devices,
        ]

    here = made(new_pipeline())
    with Operations(), Factories():
        there = made(new_pipeline().to("far"))
    parts = [there[4][name] / part for name, part in here[4].items()]
    return {
        "tensors": all(torch.equal(there[0][name], tensor) for name, tensor in here[0].items()),
        "images": float(abs(here[1] - there[1]).max()),  # attention is done by other operations there: not the same bits
        "noise_nmse": there[2] / here[2],
        "layer_errors": max(abs(a.relative_error - b.relative_error) for a, b in zip(here[3], there[3], strict=True)),
        "layer_noise_errors": [min(parts), max(parts)],
        "devices": sorted(there[5]),
    }


if __name__ == "__main__":
    from vq4dit import devices

    _setup_privateuseone_for_python_backend("far")
    if "without-float64" in sys.argv:
        FLOAT64 = False
        devices.WITHOUT_FLOAT64 = {"far"}
    print(json.dumps(report(sys.argv[1])))
