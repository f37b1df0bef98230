"""Which models there are to pick, and what a card says about one before anything large is read.

A model is named by what a visitor may say: a bundled one, a Hub id, or, where a root folder was opened, `folder:NAME`
below it. Nothing else of what is typed is ever used as a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from vq4dit.bundled import BUNDLED, BUNDLED_FLUX, BUNDLED_VIDEO
from vq4dit.config import CallValue, Recipe
from vq4dit.disk.revisions import content_revision
from vq4dit.errors import UnsupportedModelError, VQ4DiTError
from vq4dit.models.trajectories import NO_CALL
from vq4dit.pipelines.hub_errors import FAILURES, ask, explained
from vq4dit.pipelines.inspect import Inspection, inspect
from vq4dit.pipelines.load import check_access
from vq4dit.pipelines.repository import OWNER_AND_NAME, hub_id, read_json
from vq4dit.printable import printable

FOLDER = "folder:"
COME_WITH_IT = (BUNDLED, BUNDLED_FLUX, BUNDLED_VIDEO)
HUB_ID = re.compile(OWNER_AND_NAME)
PATIENCE = 1.5  # seconds to reach the Hub, and again until it says something: it answers a search in a fraction of one
LICENCE_LINE = re.compile(r"^license(?:_name)?: *(\S+)", re.MULTILINE)

# Diffusion transformers that come with vq4dit, and those of the Hub that people use, all in diffusers' format: with a word on
# each, and the transformer's bytes at 2 bits by any recipe (`python tests/benchmarks/sizes.py`).
KNOWN = {
    BUNDLED: "emoji-dit: bundled, 12.7 M parameters, no download",
    BUNDLED_FLUX: "emoji-flux: bundled, text to image, 12.1 M parameters, no download",
    BUNDLED_VIDEO: "emoji-video: bundled, text to video, 10.2 M parameters, no download",
    "facebook/DiT-XL-2-256": "DiT-XL/2 at 256 px: the paper's model, 0.18 GB at 2 bits",
    "facebook/DiT-XL-2-512": "DiT-XL/2 at 512 px, 0.18 GB",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "PixArt-Σ, text to image, 0.6 B, 0.18 GB",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "Sana, text to image, 1.6 B, 0.49 GB",
    "Alpha-VLLM/Lumina-Image-2.0": "Lumina 2, text to image, 2.6 B, 0.66 GB",
    "black-forest-labs/FLUX.2-klein-4B": "FLUX.2 klein, text to image, 4 B, 1.3 GB",
    "Tongyi-MAI/Z-Image-Turbo": "Z-Image Turbo, text to image, 6 B, 1.6 GB",
    "stabilityai/stable-diffusion-3.5-large": "SD 3.5 large, text to image, 8 B, 2.5 GB",
    "black-forest-labs/FLUX.1-schnell": "FLUX.1 schnell, text to image, 12 B, 3.1 GB",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 dev, text to image, 12 B, 3.1 GB",
    "Qwen/Qwen-Image": "Qwen-Image, text to image, 20 B, 5.2 GB",
    "black-forest-labs/FLUX.2-dev": "FLUX.2 dev, text to image, 32 B, 9.5 GB",
    "Lightricks/LTX-Video": "LTX-Video, text to video, 1.9 B, 0.56 GB",
    "zai-org/CogVideoX-5b": "CogVideoX, text to video, 5.6 B, 1.4 GB",
    "hunyuanvideo-community/HunyuanVideo": "HunyuanVideo, text to video, 13 B, 3.4 GB",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "Wan 2.1, text to video, 14 B, 4.0 GB",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "Wan 2.2, text to video, two of 14 B, 8.0 GB",
}


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model from its headers and its card."""

    inspection: Inspection
    pipeline: str  # class name
    licence: str  # "" if it says none
    gated: bool  # read with a login that has access
    download_bytes: int  # 0 for a folder
    commit: str = ""  # of a folder: see `revisions.content_revision`
    labels: dict[str, int] = field(default_factory=dict)  # classes by their first name, if it has any


@dataclass(frozen=True)
class Catalog:
    """The models that one server offers.

    Args:
        home: the folder that holds the bundled models.
        root: a folder of pipeline folders to offer, or None.
        largest_download: bytes of a repository that is still fetched.
    """

    home: Path
    root: Path | None = None
    largest_download: int = 80 * 10**9

    def locate(self, name: str) -> str:
        """What `load_pipeline` takes for a model's name.

        Raises:
            VQ4DiTError: if it is no name of a model that may be opened here.
        """
        name = hub_id(name.strip())
        if name in COME_WITH_IT:
            return str(self.home / name)
        if name.startswith(FOLDER):
            return str(self._folder(name.removeprefix(FOLDER)))
        if HUB_ID.fullmatch(name) and ".." not in name:
            return name
        raise VQ4DiTError(
            f"{name[:100]!r} is no model that can be opened here, names on the Hugging Face Hub look like owner/name: pick one "
            "from the list, for example facebook/DiT-XL-2-256"
        )

    def is_on_the_hub(self, name: str) -> bool:
        """Whether a name is that of a repository, which others can fetch too."""
        try:
            return not Path(self.locate(name)).is_dir()
        except VQ4DiTError:
            return False

    def _folder(self, name: str) -> Path:
        if self.root is None:
            raise VQ4DiTError(
                "folders of this machine are not open: start the app with --root FOLDER to offer those below it",
                page="folders of this server are not open to the page: pick a model from the list",
            )
        folder = (self.root / name).resolve()
        if self.root.resolve() not in folder.parents or not (folder / "model_index.json").is_file():
            raise VQ4DiTError(f"there is no pipeline folder {name[:100]!r} below the root: pick one from the list")
        return folder

    def folders(self) -> list[str]:
        """Pipeline folders below the root, at most three levels down."""
        if self.root is None:
            return []
        found = {path.parent for depth in range(1, 4) for path in self.root.glob("/".join(["*"] * depth) + "/model_index.json")}
        return [f"{FOLDER}{path.relative_to(self.root)}" for path in sorted(found)]

    def offered(self) -> list[tuple[str, str]]:
        """(what is shown, name) of everything that needs no search."""
        known = [(words if name in COME_WITH_IT else f"{name} · {words}", name) for name, words in KNOWN.items()]
        return known + [(printable(name), name) for name in self.folders()]

    def search(self, text: str) -> tuple[list[tuple[str, str]], bool]:
        """Models for some words: what is offered anyway, then those of the Hub, the most downloaded first.

        Also whether the Hub was heard, or need not be asked.
        """
        words = hub_id(text.strip())
        offered = [(shown, name) for shown, name in self.offered() if words.lower() in shown.lower()]
        if len(words) < 2 or words.startswith(FOLDER):
            return offered or self.offered(), True
        try:
            found = _found_on_the_hub(words[:100])
        except FAILURES:
            return offered, False
        names = {name for _, name in offered}
        return offered + [(name, name) for name in found if name not in names], True

    def check_access(self, name: str, token: str | None = None) -> None:
        """Raise `VQ4DiTError` unless whoever has this login may read the model now."""
        check_access(self.locate(name), token)

    def revision(self, name: str, token: str | None = None) -> str:
        """What stands for a model's content now: the newest commit of a repository, names and times of a folder's files.

        Raises:
            VQ4DiTError: as `locate`; HubError if the Hub cannot be asked.
        """
        model = self.locate(name)
        if Path(model).is_dir():
            return content_revision(Path(model))
        return ask(f"look at {model}", lambda: HfApi(token=token).model_info(model), model).sha or ""

    def card(
        self,
        name: str,
        keep: tuple[str, ...] = (),
        recipe: Recipe = "best",
        token: str | None = None,
        call: Mapping[str, CallValue] = NO_CALL,
    ) -> ModelCard:
        """Look at a model without its weights, with the login that `token` belongs to.

        Args:
            call: what the pipeline's call will be told.

        Raises:
            VQ4DiTError: if it cannot be opened here, is too large, gated, or not there; UnsupportedModelError if it is of a
                kind that cannot be quantized.
        """
        self.check_access(name, token)
        with self.named(name) as model:
            return self._card(model, keep, recipe, token, call)

    @contextmanager
    def named(self, name: str) -> Iterator[str]:
        """What `load_pipeline` takes for a model's name; what a page says of a failure inside has the name again."""
        model = self.locate(name)
        try:
            yield model
        except VQ4DiTError as error:
            error.page = error.page.replace(model, name.strip().removeprefix(FOLDER))
            raise

    def _card(
        self, model: str, keep: tuple[str, ...], recipe: Recipe, token: str | None, call: Mapping[str, CallValue]
    ) -> ModelCard:
        revision = content_revision(Path(model)) if Path(model).is_dir() else ""
        info = None if Path(model).is_dir() else self._info(model, token)
        commit = info.sha if info else None
        index = read_json(model, "model_index.json", commit, token)
        inspection = inspect(model, keep, recipe=recipe, call=call, revision=commit, token=token)
        return ModelCard(
            inspection=inspection,
            pipeline=index.get("_class_name", ""),
            licence=_licence(info) if info else _licence_of_folder(Path(model)),
            gated=bool(info and info.gated),
            download_bytes=_download_bytes(info) if info else 0,
            commit=commit or revision,
            labels=_labels(index.get("id2label") or {}),
        )

    def _info(self, model: str, token: str | None) -> ModelInfo:
        """The Hub's word on a repository; refuses what is not to be fetched."""
        try:
            info = HfApi(token=token).model_info(model, files_metadata=True)
        except FAILURES as error:
            raise explained(error, f"look at {model}", model) from error
        names = {file.rfilename for file in info.siblings or ()}
        if "model_index.json" not in names:
            raise UnsupportedModelError(_no_pipeline(model, names))
        in_transformer = {name.removeprefix("transformer/") for name in names if name.startswith("transformer/")}
        if in_transformer and not any(name.endswith(".safetensors") for name in in_transformer):
            raise UnsupportedModelError(
                f"{model} has no safetensors in transformer/, and nothing else is loaded here because other formats can run "
                "code: ask its author to convert it, or take another"
            )
        if (size := _download_bytes(info)) > self.largest_download:
            raise VQ4DiTError(
                f"{model} is a download of {size / 1e9:.0f} GB, and this server takes up to "
                f"{self.largest_download / 1e9:.0f} GB: use the command line on a machine of your own"
            )
        return info


@lru_cache(maxsize=512)  # every key pressed is a search, by every visitor
def _found_on_the_hub(words: str) -> list[str]:
    """Asked once, with little patience: `HfApi.list_models` would try again for 24 seconds, while somebody types."""
    asked: dict[str, Any] = {"search": words, "filter": "diffusers", "limit": 20, "sort": "downloads"}
    answer = get_session().get(f"{constants.ENDPOINT}/api/models", params=asked, headers=build_hf_headers(), timeout=PATIENCE)
    hf_raise_for_status(answer)
    return [model["id"] for model in answer.json() if HUB_ID.fullmatch(model["id"])]


def _no_pipeline(model: str, names: set[str]) -> str:
    if any("lora" in name.lower() or name == "adapter_config.json" for name in names):
        return f"{model} is a LoRA, a small addition to another model: pick the model it belongs to"
    if any(name.endswith(".gguf") for name in names):
        return f"{model} is quantized already (GGUF): pick the original model"
    return f"{model} is no diffusers pipeline (it has no model_index.json): look for a version of it that diffusers can load"


def _download_bytes(info: ModelInfo) -> int:
    """What a pipeline's load fetches: configs and safetensors in sub-folders, no variants."""
    wanted = [f for f in info.siblings or () if "/" in f.rfilename and not re.search(r"\.(fp16|bf16|fp32)[.-]", f.rfilename)]
    return sum(file.size or 0 for file in wanted if file.rfilename.endswith((".safetensors", ".json", ".txt", ".model")))


def _labels(id2label: dict[str, str]) -> dict[str, int]:
    return {words.split(",")[0]: int(index) for index, words in sorted(id2label.items(), key=lambda item: int(item[0]))}


def _licence(info: ModelInfo) -> str:
    card: Any = info.card_data or {}
    return str(card.get("license_name") or card.get("license") or "")


def _licence_of_folder(folder: Path) -> str:
    readme = folder / "README.md"
    try:
        if not readme.is_file():
            return ""
        with open(readme, "rb") as file:
            match = LICENCE_LINE.search(file.read(2000).decode(errors="replace"))
    except OSError:  # a card that cannot be read is no card
        return ""
    return match.group(1) if match else ""
