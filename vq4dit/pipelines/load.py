"""From a folder or a Hub id to a pipeline, with everything that can be wrong said before anything large is read.

Only safetensors are ever loaded, and no code from the repository is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn

from vq4dit.config import QuantMethod, VQ4DiTConfig
from vq4dit.denoisers import names_of_denoisers
from vq4dit.disk.json_files import AGAIN, shown
from vq4dit.errors import BROKEN, FormatError, UnsupportedModelError, VQ4DiTError, brief
from vq4dit.memory import check_memory, is_out_of_memory, out_of_memory
from vq4dit.pipelines.hub_errors import FAILURES, ask, explained
from vq4dit.pipelines.references import Lent, borrowed, loaded, read_reference
from vq4dit.pipelines.repository import (
    STEM,
    SUPPORTED,
    located,
    parts_of,
    read_header,
    read_json,
    snapshot,
    weights,
    weights_in,
)
from vq4dit.pipelines.skeleton import (
    LARGEST_NUMBER_OF_A_SCHEDULER,
    check_numbers,
    check_tensors,
    empty_model,
    empty_transformer,
    model_class,
)
from vq4dit.pipelines.trust import CONVERT, check_classes, check_weights, part_class
from vq4dit.quiet import quiet_loading

NONE_LENT: Mapping[str, Lent] = {}  # of a pipeline that holds all its parts


def pinned(model: str, revision: str | None = None, token: str | None = None) -> str | None:
    """The commit that a Hub id stands for now, so that all files come from one state of it; None for a folder.

    Raises:
        VQ4DiTError: see `read_json`.
    """
    return None if located(model) else snapshot(model, revision, token).name


def source_folder(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """Where the files of a loaded model lie: its folder, or its snapshot in the Hub's cache."""
    return located(model) or snapshot(model, revision, token)


def check_access(model: str, token: str | None = None) -> None:
    """Raise `HubError` unless this login may read a repository: gated ("request access at ...") is told from missing.

    The Hub is asked every time: what lies in a cache may have come there with somebody else's login. Folders are open.
    """
    if not located(model):
        ask(f"look at {model}", lambda: HfApi(token=token).auth_check(model), model)


def check_pipeline(model: str, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Read `model_index.json` and the transformers' `config.json`; returns that of one that is quantized, or else
    of the first.

    Raises:
        UnsupportedModelError: if the pipeline has no transformer (it says what it has instead), or names code of its own.
        FormatError: if one of the two is broken, or what is said in it of parts, classes, labels or another repository is.
    """
    index = read_json(model, "model_index.json", revision, token)
    check_index(index, f"{model}/model_index.json")
    if "transformer" not in parts_of(index):
        what = f"a {index['_class_name']} {'with a UNet' if 'unet' in index else 'without a transformer'}"
        raise UnsupportedModelError(f"{model} is {what}. {SUPPORTED}")
    check_classes(model, index)
    read_reference(index, f"{model}/model_index.json")
    configs = [_transformer_config(model, name, revision, token) for name in denoiser_parts(index)]
    return next((config for config in configs if config.get("quantization_config")), configs[0])


def _transformer_config(model: str, part: str, revision: str | None, token: str | None) -> dict[str, Any]:
    path = f"{part}/config.json"
    config = read_json(model, path, revision, token)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise FormatError(f"{model}/{path}: quantization_config must be an object, found {shown(quantization)}: {AGAIN}")
    if quantization and quantization.get("quant_method") == QuantMethod.VQ4DIT:
        VQ4DiTConfig.from_dict(quantization)
    return config


def check_index(index: dict[str, Any], path: str) -> None:
    """Raise `FormatError` unless a pipeline's class is a name, its parts are pairs of names, and its labels names of classes.

    Args:
        path: of the index, for messages.
    """
    if not isinstance(index.get("_class_name"), str) or not index["_class_name"].isidentifier():
        raise FormatError(f"{path}: _class_name must name a pipeline, found {shown(index.get('_class_name'))}: {AGAIN}")
    for name, value in index.items():
        is_part = name in ("transformer", "vae", "scheduler") or (
            isinstance(value, list) and {str, type(None)} & {*map(type, value)}
        )
        if is_part and not (name.isascii() and name.isidentifier()):  # it is the name of a folder
            raise FormatError(f"{path}: {shown(name)} cannot be the name of a part: {AGAIN}")
        is_pair = isinstance(value, list) and len(value) == 2 and (value == [None] * 2 or {*map(type, value)} == {str})
        if is_part and not is_pair:
            raise FormatError(f"{path}: {name} must be a library and a class of it, found {shown(value)}: {AGAIN}")
    labels = index.get("id2label") or {}
    if not isinstance(labels, dict):
        raise FormatError(f"{path}: id2label must be an object of numbers and names, found {shown(labels)}: {AGAIN}")
    for number, words in labels.items():
        if not (number.isascii() and number.isdecimal() and len(number) < 8 and isinstance(words, str)):
            raise FormatError(
                f'{path}: id2label must give the numbers of classes names, such as "207": "golden retriever", found '
                f"{shown(number)}: {shown(words)}. To mend it, {AGAIN}"
            )


def denoiser_parts(index: dict[str, Any]) -> list[str]:
    """The names of the parts that are transformers to quantize: `transformer`, and others of its class."""
    return names_of_denoisers(parts_of(index))


def check_files(folder: Path) -> None:
    """Raise `FormatError` if a safetensors file below `folder` is cut short or damaged. Reads headers only."""
    for path in sorted(folder.rglob("*.safetensors")):
        read_header(path)


def check_parts(folder: Path, dtype: torch.dtype, lent: Mapping[str, Lent] = NONE_LENT) -> str | None:
    """Look at everything that a pipeline in a folder describes before any of it is built.

    Args:
        lent: parts that lie elsewhere.

    Returns:
        The variant of the transformer's weights, if there are no others.

    Raises:
        FormatError: if a description is broken, describes more than its files hold, or other tensors.
        VQ4DiTError: if the weights do not fit into memory.
    """
    check_pipeline(str(folder))
    check_files(folder)
    index = read_json(str(folder), "model_index.json")
    denoisers, needed = denoiser_parts(index), 0
    for name in denoisers:
        needed += _check_transformer(folder / name, dtype)
    for name, (library, kind) in parts_of(index).items():
        if name not in denoisers and (of_part := model_class(library, kind)):
            place, among = lent.get(name, (folder / name, None))
            part = weights_in(place, STEM if library == "diffusers" else "model", among)
            empty_model(of_part, read_json(str(place), "config.json"), part, f"{place}/config.json")
            needed += part.elements * dtype.itemsize
        elif (folder / name / "scheduler_config.json").exists():
            path = f"{name}/scheduler_config.json"
            check_numbers(read_json(str(folder), path), LARGEST_NUMBER_OF_A_SCHEDULER, f"{folder}/{path}")
    check_memory(needed, f"loading {folder}")
    return weights_in(folder / denoisers[0]).variant


def _check_transformer(folder: Path, dtype: torch.dtype) -> int:
    """The same of one transformer; returns how many bytes it takes."""
    config, found = read_json(str(folder), "config.json"), weights_in(folder)
    transformer = empty_transformer(config, found, f"{folder}/config.json")
    if config.get("quantization_config"):  # its names and shapes are looked at by `VQ4DiTQuantizer`
        return 2 * found.num_bytes
    check_tensors(transformer, found.tensors, str(folder))
    return found.elements * dtype.itemsize


def _fetched(model: str, options: dict[str, Any]) -> Path:
    """A Hub repository as a folder of the cache, .../snapshots/COMMIT, with the files that a load reads."""
    try:
        return Path(DiffusionPipeline.download(model, **options))
    except FAILURES as error:
        if "safetensors" in str(error):
            raise UnsupportedModelError(f"a component of {model} has no safetensors, and {CONVERT}") from error
        raise


def load_pipeline(
    model: str, dtype: torch.dtype = torch.float32, *, revision: str | None = None, token: str | None = None
) -> Any:
    """Load an original or a quantized pipeline: diffusers tells them apart. `revision` and `token`: see `read_json`.

    Raises:
        VQ4DiTError: as `check_pipeline`, `check_weights` and `check_parts`; FormatError for a broken or newer packed file;
            HubError if a download fails.
    """
    check_pipeline(model, revision, token)
    options: dict[str, Any] = {"revision": revision, "token": token, "use_safetensors": True}
    folder = located(model)
    source = str(folder or model)
    try:
        if folder is None:
            options["variant"] = weights(model, revision=revision, token=token).variant
            folder = _fetched(model, options)
            options["revision"] = folder.name  # what is looked at now is what is loaded
        index = read_json(str(folder), "model_index.json")
        check_weights(folder, index)
        lent = _borrowed(folder, index, token)
        options["variant"] = check_parts(folder, dtype, lent)
        with quiet_loading():
            parts = {name: loaded(part, part_class(*index[name]), dtype) for name, part in lent.items()}
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, **options, **parts)
    except (*FAILURES, *BROKEN, SafetensorError) as error:
        raise _explained_load(error, model) from error
    for name, part in pipeline.components.items():
        lacking = [key for key, p in part.named_parameters() if p.is_meta] if isinstance(part, nn.Module) else []
        if lacking:
            place = lent[name].folder if name in lent else folder / name
            raise FormatError(f"{place} lacks the tensor {lacking[0]}, which its config describes: {AGAIN}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _borrowed(folder: Path, index: dict[str, Any], token: str | None) -> Mapping[str, Lent]:
    """The parts that a pipeline refers to, looked at like its own."""
    reference = read_reference(index, f"{folder}/model_index.json")
    if reference is None:
        return NONE_LENT
    lent = borrowed(reference, folder, token)
    for name, part in lent.items():
        check_weights(part.folder.parent, {name: index[name]})
        for file in part.names:
            if file.endswith(".safetensors"):
                read_header(part.folder / file)
    return lent


def _explained_load(error: BaseException, model: str) -> VQ4DiTError:
    """What others' code raised while they loaded, in our words."""
    told = explained(error, f"download {model}", model)
    if told.reason != "unknown":
        return told
    if is_out_of_memory(error):
        return VQ4DiTError(f"{model} cannot be loaded, {out_of_memory(error)}")
    return VQ4DiTError(f"{model} cannot be loaded ({brief(error)}): correct what this names, or {AGAIN}")
