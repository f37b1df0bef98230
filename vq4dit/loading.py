"""From a folder or a Hub id to a pipeline, with everything that can be wrong said before anything large is read.

Only safetensors are ever loaded, and no code from the repository is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError
from vq4dit.hub_errors import FAILURES, ask, explained
from vq4dit.quiet import quiet_loading

SUPPORTED = "vq4dit quantizes pipelines with a diffusion transformer, such as facebook/DiT-XL-2-256"


def read_json(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """A JSON file of a pipeline folder or Hub repository.

    Args:
        revision: a commit, branch or tag of the repository; None is its main branch.
        token: of the login that may read it; None is huggingface_hub's own login, if there is one.

    Raises:
        VQ4DiTError: if there is no such folder or repository, it has no such file, or the Hub cannot be reached; HubError
            if the Hub refuses: it is gated, private or missing.
    """
    folder = Path(model)
    if folder.is_dir():
        path = folder / filename
        if not path.is_file():
            raise UnsupportedModelError(
                f"{model} has no {filename}: it is no diffusers pipeline folder (one that `save_pretrained` wrote). {SUPPORTED}"
            )
    else:
        path = Path(_download(model, filename, revision, token))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}): download the model again") from error


def _download(model: str, filename: str, revision: str | None, token: str | None) -> str:
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
        if told.reason not in ("network", "offline"):
            raise told from error
        raise VQ4DiTError(
            f"there is no folder {model}, and the Hugging Face Hub cannot be reached to look for a repository of that name: "
            "check the path or the network"
        ) from error


def pinned(model: str, revision: str | None = None, token: str | None = None) -> str | None:
    """The commit that a Hub id stands for now, so that all files come from one state of it; None for a folder.

    Raises:
        VQ4DiTError: see `read_json`.
    """
    if Path(model).is_dir():
        return None
    return Path(_download(model, "model_index.json", revision, token)).parent.name  # .../snapshots/COMMIT/model_index.json


def check_access(model: str, token: str | None = None) -> None:
    """Raise `HubError` unless this login may read a repository: gated ("request access at ...") is told from missing.

    The Hub is asked every time: what lies in a cache may have come there with somebody else's login. Folders are open.
    """
    if not Path(model).is_dir():
        ask(f"look at {model}", lambda: HfApi(token=token).auth_check(model), model)


def check_pipeline(model: str, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Read `model_index.json` and the transformer's `config.json`; returns the latter.

    Raises:
        UnsupportedModelError: if the pipeline has no transformer (it says what it has instead).
    """
    index = read_json(model, "model_index.json", revision, token)
    if "transformer" not in index:
        found = index.get("_class_name", "an unknown pipeline")
        what = f"a {found} with a UNet" if "unet" in index else f"a {found} without a transformer"
        raise UnsupportedModelError(f"{model} is {what}. {SUPPORTED}")
    return read_json(model, "transformer/config.json", revision, token)


def check_files(folder: Path) -> None:
    """Raise `FormatError` if a safetensors file below `folder` is cut short or damaged. Reads headers only."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise FormatError(f"{path} is truncated or damaged ({error}): download or quantize it again") from error


def load_pipeline(
    model: str, dtype: torch.dtype = torch.float32, *, revision: str | None = None, token: str | None = None
) -> Any:
    """Load an original or a quantized pipeline: diffusers tells them apart. `revision` and `token`: see `read_json`.

    Raises:
        VQ4DiTError: as `check_pipeline` and `check_files`; FormatError for a broken or newer packed file; HubError if a
            download fails.
    """
    check_pipeline(model, revision, token)
    if Path(model).is_dir():
        check_files(Path(model))
    try:
        with quiet_loading():
            pipeline = DiffusionPipeline.from_pretrained(
                model, dtype=dtype, use_safetensors=True, revision=revision, token=token
            )
    except (OSError, ValueError) as error:
        told = explained(error, f"download {model}", model)
        if told.reason != "unknown":
            raise told from error
        raise VQ4DiTError(f"{model} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
