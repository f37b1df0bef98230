"""A model without its weights: what a config describes, built on the meta device, within what its safetensors hold.

A config of a few bytes can describe a model of any size, and whoever builds it before looking works for hours and takes all
memory. But the same folder says in a few kilobytes of headers which tensors there are. So numbers are looked at first, then
the model is built while everything that is made is counted, and then the shapes of both are compared. All this happens
before the weights are read.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vq4dit.disk.json_files import AGAIN, leaves, shown
from vq4dit.errors import BROKEN, FormatError, UnsupportedModelError, brief
from vq4dit.pipelines.repository import TensorHeader, Weights

LARGEST_TABLE = 2**22  # elements: of positions and frequencies, which are computed and not stored
LARGEST_NUMBER = 10**7  # bases of frequencies, lengths of texts
LARGEST_NUMBER_OF_A_SCHEDULER = 10**6  # it makes tables of this length
WEIGHTS_PER_BYTE = 64  # of packed files at most: an eighth of a bit per weight, where the least that is offered is two
PARAMETERS_PER_TENSOR = 2  # of a packed file, which stores once what all blocks share
MORE_PARAMETERS = 50
CALLS_PER_PARAMETER = 100  # of torch, while a module is built; about 10 are usual
UNKNOWN = Weights((), 0, {})  # nothing is known, so nothing is bounded

KINDS = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple": (list,),
    "list": (list,),
    "dict": (dict,),
}


class _Bounded(TorchFunctionMode):
    """Ends, in this thread, what makes larger tensors or more parameters, or calls torch more often, than is allowed."""

    def __init__(self, elements: int, parameters: int):
        super().__init__()
        self.elements, self.parameters, self.calls = elements, parameters, CALLS_PER_PARAMETER * parameters
        self.thread = threading.get_ident()

    def __enter__(self) -> _Bounded:
        self.handle = register_module_parameter_registration_hook(self._count)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()
        super().__exit__(*error)

    def _count(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == self.thread:
            self.parameters -= parameter is not None
            self._end(self.parameters < 0)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls -= 1
        result = func(*args, **(kwargs or {}))
        self._end(self.calls < 0 or (isinstance(result, Tensor) and result.numel() > self.elements))
        return result

    def _end(self, is_too_large: bool) -> None:
        if is_too_large:
            raise TooLarge


class TooLarge(Exception):
    """What is built outgrows what the files hold."""


def model_class(library: str, name: str) -> Any | None:
    """The class of a part that has weights, if it is one of diffusers or transformers."""
    if library not in ("diffusers", "transformers") or not name.isidentifier():
        return None
    found = getattr(importlib.import_module(library), name, None)
    is_model = isinstance(found, type) and issubclass(found, nn.Module) and found.__name__ == name
    return found if is_model and hasattr(found, "from_pretrained") else None


def empty_transformer(config: dict[str, Any], weights: Weights = UNKNOWN, path: str = "its config.json") -> nn.Module:
    """The transformer of a config on the meta device: all shapes, no weights.

    Args:
        weights: what its files hold, so that no config can describe more. Unknown for configs of our own.
        path: of the config, for messages.

    Raises:
        UnsupportedModelError: if diffusers has no class of that name; FormatError if nothing can be built from the config, or
            more than the files hold.
    """
    name = config.get("_class_name")
    found = model_class("diffusers", name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"the transformer's class {shown(name)} is not in diffusers {diffusers.__version__}: upgrade it"
        )
    return empty_model(found, config, weights, path)


def empty_model(kind: Any, config: dict[str, Any], weights: Weights, path: str) -> nn.Module:
    """The same of any part, whose class is `kind`."""
    elements = WEIGHTS_PER_BYTE * weights.num_bytes if config.get("quantization_config") else weights.elements
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    bounded = _Bounded(max(elements, LARGEST_TABLE), PARAMETERS_PER_TENSOR * len(weights.tensors) + MORE_PARAMETERS)
    if weights is UNKNOWN:
        bounded, elements = _Bounded(sys.maxsize, sys.maxsize), sys.maxsize
    check_numbers(plain, max(elements, LARGEST_NUMBER), path)
    if misplaced := [name for name, value in plain.items() if _is_misplaced(kind, name, value)]:
        raise FormatError(f"{path}: {misplaced[0]} cannot be {shown(plain[misplaced[0]])}: correct it, or {AGAIN}")
    try:
        with torch.device("meta"), bounded:
            model = kind.from_config(plain) if hasattr(kind, "from_config") else kind(kind.config_class.from_dict(plain))
    except TooLarge as error:
        raise FormatError(_too_large(plain, weights, path)) from error
    except BROKEN as error:
        told = ", ".join([*_suspects(kind, plain), brief(error)])
        raise FormatError(f"{path} describes no {kind.__name__} that can be built ({told}): correct it, or {AGAIN}") from error
    if sum(p.numel() for p in model.parameters()) > max(2 * elements, LARGEST_TABLE):
        raise FormatError(_too_large(plain, weights, path))
    return model


def empty_pipeline(kind: Any, **parts: nn.Module) -> Any:
    """A pipeline of these parts and no others: it knows what it computes from their configs, such as scales and sizes."""
    parameters = dict(inspect.signature(kind.__init__).parameters)
    parameters.pop("self")
    missing = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
    return kind(**missing | {name: part for name, part in parts.items() if name in parameters})


def _is_misplaced(kind: Any, name: str, value: Any) -> bool:
    """Whether text or an object stands where a class takes a number, which it may find out late, or never."""
    parameter = inspect.signature(kind.__init__).parameters.get(name)
    is_number = parameter is not None and type(parameter.default) in (bool, int, float)
    return is_number and isinstance(value, str | dict)


def check_numbers(config: dict[str, Any], largest: int, path: str) -> None:
    """Raise `FormatError` if a number of a config is not one, or a whole one larger than `largest`."""
    for _, name, value in leaves(config):
        if isinstance(value, float) and math.isnan(value):
            raise FormatError(f"{path}: {name} must be a number, found {value}: {AGAIN}")
        if isinstance(value, int) and abs(value) > largest:
            raise FormatError(
                f"{path}: {name} is {shown(value)}, and nothing in a model whose files are of this size is larger than "
                f"{largest}: {AGAIN}"
            )


def _too_large(config: dict[str, Any], weights: Weights, path: str) -> str:
    numbers = {name: value for _, name, value in leaves(config) if isinstance(value, int)}
    largest = max(numbers, key=numbers.__getitem__, default="")
    return (
        f"{path} describes a larger model than the {len(weights.tensors)} tensors ({weights.num_bytes / 1e6:.2f} MB) beside it "
        f"hold, the largest number is {largest}={shown(numbers.get(largest))}: the files do not belong together; {AGAIN}"
    )


def _suspects(kind: Any, config: dict[str, Any]) -> Iterator[str]:
    """Entries that are not what the class says it takes, and then those that may be wrong: words, and what is not positive."""
    parameters = inspect.signature(kind.__init__).parameters
    doubtful = []
    for name, value in config.items():
        if name not in parameters or value == (default := parameters[name].default):
            continue
        said = f"{parameters[name].annotation} {type(default).__name__}".lower()
        kinds = tuple(python for word, found in KINDS.items() if re.search(rf"\b{word}\b", said) for python in found)
        if value is None and default is not None and kinds and "none" not in said and "optional" not in said:
            yield f"{name} is null"
        elif value is not None and kinds and (not isinstance(value, kinds) or (value in (True, False) and bool not in kinds)):
            yield f"{name} is {shown(value)}"
        elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and value < 1):
            doubtful.append(f"{name} is {shown(value)}")
    yield from doubtful


def check_tensors(model: nn.Module, tensors: dict[str, TensorHeader], where: str) -> None:
    """Raise `FormatError` unless every parameter of a model is in its files in the same shape, and no layer has more there.

    Args:
        where: the folder or repository of the files, for messages.
    """
    for name, parameter in model.named_parameters():
        if name not in tensors:
            raise FormatError(f"{where} lacks the tensor {name}, which its config describes: {AGAIN}")
        if tensors[name].shape != tuple(parameter.shape):
            raise FormatError(
                f"{where}: the tensor {name} has the shape {list(tensors[name].shape)}, and its config describes "
                f"{list(parameter.shape)}: the files do not belong together; {AGAIN}"
            )
    modules, known = dict(model.named_modules()), {*dict(model.named_parameters()), *dict(model.named_buffers())}
    for name in sorted(tensors.keys() - known):
        parts = name.split(".")
        nearest = next(depth for depth in range(len(parts) - 1, -1, -1) if ".".join(parts[:depth]) in modules)
        if isinstance(modules[".".join(parts[:nearest])], nn.ModuleList | nn.Linear):  # others keep what nobody reads any more
            raise FormatError(
                f"{where} holds the tensor {name}, for which its config has no place: the files do not belong together; {AGAIN}"
            )
