"""Results that refer to a base on the loopback Hub, made as the command `quantize` makes them."""

import json
from pathlib import Path

import vq4dit
from vq4dit.pipelines.load import load_pipeline, pinned, source_folder
from vq4dit.pipelines.provenance import origin_of

SETTINGS = vq4dit.QuantizationSettings(recipe="kmeans")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def made(model: str, output: Path, components: str = "reference", token: str | None = None) -> Path:
    """A repository, quantized by k-means."""
    revision = pinned(model, token=token)
    quantized = vq4dit.quantize(load_pipeline(model, revision=revision, token=token), SETTINGS)
    origin, source = origin_of(model, revision, SETTINGS), source_folder(model, revision, token)
    vq4dit.save(quantized, output, source=source, origin=origin, components=components)
    return output
