"""What of a stranger's model may be loaded: weights in safetensors, through classes that diffusers and transformers bring.

A pipeline's JSON files are instructions: `model_index.json` names modules to import, an index names files to open, a
component's config may name code or weights elsewhere. Whatever is not safetensors may be a pickle, a pickle is a program. So
before anything is loaded, both are read here and everything is refused that would run, or open, something of the author's own.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers

from vq4dit.disk.json_files import AGAIN, read_object, shown
from vq4dit.errors import FormatError, UnsupportedModelError
from vq4dit.pipelines.repository import shard_names

OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf", ".flashpack"}
NO_CODE = "no code of a model's author is run here"
CONVERT = "nothing else is loaded here because other formats can run code: convert it, or take a model that has safetensors"


def check_classes(model: str, index: dict[str, Any]) -> None:
    """Raise `UnsupportedModelError` unless a `model_index.json` names only classes of diffusers and transformers.

    Args:
        model: what it is called in the message.
        index: its content.
    """
    name = index.get("_class_name")
    pipeline = pipeline_class(name)
    _check_installed(model, name, pipeline)
    if not _is_class(pipeline, diffusers.DiffusionPipeline):
        raise UnsupportedModelError(
            f"the pipeline of {model}, {shown(name)}, is not in diffusers {diffusers.__version__}, and {NO_CODE}: upgrade "
            "diffusers, or take another model"
        )
    if pipeline._load_connected_pipes:
        raise UnsupportedModelError(
            f"{model} is a {name}, which loads other repositories with it: take a model that is whole by itself"
        )
    parameters = inspect.signature(pipeline.__init__).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty} | set(pipeline._optional_components)
    for part, value in index.items():
        if part.startswith("_") or value == [None, None]:  # a component that is left out
            continue
        is_named = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
        if is_named:
            _check_installed(f"the {part} of {model}", value[1], part_class(*value))
        if is_named and not _is_known(*value) or not is_named and part in required:
            raise UnsupportedModelError(
                f"the {part} of {model} is said to be {shown(value)}, which neither diffusers nor transformers has, and "
                f"{NO_CODE}: take another model"
            )


def pipeline_class(name: Any) -> Any:
    """What diffusers has under the name of a pipeline, or None: a class, once `check_classes` has looked at the model."""
    return getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None


def _check_installed(what: str, name: Any, found: Any) -> None:
    """Raise `UnsupportedModelError` if this only stands for a class: a package that it needs is not installed."""
    needed = getattr(found, "_backends", ()) if type(found).__name__ == "DummyObject" else ()
    if missing := " ".join(package for package in needed if not find_spec(package)):
        raise UnsupportedModelError(
            f"{what} is a {name}, which needs packages that are not installed here: pip install {missing}"
        )


def part_class(library: str, name: str) -> Any:
    """What diffusers would take for this class, or None."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    if library == "diffusers":
        return getattr(diffusers, name, None)
    if library == "transformers":
        return getattr(importlib.import_module(library), name, None) if find_spec(library) else None
    package = getattr(sys.modules["diffusers.pipelines"], library, None) if library.isidentifier() else None
    found = getattr(package, name, None) if isinstance(package, ModuleType) else None
    return found if getattr(found, "__module__", "").startswith("diffusers.pipelines.") else None


def _is_known(library: str, name: str) -> bool:
    """Whether this is a class of a model, scheduler, tokenizer or processor that diffusers would load, and no base of such."""
    kinds = [diffusers.ModelMixin, diffusers.SchedulerMixin]
    return _is_class(part_class(library, name), *kinds, *(_kinds_of_transformers() if library != "diffusers" else ()))


def _kinds_of_transformers() -> list[type]:
    """What diffusers loads of transformers. (A class that lacks a package here is none of them.)"""
    if not find_spec("transformers"):
        return []
    transformers = importlib.import_module("transformers")
    names = ("PreTrainedModel", "PreTrainedTokenizerBase", "ProcessorMixin", "FeatureExtractionMixin", "ImageProcessingMixin")
    return [getattr(transformers, name) for name in names if hasattr(transformers, name)]


def _is_class(found: Any, *bases: type) -> bool:
    return isinstance(found, type) and issubclass(found, bases) and found not in bases


def check_weights(folder: Path, index: dict[str, Any]) -> None:
    """Raise `VQ4DiTError` if loading a component of the pipeline in `folder` would open anything but its own safetensors.

    Args:
        index: the content of its `model_index.json`.
    """
    for part, value in index.items():
        if part.startswith("_") or not part.isidentifier() or not (folder / part).is_dir():
            continue
        names = sorted(path.name for path in (folder / part).iterdir())
        for name in names:
            if ".safetensors.index." in name and name.endswith(".json"):
                _check_shards(folder, f"{part}/{name}")
        others = [name for name in names if Path(name).suffix in OTHER_WEIGHTS]
        if others and not any(name.endswith(".safetensors") for name in names):
            raise UnsupportedModelError(f"{folder} has no safetensors in {part}/, only {others[0]}, and {CONVERT}")
        if isinstance(value, list) and value[:1] == ["transformers"]:
            _check_transformers(folder, part, names, str(value[-1]))


def _check_shards(folder: Path, place: str) -> None:
    """An index of shards: a map from tensors to safetensors files beside it."""
    path = folder / place
    for shard in shard_names(read_object(path), str(path)):
        if not path.with_name(shard).is_file():
            raise FormatError(f"{path} names {shard}, and there is no such file: {AGAIN}")


def _check_transformers(folder: Path, part: str, names: list[str], class_name: str) -> None:
    """What transformers would do besides reading weights and configs: take an adapter from anywhere, or run code."""
    refused = f"and {NO_CODE}: take a model whose {part} is whole and plain"
    if "adapter_config.json" in names:
        raise UnsupportedModelError(
            f"the {part} of {folder} is an adapter to a model elsewhere (adapter_config.json), {refused}"
        )
    for name in names:
        if not name.endswith("config.json"):
            continue
        config = read_object(folder / part / name)
        weights = config.get("transformers_weights")
        if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
            raise UnsupportedModelError(f"{folder / part / name} names weights that are no safetensors, and {CONVERT}")
        kernels = [config.get(key) for key in ("attn_implementation", "_attn_implementation")]
        if any("/" in str(kernel) for kernel in kernels):
            raise UnsupportedModelError(f"{folder / part / name} names kernels to download ({shown(kernels)}), {refused}")
        if config.get("auto_map") and (class_name.startswith("Auto") or class_name.endswith("Processor")):
            raise UnsupportedModelError(f"{folder / part / name} names code of its own (auto_map), {refused}")
