"""Which files make a pipeline folder: those that its index and its configurations name, and nothing else that lies in it.

`model_index.json` names the parts. A part is a folder with a configuration, weights (the shards of an index or one file:
what would be loaded, no left-overs beside them) and, of a tokenizer, its vocabulary. Every other file belongs to whoever
put it there: it is not copied, not published and not deleted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIGURATION = (
    "config.json",
    "generation_config.json",
    "scheduler_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
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
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)


def part_names(folder: Path) -> list[str]:
    """The parts that the folder's index names."""
    entries = read_object(folder / INDEX).items()
    named = (name for name, value in entries if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str))
    return [name for name in named if PART.fullmatch(name)]


def weight_files(part: Path) -> list[str]:
    """The safetensors of a part that would be loaded, with their index; none if it has none.

    Where an index and a single file lie side by side, diffusers takes the index and transformers the file.
    """
    diffusers, transformers = "diffusion_pytorch_model.safetensors", "model.safetensors"
    if shards := _sharded(part, diffusers):
        return shards
    for single in (diffusers, transformers):
        if (part / single).is_file():
            return [single]
    return _sharded(part, transformers)


def part_files(part: Path) -> list[str]:
    """The names of the files that make a part: configuration, vocabulary, weights."""
    return [name for name in (*CONFIGURATION, *VOCABULARY) if (part / name).is_file()] + weight_files(part)


def pipeline_files(folder: Path) -> list[str]:
    """The names below a pipeline folder of the files that make it."""
    found = [f"{name}/{file}" for name in part_names(folder) for file in part_files(folder / name)]
    return [INDEX, *found] if (folder / INDEX).is_file() else []


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a pipeline folder when all links are followed, or among the blobs of a Hub cache around it."""
    whole = folder.resolve()
    return any(path.resolve().is_relative_to(place) for place in (whole, whole.parent / "blobs", whole.parent.parent / "blobs"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is missing or holds none: loading it will tell why."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _sharded(part: Path, single: str) -> list[str]:
    index = f"{single}.index.json"
    places = read_object(part / index).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) and all(map(_is_shard, places.values())) else []
    return [index, *names] if names and all((part / name).is_file() for name in names) else []


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and SHARD.fullmatch(name) is not None
