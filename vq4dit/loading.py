"""From a folder or a Hub id to a pipeline, with everything that can be wrong said before anything large is read.

Only safetensors are ever loaded, and no code from the repository is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError

SUPPORTED = "vq4dit quantizes pipelines with a diffusion transformer, such as facebook/DiT-XL-2-256"


def read_json(model: str, filename: str) -> dict[str, Any]:
    """A JSON file of a pipeline folder or Hub repository.

    Raises:
        VQ4DiTError: if there is no such folder or repository, it has no such file, or the Hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        path = folder / filename
        if not path.is_file():
            raise UnsupportedModelError(
                f"{model} has no {filename}: it is no diffusers pipeline folder (one that `save_pretrained` wrote). {SUPPORTED}"
            )
    else:
        path = Path(_download(model, filename))
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}): download the model again") from error


def _download(model: str, filename: str) -> str:
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise VQ4DiTError(
            f"there is no folder {model}, and it is no Hub id either (those look like owner/name): check the path"
        )
    try:
        return hf_hub_download(model, filename)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise VQ4DiTError(f"the Hub did not give {filename} of {model}: {error}") from error
        raise VQ4DiTError(
            f"there is no folder {model}, and the Hugging Face Hub cannot be reached to look for a repository of that name: "
            "check the path or the network"
        ) from error
    except HFValidationError as error:
        raise VQ4DiTError(f"{model} is neither a folder nor a Hub id: {error}") from error


def check_pipeline(model: str) -> dict[str, Any]:
    """Read `model_index.json` and the transformer's `config.json`; returns the latter.

    Raises:
        UnsupportedModelError: if the pipeline has no transformer (it says what it has instead).
    """
    index = read_json(model, "model_index.json")
    if "transformer" not in index:
        found = index.get("_class_name", "an unknown pipeline")
        what = f"a {found} with a UNet" if "unet" in index else f"a {found} without a transformer"
        raise UnsupportedModelError(f"{model} is {what}. {SUPPORTED}")
    return read_json(model, "transformer/config.json")


def check_files(folder: Path) -> None:
    """Raise `FormatError` if a safetensors file below `folder` is cut short or damaged. Reads headers only."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise FormatError(f"{path} is truncated or damaged ({error}): download or quantize it again") from error


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load an original or a quantized pipeline: diffusers tells them apart.

    Raises:
        VQ4DiTError: as `check_pipeline` and `check_files`; FormatError for a broken or newer packed file.
    """
    check_pipeline(model)
    if Path(model).is_dir():
        check_files(Path(model))
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise VQ4DiTError(f"{model} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
