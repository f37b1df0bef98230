"""Further arguments of a pipeline's call as a person writes them into a field: NAME=VALUE, one a line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from vq4dit.config import CallValue, QuantizationSettings
from vq4dit.models.conditions import check_call, parameters_of, read_argument

FITS: dict[type, set[Any]] = {bool: {bool}, int: {int, float}, float: {float}, str: {str}}  # what takes such a value


def read_call(text: str) -> dict[str, CallValue]:
    """The arguments in such lines. A value is JSON, and what is no JSON is text.

    Raises:
        ValueError: if a line is no NAME=VALUE, names an argument twice or one that is not to be chosen, or its value is a list.
    """
    call: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, told = (part.strip() for part in line.partition("="))
        if not equals or name in call:
            raise ValueError(f"further arguments are NAME=VALUE, one a line and each once, got {line!r:.60}")
        name, call[name] = read_argument(f"{name}={told}")
        if isinstance(call[name], list | dict):
            raise ValueError(f"further arguments are texts, numbers, true, false or null, got {line!r:.60}")
    return QuantizationSettings(call=call).call_arguments


def written(call: Mapping[str, CallValue]) -> list[str]:
    """The lines of some arguments, as `read_call` reads them."""
    return [f"{name}={json.dumps(value)}" for name, value in call.items()]


def check_fitting(pipeline_class: type, call: Mapping[str, CallValue]) -> None:
    """Raise `ValueError` unless the call of these pipelines takes such arguments: by their names, and by their types."""
    check_call(pipeline_class, call)
    for name, value in call.items():
        said = parameters_of(pipeline_class)[name].annotation
        kinds = get_args(said) if get_origin(said) in (Union, UnionType) else (said,)
        is_told = said is not inspect.Parameter.empty and all(isinstance(kind, type) or get_origin(kind) for kind in kinds)
        if is_told and value is not None and not FITS[type(value)] & set(kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind in (str, int, float, bool)) or "more than one value"
            raise ValueError(f"{name} of {pipeline_class.__name__} takes {wanted}, got {value!r:.60}")
