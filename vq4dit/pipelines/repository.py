"""A pipeline as files: in a folder, or in a repository of the Hub. Descriptions and headers are read here, weights are not.

A part of a pipeline may have several sets of weights: one file or shards, and variants of both (`.fp16`). diffusers loads one
set of them: the shards that an index names, else the single file. `weights` tells which, and what its headers say, so that
sizes are those of the files that count, and what a config promises can be held against what is there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, parse_safetensors_file_metadata
from huggingface_hub.errors import HFValidationError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from vq4dit.disk.json_files import AGAIN, read_object, shown
from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError
from vq4dit.pipelines.hub_errors import FAILURES, explained

SUPPORTED = "vq4dit quantizes pipelines with a diffusion transformer, such as facebook/DiT-XL-2-256"
OFFLINE = ("network", "offline")  # reasons for which a copy in the cache will do
SHARD = re.compile(r"[\w][\w.-]*\.safetensors")
STEM = "diffusion_pytorch_model"  # of the files that diffusers writes; transformers calls them "model"
OWNER_AND_NAME = r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}"
PREFERRED = (None, "fp32", "bf16", "fp16")  # variants, the most exact first


class TensorHeader(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str  # "F16"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The safetensors of one part that are loaded, by their headers."""

    files: tuple[str, ...]  # names in the part's folder
    num_bytes: int
    tensors: dict[str, TensorHeader]
    variant: str | None = None

    @property
    def elements(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def hub_id(text: str) -> str:
    """`owner/name` of a model's page on the Hub, as an address bar has it; anything else as it is."""
    hub = re.escape(constants.ENDPOINT.partition("//")[2])
    page = re.compile(rf"(https?://)?({hub}|(www\.)?huggingface\.co|hf\.co)/(?P<id>{OWNER_AND_NAME})(/tree/main)?/?([?#].*)?")
    found = page.fullmatch(text.strip())
    return found["id"] if found else text


def located(model: str) -> Path | None:
    """The folder that a model's name stands for, or None if it may be a Hub id.

    Raises:
        VQ4DiTError: if it is a file, or may not be looked at.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        if not path.exists():
            return None
    except (OSError, RuntimeError, ValueError) as error:  # of the file system; no home; no name at all
        raise VQ4DiTError(f"{shown(model)} cannot be opened ({error}): check the path and who may read it") from error
    raise VQ4DiTError(
        f"{model} is a file, and a pipeline is a folder with a model_index.json: name the folder (of a single checkpoint file "
        "diffusers makes one with `from_single_file` and `save_pretrained`)"
    )


def read_json(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """A JSON file of a pipeline folder or Hub repository.

    Args:
        revision: a commit, branch or tag of the repository; None is its main branch.
        token: of the login that may read it; None is huggingface_hub's own login, if there is one.

    Raises:
        VQ4DiTError: if there is no such folder or repository, it has no such file, or the Hub cannot be reached; HubError
            if the Hub refuses: it is gated, private or missing; FormatError if the file is broken.
    """
    folder = located(model)
    path = folder / filename if folder else Path(download(model, filename, revision, token))
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UnsupportedModelError(
            f"{model} has no {filename}: it is no diffusers pipeline folder (one that `save_pretrained` wrote). {SUPPORTED}"
        ) from error


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that a pipeline has, of a checked `model_index.json`: library and class by name."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (value[0], value[1]) for name, value in pairs.items() if all(isinstance(word, str) for word in value)}


def download(model: str, filename: str, revision: str | None = None, token: str | None = None) -> str:
    """The path in the cache of a file of a repository; see `read_json` for what can go wrong."""
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise VQ4DiTError(
            f"there is no folder {model}, and it is no Hub id either (those look like owner/name): check the path"
        )
    try:
        return hf_hub_download(model, filename, revision=revision, token=token)
    except HFValidationError as error:
        raise VQ4DiTError(f"{model} is neither a folder nor a Hub id: {error}") from error
    except FAILURES as error:
        told = explained(error, f"read {filename} of {model}", model)
        if told.reason not in OFFLINE:
            raise told from error
        raise VQ4DiTError(
            f"there is no folder {model}, and the Hugging Face Hub cannot be reached to look for a repository of that name: "
            "check the path or the network"
        ) from error


def snapshot(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a repository's copy in the cache, which holds `model_index.json` and whatever else was ever asked for."""
    return Path(download(model, "model_index.json", revision, token)).parent  # .../snapshots/COMMIT/model_index.json


def file_sizes(model: str, revision: str | None = None, token: str | None = None) -> dict[str, int]:
    """The files in the folders of a pipeline's parts, and their bytes. Without a network, those of a copy in the cache.

    Raises:
        VQ4DiTError: as `read_json`.
    """
    folder = located(model)
    if folder is None:
        try:
            info = HfApi(token=token).model_info(model, revision=revision, files_metadata=True)
            return {file.rfilename: file.size or 0 for file in info.siblings or ()}
        except FAILURES as error:
            told = explained(error, f"look at the files of {model}", model)
            if told.reason not in OFFLINE:
                raise told from error
            folder = snapshot(model, revision, token)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.glob("*/*") if path.is_file()}


def weights(model: str, part: str = "transformer", revision: str | None = None, token: str | None = None) -> Weights:
    """The safetensors of a part that are loaded, by their headers. Without a network, those of a copy in the cache.

    Raises:
        VQ4DiTError: if there are none, or the Hub refuses; FormatError if an index or a file is damaged.
    """
    folder = located(model)
    if folder is None:
        try:
            return _weights_on_the_hub(model, part, revision, token)
        except SafetensorsParsingError as error:
            raise FormatError(f"{model} has a damaged safetensors file ({error}): take another") from error
        except FAILURES as error:
            told = explained(error, f"read the headers of {model}", model)
            folder = snapshot(model, revision, token) if told.reason in OFFLINE else None
            if folder is None or not (folder / part).is_dir():
                raise told from error
    return weights_in(folder / part)


def weights_in(folder: Path, stem: str = STEM, among: Iterable[str] | None = None) -> Weights:
    """The same of a folder with the files of one part, or of those `among` them."""
    try:
        names = [path.name for path in folder.iterdir()] if among is None else list(among)
    except OSError as error:
        raise FormatError(f"{folder} cannot be read ({error.strerror}): check who may read it, or {AGAIN}") from error
    files, variant = choose(names, str(folder), lambda name: read_object(folder / name), stem)
    headers = [read_header(folder / name) for name in files]
    num_bytes = sum((folder / name).stat().st_size for name in files)
    return Weights(files, num_bytes, _joined(headers), variant)


def _weights_on_the_hub(model: str, part: str, revision: str | None, token: str | None) -> Weights:
    names = [name.removeprefix(f"{part}/") for name in HfApi(token=token).list_repo_files(model, revision=revision)]
    files, variant = choose(names, f"{model}/{part}", lambda name: read_json(model, f"{part}/{name}", revision, token))
    found = [parse_safetensors_file_metadata(model, f"{part}/{name}", revision=revision, token=token) for name in files]
    headers = [{name: TensorHeader(t.dtype, tuple(t.shape)) for name, t in file.tensors.items()} for file in found]
    num_bytes = sum(max((t.data_offsets[1] for t in file.tensors.values()), default=0) for file in found)
    return Weights(files, num_bytes, _joined(headers), variant)


def _joined(headers: Iterable[dict[str, TensorHeader]]) -> dict[str, TensorHeader]:
    return {name: tensor for header in headers for name, tensor in header.items()}


def choose(
    names: Iterable[str], where: str, read: Callable[[str], dict[str, Any]], stem: str = STEM
) -> tuple[tuple[str, ...], str | None]:
    """Which of a part's files are loaded, and of which variant: without one if possible, shards before a single file.

    Args:
        where: the part, for messages.
        read: reads an index.

    Raises:
        VQ4DiTError: if there are no safetensors; FormatError if an index is broken, or names what is no such file.
    """
    present = set(names)
    indices = _by_variant(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", present)
    singles = _by_variant(rf"{stem}(?:\.(\w+))?\.safetensors", present)
    variants = sorted(indices.keys() | singles.keys(), key=_preference)
    if not variants:
        model, _, part = where.rpartition("/")
        raise VQ4DiTError(
            f"{model} has no safetensors in {part}/ ({stem}.safetensors, or an index and its shards; a variant such as .fp16 "
            "will do): vq4dit loads nothing else; convert it first"
        )
    variant = variants[0]
    if variant not in indices:
        return (singles[variant],), variant
    shards = shard_names(read(indices[variant]), f"{where}/{indices[variant]}")
    if missing := [name for name in shards if name not in present]:
        raise FormatError(f"{where}/{indices[variant]} names {missing[0]}, which is not there: {AGAIN}")
    return shards, variant


def _by_variant(pattern: str, names: Iterable[str]) -> dict[str | None, str]:
    return {found[1]: name for name in names if (found := re.fullmatch(pattern, name))}


def _preference(variant: str | None) -> tuple[int, str]:
    return (PREFERRED.index(variant) if variant in PREFERRED else len(PREFERRED)), variant or ""


def shard_names(index: dict[str, Any], where: str) -> tuple[str, ...]:
    """The files that an index of shards names.

    Raises:
        FormatError: if one is no safetensors file beside the index: anything else may be a program, or anywhere.
    """
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(index.get("metadata"), dict):
        raise FormatError(f"{where} must have the entries metadata and weight_map, tensors and their files: {AGAIN}")
    for name in files.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise FormatError(
                f"{where} must name .safetensors files beside it, and names {shown(name)} (other formats can run code): {AGAIN}"
            )
    return tuple(sorted(set(files.values())))


def read_header(path: Path) -> dict[str, TensorHeader]:
    """What a safetensors file's header says, by tensor.

    Raises:
        FormatError: if it is no such file, cut short or damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FormatError(f"{path} must be a safetensors file, and is none: {AGAIN}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorHeader(found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is truncated or damaged ({error}): download or quantize it again") from error
