"""What a pipeline is asked for: prompts or classes, and how its own call is told so.

Nothing here names a family. Whatever a pipeline can be told stands in the signature of its `__call__`: `prompt` or
`class_labels`, a size, a number of frames, steps. The rest (guidance above all) is as the pipeline has it by default, unless a
person says otherwise with `call`: then that is what the model is calibrated for, and measured with.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.prompts import PROMPTS

Condition = str | int  # a prompt, or the number of a class
NULL_CLASS = 1000  # DiTPipeline asks for it where it wants no class
KINDS = {"prompt": "prompts", "class_labels": "classes"}  # arguments of pipelines that say what is wanted


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What the own call of a pipeline, or of all of a class, takes, by name, without `self`."""
    found = dict(inspect.signature(undecorated_call(_class_of(pipeline))).parameters)
    found.pop("self", None)
    return found


def _class_of(pipeline: Any) -> type:
    return pipeline if isinstance(pipeline, type) else type(pipeline)


def undecorated_call(pipeline_class: type) -> Callable[..., Any]:
    """`__call__` without `torch.no_grad`, which diffusers puts around it."""
    call = next((vars(parent)["__call__"] for parent in pipeline_class.__mro__ if "__call__" in vars(parent)), None)
    if not isinstance(call, types.FunctionType):
        raise UnsupportedModelError(f"a {pipeline_class.__name__} draws nothing: it is no pipeline of diffusers")
    return inspect.unwrap(call)


def condition_kind(pipeline: Any) -> str:
    """The argument that says what a pipeline, or all of a class, shall draw: "prompt" or "class_labels".

    Raises:
        UnsupportedModelError: if it wants neither, or needs something else as well (a picture, say).
    """
    made_for = "vq4dit samples pipelines that draw from a prompt or a class"
    advice = "choose the recipe kmeans, which needs no samples"
    name = _class_of(pipeline).__name__
    if not hasattr(pipeline, "components"):
        raise UnsupportedModelError(f"{made_for}, this is a {name}: {advice}")
    parameters = parameters_of(pipeline)
    kind = next((kind for kind in KINDS if kind in parameters), None)
    required = [other for other, parameter in parameters.items() if other != kind and _is_required(parameter)]
    if kind is None or required:
        needs = f"needs {', '.join(required)}" if required else "takes neither"
        raise UnsupportedModelError(f"{made_for}, and {name} {needs}: {advice}")
    return kind


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def num_classes(pipeline: Any) -> int:
    """Classes that have a label, or all the embedder knows but the null class; 0 for a pipeline of prompts."""
    if condition_kind(pipeline) != "class_labels":
        return 0
    if labels := getattr(pipeline, "labels", None):
        return max(labels.values()) + 1
    return pipeline.transformer.config.num_embeds_ada_norm


def knows_no_class(pipeline: Any) -> bool:
    """Whether a class-conditional model can be asked for no class, as guidance does."""
    return pipeline.transformer.config.num_embeds_ada_norm >= NULL_CLASS


def random_conditions(
    pipeline: Any, count: int, generator: torch.Generator, prompts: Sequence[str] = PROMPTS
) -> list[Condition]:
    """Classes at random, or some of the prompts: each once before one comes again."""
    if classes := num_classes(pipeline):
        return torch.randint(classes, (count,), generator=generator).tolist()
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[index] for index in order[:count]]


def read_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE as a person writes it: the value is JSON, and what is no JSON is text.

    Raises:
        ValueError: if there is no "=".
    """
    name, equals, told = text.partition("=")
    if not equals:
        raise ValueError(f"must look like NAME=VALUE, such as true_cfg_scale=3, got {text!r:.60}")
    try:
        return name, json.loads(told)
    except (ValueError, RecursionError):
        return name, told


def check_call(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the call of a pipeline, or of all of a class, has no such argument."""
    parameters = parameters_of(pipeline)
    if unknown := [name for name in call if name not in parameters]:
        raise ValueError(f"{_class_of(pipeline).__name__} takes no argument {unknown[0]!r}; it takes {', '.join(parameters)}")


def call_arguments(
    pipeline: Any,
    conditions: Sequence[Condition],
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator],
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments with which the pipeline's call draws these conditions.

    Args:
        call: what a person wants it to be told besides (`{"true_cfg_scale": 3.0}`).

    Raises:
        ValueError: if the pipeline's call has no such argument.
    """
    parameters = parameters_of(pipeline)
    check_call(pipeline, call)
    kind = condition_kind(pipeline)
    arguments: dict[str, Any] = {kind: list(conditions), "num_inference_steps": num_inference_steps, "generator": generator}
    if kind == "class_labels" and not knows_no_class(pipeline):
        arguments["guidance_scale"] = 1.0  # the pipeline could not ask for no class
    if {"height", "width"} & call.keys() and "use_resolution_binning" in parameters:
        arguments["use_resolution_binning"] = False  # it would draw another size
    arguments |= call
    arguments |= _for_every_prompt(parameters, call, len(conditions))
    return {name: value for name, value in arguments.items() if name in parameters}


def _for_every_prompt(parameters: Mapping[str, inspect.Parameter], call: Mapping[str, Any], count: int) -> dict[str, list[str]]:
    """Other texts (a negative prompt, lyrics), one of each for every prompt: some pipelines take a single one for an error."""
    lists = {name for name, parameter in parameters.items() if "list[str]" in str(parameter.annotation).lower()}
    texts = {name: parameters[name].default for name in lists} | {
        name: value for name, value in call.items() if name in lists or name == "negative_prompt"
    }
    return {name: [value] * count for name, value in texts.items() if isinstance(value, str)}


def guided_call(pipeline: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline's call is told besides conditions and seeds, with the guidance scale it takes by default."""
    parameters = parameters_of(pipeline)
    default = {"guidance_scale": parameters["guidance_scale"].default} if "guidance_scale" in parameters else {}
    return {**default, **call}
