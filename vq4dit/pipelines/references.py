"""Parts that a quantized pipeline does not hold: they are its base's, on the Hub, as of the commit that was quantized.

A 2-bit transformer may weigh a third of the text encoder beside it, which everybody has already. Then `model_index.json` names
all parts and their classes as ever, and has one entry more, which diffusers passes over:

    "_vq4dit_reference": {"model": "owner/name", "revision": "<40 hexadecimal digits>",
                          "files": {"vae/config.json": 812, "vae/diffusion_pytorch_model.safetensors": 335304388}}

These are the files that a copy would have, with their bytes. Whoever loads the folder fetches them and has the same pipeline,
or is told why not. Only parts that bear weights are referenced; schedulers and tokenizers are small, and copied.

The entry may be a stranger's, so there is little that it can say: a repository, a commit, and below it configurations and
safetensors. It cannot name a folder of this machine, a branch that moves, or anything that may hold a program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from torch import nn

from vq4dit.disk.json_files import AGAIN, read_object, shown
from vq4dit.disk.space import check_space
from vq4dit.errors import FormatError, HubError, VQ4DiTError
from vq4dit.pipelines.hub_errors import FAILURES, explained
from vq4dit.pipelines.inventory import CONFIGURATION, OF_TRANSFORMERS, PART, part_files
from vq4dit.pipelines.provenance import is_hub_id
from vq4dit.pipelines.repository import SHARD, STEM, choose, parts_of
from vq4dit.pipelines.trust import part_class

Components = Literal["copy", "reference"]
COMPONENTS: tuple[Components, ...] = ("copy", "reference")  # what becomes of the parts that are not quantized
KEY = "_vq4dit_reference"
COMMIT = re.compile(r"[0-9a-f]{40}")
VARIANT = re.compile(r"\.(fp32|bf16|fp16)[.-]")
INDEX_OF_SHARDS = re.compile(rf"({STEM}|{OF_TRANSFORMERS})\.safetensors\.index(\.\w+)?\.json", re.ASCII)
COPY = "a result with --components copy needs no other repository"


@dataclass(frozen=True)
class Reference:
    """Where the parts are that a folder does not hold."""

    model: str  # Hub id
    revision: str  # commit
    files: dict[str, int]  # their bytes, by their names in the repository

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(name.split("/")[0] for name in self.files))

    def names(self, part: str) -> list[str]:
        """Of the files of a part."""
        return [name.removeprefix(f"{part}/") for name in self.files if name.startswith(f"{part}/")]

    @property
    def variant(self) -> str | None:
        """Of the weights, as diffusers calls it ("fp16"), where there are no others."""
        return next((found[1] for name in self.files if (found := VARIANT.search(name))), None)

    def entry(self) -> dict[str, Any]:
        """What it adds to a `model_index.json`: nothing, if there was nothing to refer to."""
        return {KEY: asdict(self)} if self.files else {}

    def __str__(self) -> str:
        return f"{', '.join(self.parts)} of {self.model} at commit {self.revision}"


class Lent(NamedTuple):
    """A referenced part as it lies in the Hub's cache, where other files may lie beside its own."""

    folder: Path
    names: list[str]


def check_base(model: str, revision: str | None) -> None:
    """Raise `VQ4DiTError` unless the parts of this model can be referenced: it must be a repository, at a commit."""
    if is_hub_id(model) and COMMIT.fullmatch(revision or ""):
        return
    at = f"at revision {shown(revision)}" if revision else "without a commit, which folders do not have"
    raise VQ4DiTError(
        f"components can be referenced only of a repository on the Hub (owner/name) at a commit, got {shown(model)} {at}: "
        "take --components copy, or quantize the repository that the model comes from",
        page="parts can be fetched from the original only where it is a repository on the Hub: choose to copy them",
    )


def reference_to(model: str, revision: str, source: Path, parts: Mapping[str, str]) -> Reference:
    """The reference to parts of a repository whose snapshot is in the folder `source`.

    Args:
        parts: their classes by their names.

    Raises:
        VQ4DiTError: as `check_base`.
    """
    check_base(model, revision)
    names = [f"{part}/{name}" for part, kind in sorted(parts.items()) for name in part_files(source / part, kind)]
    return Reference(model, revision, {name: (source / name).stat().st_size for name in names})


def read_reference(index: dict[str, Any], path: str) -> Reference | None:
    """The reference in a `model_index.json`; None if it has none.

    Args:
        index: one whose classes were checked.
        path: of the index, for messages.

    Raises:
        FormatError: if it names anything but a repository, a commit, and files of parts that the index has.
    """
    if KEY not in index:
        return None
    found = index[KEY]
    if not isinstance(found, dict) or found.keys() != {"model", "revision", "files"}:
        raise _refused(path, "must have model, revision and files", found)
    model, revision, files = found["model"], found["revision"], found["files"]
    if not (isinstance(model, str) and is_hub_id(model)):
        raise _refused(path, "must name a repository of the Hub, owner/name", model)
    if not (isinstance(revision, str) and COMMIT.fullmatch(revision)):
        raise _refused(path, "must name a commit by its 40 hexadecimal digits, in which no other files can come", revision)
    if not isinstance(files, dict) or not files:
        raise _refused(path, "must name files with their bytes", files)
    for name, size in files.items():
        if not _is_file_of_part(name, index):
            raise _refused(path, "must name configurations and safetensors of the pipeline's parts (others can run code)", name)
        if type(size) is not int or size < 0:
            raise _refused(path, f"must give the bytes of {name}", size)
    return Reference(model, revision, dict(files))


def _is_file_of_part(name: str, index: dict[str, Any]) -> bool:
    part, _, file = name.partition("/")
    kind = part_class(*index[part]) if PART.fullmatch(part) and part in parts_of(index) else None
    has_weights = isinstance(kind, type) and issubclass(kind, nn.Module)
    return has_weights and bool(file in CONFIGURATION or SHARD.fullmatch(file) or INDEX_OF_SHARDS.fullmatch(file))


def _refused(path: str, invariant: str, found: Any) -> FormatError:
    return FormatError(f"{path}: {KEY} {invariant}, found {shown(found)}: do not trust this model, or {AGAIN}")


def borrowed(reference: Reference, folder: Path, token: str | None = None) -> dict[str, Lent]:
    """The referenced parts, fetched into the Hub's cache, by their names. Only commits are asked for, so the cache will do.

    Args:
        folder: of the pipeline that refers to them.

    Raises:
        HubError: if the Hub does not give them (any more), or cannot be reached; JobError if the disk is too full.
        FormatError: if they are not what was quantized, or the pipeline has parts of these names itself.
    """
    if own := [part for part in reference.parts if (folder / part).exists()]:
        raise FormatError(f"{folder} holds {own[0]}/, and says that it is {reference}: delete the one or the other")
    model, revision = reference.model, reference.revision
    wanted = {n: size for n, size in reference.files.items() if not try_to_load_from_cache(model, n, revision=revision)}
    check_space(Path(constants.HF_HUB_CACHE), sum(wanted.values()))
    try:
        if wanted:  # sizes are known before anything is fetched that nobody promised
            info = HfApi(token=token).model_info(model, revision=revision, files_metadata=True)
            _check_sizes(reference, {file.rfilename: file.size or 0 for file in info.siblings or ()})
        paths = {name: Path(hf_hub_download(model, name, revision=revision, token=token)) for name in reference.files}
    except FAILURES as error:
        told = explained(error, f"fetch {reference}", model)
        raise HubError(f"{told}; {COPY}", told.reason, float(told.seconds), page=str(told)) from error
    _check_sizes(reference, {name: path.stat().st_size for name, path in paths.items()})
    snapshot = next(iter(paths.values())).parents[1]
    if snapshot.name != revision:
        raise FormatError(f"{model} has a branch or tag called {revision}, and no commit: do not trust this model")
    return {part: Lent(snapshot / part, reference.names(part)) for part in reference.parts}


def _check_sizes(reference: Reference, sizes: Mapping[str, int]) -> None:
    """Raise `FormatError` unless files that are there have the bytes that they had. What is missing, the Hub says."""
    model, revision = reference.model, reference.revision
    for name, size in reference.files.items():
        if (now := sizes.get(name, size)) != size:
            told = f"{model} has {now} bytes in {name} at commit {revision}, not the {size} that were quantized"
            raise FormatError(f"{told}: quantize it again; {COPY}", page=f"{told}: quantize it again")


def loaded(lent: Lent, kind: Any, dtype: torch.dtype) -> Any:
    """A referenced part of this class, of exactly the files that were named."""
    stem = STEM if any(name.startswith(STEM) for name in lent.names) else OF_TRANSFORMERS
    _, variant = choose(lent.names, str(lent.folder), lambda name: read_object(lent.folder / name), stem)
    return kind.from_pretrained(lent.folder, variant=variant, use_safetensors=True, dtype=dtype)
