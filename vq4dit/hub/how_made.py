"""How a quantized model was made, and what of it stayed in 16 bit, as its card tells it: from the folder's files alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from vq4dit.config import CODEBOOKS
from vq4dit.denoisers import as_one, full_name, names_in_denoiser
from vq4dit.errors import FormatError
from vq4dit.hub.markdown import plain
from vq4dit.layers.entropy_coded import EntropyCodedLinear, SingleStreamLinear
from vq4dit.models.blocks import find_targets
from vq4dit.pipelines.load import denoiser_parts
from vq4dit.pipelines.provenance import Origin
from vq4dit.pipelines.repository import read_json, weights_in
from vq4dit.pipelines.skeleton import empty_transformer

RECIPES = {"kmeans": "plain k-means", "paper": "VQ4DiT as in its paper", "best": "the one that measures best in vq4dit"}


def making(quantization: dict[str, Any], origin: Origin, codings: dict[str, str]) -> str:
    bits, recipe = quantization["bits"], quantization["recipe"]
    told = "; ".join(f"{coding} in {count} layers" for coding, count in Counter(codings.values()).most_common())
    lines = [
        f"- bits per weight: {bits} ({told})",
        f"- recipe: `{recipe}`, {RECIPES.get(recipe, 'unknown')}",
        f"- seed: {quantization['seed']}",
    ]
    calibration = origin.settings.get("calibration", {})
    shown = {key: value for key, value in calibration.items() if _belongs(key, recipe)}
    if call := origin.settings.get("call"):
        lines.append("- sampled with: " + ", ".join(f"{plain(key)} {plain(value)}" for key, value in call.items()))
    if prompts := origin.settings.get("prompts"):
        lines.append(f"- calibrated on {len(prompts)} prompts of its maker's choice")
    if shown:
        lines.append("- calibration: " + ", ".join(f"{plain(key)} {plain(value)}" for key, value in shown.items()))
    if origin.versions:
        lines.append("- versions: " + ", ".join(f"{plain(name)} {plain(value)}" for name, value in origin.versions.items()))
    else:
        lines.append("- versions and calibration settings: not recorded")
    return "## How it was made\n\n" + "\n".join(lines)


def _belongs(constant: str, recipe: str) -> bool:
    """Whether a recipe reads this constant of `CalibrationConfig`."""
    of_best = constant.startswith("tuning_")  # in models of earlier versions
    return {"best": of_best or constant == "guidance_scale", "paper": not of_best}.get(recipe, False)


def kept_layers(folder: Path, quantization: dict[str, Any], origin: Origin, quantized: dict[str, str]) -> str:
    num_codewords, dim = CODEBOOKS[quantization["bits"]]
    targets, kept = find_targets(_empty_denoiser(folder), dim, num_codewords, origin.settings.get("keep", ()))
    reasons = {layer.name: layer.reason for layer in kept} | dict.fromkeys(targets, "not quantized")
    groups = Counter((re.sub(r"\.\d+\.", ".*.", name, count=1), reasons[name]) for name in reasons if name not in quantized)
    lines = [f"- `{name}` ({count} layers): {plain(reason)}" for (name, reason), count in groups.items()]
    lines.append("- everything outside the transformer blocks, all biases and norms")
    total = len(quantized)
    return f"## Layers kept in 16 bit\n\n{total} linear layers are quantized. The rest is not:\n\n" + "\n".join(lines)


def _empty_denoiser(folder: Path) -> nn.Module:
    return as_one({part: empty_transformer(read_json(str(folder), f"{part}/config.json")) for part in _denoiser_parts(folder)})


def _denoiser_parts(folder: Path) -> list[str]:
    return denoiser_parts(read_json(str(folder), "model_index.json"))


def layer_codings(folder: Path) -> dict[str, str]:
    """How the weights of each quantized layer are held, from the files' headers."""
    found: dict[str, str] = {}
    tensors = {
        full_name(name, key): tensor
        for part, name in names_in_denoiser(_denoiser_parts(folder)).items()
        for key, tensor in weights_in(folder / part).tensors.items()
    }
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind == "codebook":
            k, d = _shape_of_codebook(folder, key, tensor.shape)
            found[layer] = f"{k} codewords of {d} weights"
        elif kind in (EntropyCodedLinear.BYTES[0], SingleStreamLinear.BYTES[0]):
            found[layer] = "entropy-coded integers, with more bits where they matter,"
    return found


def _shape_of_codebook(folder: Path, key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise FormatError(f"{key} in {folder} must have 2 axes, and has {len(shape)}: quantize the original model again")
    return shape[0], shape[1]
