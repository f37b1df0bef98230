"""Which files make a pipeline folder: those that its index and its configurations name, and nothing else that lies in it.

`model_index.json` names the parts. A part is a folder with a configuration, weights (the shards of an index or one file:
what would be loaded, no left-overs beside them) and, of a tokenizer, its vocabulary. Every other file belongs to whoever
put it there: it is not copied, not published and not deleted.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vq4dit.errors import FormatError, VQ4DiTError
from vq4dit.json_files import read_object
from vq4dit.repository import STEM, choose

INDEX = "model_index.json"
OF_TRANSFORMERS = "model"  # what it calls its weights; diffusers has another stem
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


def part_names(folder: Path) -> list[str]:
    """The parts that the folder's index names."""
    entries = _object(folder / INDEX).items()
    named = (name for name, value in entries if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str))
    return [name for name in named if PART.fullmatch(name)]


def weight_files(part: Path) -> list[str]:
    """The safetensors of a part that would be loaded, with their index; none if it has none that can be.

    Where an index and a single file lie side by side, diffusers takes the index and transformers the file. A variant (`.fp16`)
    is taken where there is nothing else.
    """
    names = [path.name for path in part.iterdir() if path.is_file()] if part.is_dir() else []
    if f"{OF_TRANSFORMERS}.safetensors" in names and not any(name.startswith(STEM) for name in names):
        return [f"{OF_TRANSFORMERS}.safetensors"]
    for stem in (STEM, OF_TRANSFORMERS):
        with suppress(VQ4DiTError):
            files, variant = choose(names, str(part), lambda name: read_object(part / name), stem)
            index = ".".join(filter(None, (f"{stem}.safetensors.index", variant, "json")))
            return [index, *files] if index in names else list(files)
    return []


def without_variant(name: str) -> str:
    """The name of a file of weights, or of an index, as it is loaded if nobody asks for a variant."""
    return re.sub(
        rf"^({STEM}|{OF_TRANSFORMERS})(?:\.\w+)?\.safetensors(\.index)?(?:\.\w+)??(\.json)?$", r"\1.safetensors\2\3", name
    )


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


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none that can be read: loading it will tell why."""
    try:
        return read_object(path)
    except (OSError, FormatError):
        return {}
