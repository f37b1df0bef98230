"""Which files make a pipeline folder: those that its index and its configurations name, and nothing else that lies in it.

`model_index.json` names the parts and their classes. A part is a folder: of a model with its configuration and weights (the
shards of an index or one file: what would be loaded, no left-overs beside them), of a scheduler with its settings, of a
tokenizer with its vocabulary. Every other file belongs to whoever put it there, and so does whatever lies behind a link,
but for the links by which the Hub's cache keeps its files: neither is copied or published.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from vq4dit.disk.json_files import read_object
from vq4dit.disk.record import is_own_file
from vq4dit.errors import FormatError, VQ4DiTError
from vq4dit.pipelines.repository import STEM, choose, file_sizes, parts_of, read_json

INDEX = "model_index.json"
OF_TRANSFORMERS = "model"  # what it calls its weights; diffusers has another stem
CONFIGURATION = ("config.json", "generation_config.json")  # of a model
SCHEDULER = ("scheduler_config.json",)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
VOCABULARY = (  # of transformers' tokenizers
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
PART = re.compile(r"[A-Za-z]\w*", re.ASCII)


def part_classes(folder: Path) -> dict[str, str]:
    """The parts that the folder's index names, and the names of their classes."""
    entries = _object(folder / INDEX).items()
    named = {name: value[1] for name, value in entries if isinstance(value, list) and len(value) == 2}
    return {name: kind for name, kind in named.items() if PART.fullmatch(name) and isinstance(kind, str)}


def weight_files(part: Path) -> list[str]:
    """The safetensors of a part that would be loaded, with their index; none if it has none that can be.

    Where an index and a single file lie side by side, diffusers takes the index and transformers the file. A variant (`.fp16`)
    is taken where there is nothing else.
    """
    names = [path.name for path in part.iterdir() if path.is_file()] if part.is_dir() else []
    return weights_among(names, str(part), lambda name: read_object(part / name))


def weights_among(names: list[str], where: str, read: Callable[[str], dict[str, Any]]) -> list[str]:
    """The same, of these names of the files of a part. `where` and `read`: see `choose`."""
    if f"{OF_TRANSFORMERS}.safetensors" in names and not any(name.startswith(STEM) for name in names):
        return [f"{OF_TRANSFORMERS}.safetensors"]
    for stem in (STEM, OF_TRANSFORMERS):
        with suppress(VQ4DiTError):
            files, variant = choose(names, where, read, stem)
            index = ".".join(filter(None, (f"{stem}.safetensors.index", variant, "json")))
            return [index, *files] if index in names else list(files)
    return []


def weight_bytes(model: str, index: dict[str, Any], revision: str | None = None, token: str | None = None) -> dict[str, int]:
    """Bytes of the safetensors that a pipeline would load, by its parts; those that have none are left out.

    Args:
        index: its `model_index.json`, checked.
    """
    sizes, found = file_sizes(model, revision, token), {}
    for part in parts_of(index):
        names = [name.removeprefix(f"{part}/") for name in sizes if name.startswith(f"{part}/")]
        chosen = weights_among(names, f"{model}/{part}", lambda name: read_json(model, f"{part}/{name}", revision, token))  # noqa: B023
        found[part] = sum(sizes[f"{part}/{name}"] for name in chosen)
    return {part: num_bytes for part, num_bytes in found.items() if num_bytes}


def without_variant(name: str) -> str:
    """The name of a file of weights, or of an index, as it is loaded if nobody asks for a variant."""
    return re.sub(
        rf"^({STEM}|{OF_TRANSFORMERS})(?:\.\w+)?\.safetensors(\.index)?(?:\.\w+)??(\.json)?$", r"\1.safetensors\2\3", name
    )


def part_files(part: Path, class_name: str) -> list[str]:
    """The names of the files that make a part of this class. What a class is, its name says in every library."""
    if "Scheduler" in class_name:
        wanted: tuple[str, ...] = SCHEDULER
    elif "Tokenizer" in class_name:
        wanted = VOCABULARY
    elif "Processor" in class_name or "FeatureExtractor" in class_name:
        wanted = PROCESSOR + VOCABULARY  # it may have a tokenizer in it
    else:
        wanted = CONFIGURATION
    found = [name for name in wanted if (part / name).is_file()]
    return found + weight_files(part) if wanted == CONFIGURATION else found


def pipeline_files(folder: Path) -> list[str]:
    """The names below a pipeline folder of the files that make it."""
    found = [f"{name}/{file}" for name, kind in part_classes(folder).items() for file in part_files(folder / name, kind)]
    return [INDEX, *found] if (folder / INDEX).is_file() else []


def is_of_pipeline(folder: Path, name: str) -> bool:
    """Whether a file below a pipeline folder is no link, or one by which the Hub's cache keeps it.

    models--OWNER--NAME/snapshots/COMMIT/vae/config.json -> models--OWNER--NAME/blobs/<its hash>
    """
    if is_own_file(folder, name):
        return True
    snapshots = folder.resolve().parent
    repository = snapshots.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    *parents, _ = PurePosixPath(name).parents
    blob = (folder / name).resolve()
    return blob.parent == repository / "blobs" and blob.is_file() and not any((folder / at).is_symlink() for at in parents)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none that can be read: loading it will tell why."""
    try:
        return read_object(path)
    except (OSError, FormatError):
        return {}
