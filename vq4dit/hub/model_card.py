"""The card of a published model: what it is, how to load it, what was measured, and what was not.

The text follows from the folder, its origin and the reports of `compare` alone, so that the same push twice gives the same
card. A figure that nobody measured is called "not measured"; figures of another file are refused.

The folder may be a stranger's: what stands in code or in a table must be what it is called, the rest is told as plain words.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData, constants

from vq4dit.config import CODEBOOKS, call_items
from vq4dit.disk.files import amount
from vq4dit.disk.json_files import read_object, shown
from vq4dit.errors import FormatError, HubError
from vq4dit.evaluation.images import makes_films
from vq4dit.evaluation.metrics import Comparison
from vq4dit.hub.base import Base, licence_of
from vq4dit.hub.how_made import kept_layers, layer_codings, making
from vq4dit.hub.markdown import plain
from vq4dit.models.conditions import undecorated_call
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.pipelines.load import check_pipeline, denoiser_parts
from vq4dit.pipelines.provenance import REVISION, copied, is_hub_id, read_origin
from vq4dit.pipelines.references import Reference, read_reference
from vq4dit.pipelines.repository import parts_of, read_json


def read_report(folder: Path) -> Comparison:
    """The figures that `compare` wrote.

    Raises:
        HubError: if there are none, or they are of another version.
    """
    advice = "make one with `python -m vq4dit compare`"
    try:
        figures = read_object(folder / "report.json", advice)
        call = figures.pop("call", {})
        for name, value in figures.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise HubError(f"{folder}/report.json: {name} must be a number, found {shown(value)}: {advice}", "card")
        return Comparison(**figures, call=dict(call_items(call)))
    except (OSError, FormatError, TypeError, ValueError) as error:
        raise HubError(f"{folder} has no report.json that can be read ({error}): {advice}", "card") from error


def model_card(
    folder: Path, repo_id: str, base: Base, report: Comparison | None = None, kmeans: Comparison | None = None
) -> str:
    """README.md of the quantized pipeline in `folder`, to be published as `repo_id`.

    Args:
        report: of `compare`, the base against this model; None if nobody measured.
        kmeans: of `compare`, the base against plain k-means at the same bits; None if nobody measured.

    Raises:
        HubError: if a report is of another file, or the two were not measured alike; FormatError if the folder's files say
            what cannot be.
    """
    config = check_pipeline(str(folder))
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "vq4dit":
        raise HubError(f"{folder} is no model quantized by vq4dit: quantize first, then push the output folder", "card")
    _check_made(folder, quantization)
    for name in filter(None, (repo_id, base.model)):
        if not is_hub_id(name):
            raise HubError(f"{name!r:.100} cannot be the name of a repository: use letters, digits, and - _ . between", "name")
    if not REVISION.fullmatch(base.revision or "main"):
        raise HubError(f"{base.revision!r:.100} cannot be a commit of {base.model}: quantize the original model again", "name")
    num_bytes = tensor_bytes(str(folder))
    _check_reports(num_bytes, report, kmeans)
    origin, codings = read_origin(folder), layer_codings(folder)
    index = read_json(str(folder), "model_index.json")
    reference = read_reference(index, "model_index.json")
    if reference and reference.model == repo_id:
        raise HubError(
            f"{repo_id} has the parts that this model refers to, and a push would remove them: choose another name", "name"
        )
    pipeline = getattr(diffusers, index["_class_name"])
    parts = [
        f"---\n{_metadata(base, quantization['bits'], pipeline)}\n---",
        _introduction(repo_id, base, quantization),
        _loading(repo_id, pipeline, index, reference, origin.settings.get("call", {})),
        _measured(num_bytes, quantization, report, kmeans),
        making(quantization, origin, codings),
        kept_layers(folder, quantization, origin, codings),
        _limits(base, report),
    ]
    return "\n\n".join(parts) + "\n"


def _check_made(folder: Path, quantization: dict[str, Any]) -> None:
    """Raise `FormatError` unless what the config says of its making can be so."""
    bits, recipe, seed = (quantization.get(name) for name in ("bits", "recipe", "seed"))
    told = {
        "bits": type(bits) is int and bits in CODEBOOKS,
        "recipe": isinstance(recipe, str) and re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", recipe),
        "seed": type(seed) is int,
    }
    for name, fits in told.items():
        if not fits:
            raise FormatError(
                f"the config of {folder} says {name} {quantization.get(name)!r:.100}, which vq4dit does not write: quantize "
                "the original model again"
            )


def _check_reports(num_bytes: int, report: Comparison | None, kmeans: Comparison | None) -> None:
    if report and report.quantized_bytes != num_bytes:
        raise HubError(
            f"the report is of a file of {report.quantized_bytes} bytes, this transformer has {num_bytes}: compare again",
            "card",
        )
    alike = ("original_bytes", "num_pairs", "num_inference_steps", "guidance_scale", "seed", "call")
    if report and kmeans and any(getattr(report, name) != getattr(kmeans, name) for name in alike):
        raise HubError("the report of plain k-means was not measured like the other: compare both with equal options", "card")


def _metadata(base: Base, bits: int, pipeline: type) -> str:
    metadata = copied(base.metadata)
    link = metadata.get("license_link")
    if link and "://" not in link and base.model:  # a file of the base's repository
        metadata["license_link"] = f"{constants.ENDPOINT}/{base.model}/blob/{base.revision or 'main'}/{link}"
    if base.model:
        metadata |= {"base_model": base.model, "base_model_relation": "quantized"}
    if {"prompt", "height"} <= _call_parameters(pipeline).keys():
        metadata.setdefault("pipeline_tag", "text-to-video" if makes_films(pipeline) else "text-to-image")
    tags = ["vq4dit", "quantization", f"{bits}-bit", "diffusion"]
    return ModelCardData(library_name="diffusers", tags=tags, **metadata).to_yaml().strip()


def _call_parameters(pipeline: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(undecorated_call(pipeline)).parameters


def _introduction(repo_id: str, base: Base, quantization: dict[str, Any]) -> str:
    if base.model:
        at = f", commit `{base.revision}`" if base.revision else ", commit not recorded"
        told = f"{_linked(base.model)}{at}"
    else:
        told = "a folder that is not on the Hub, so no id and no commit can be named"
    return (
        f"# {repo_id.split('/')[-1]}\n\nA diffusion transformer at **{quantization['bits']} bits per weight**, quantized with "
        "vq4dit, an open implementation of VQ4DiT ([arXiv:2408.17131](https://arxiv.org/abs/2408.17131)).\n\n"
        f"Base model: {told}."
    )


def _loading(repo_id: str, pipeline: type, index: dict[str, Any], reference: Reference | None, call: Mapping[str, Any]) -> str:
    name = pipeline.__name__
    imported, loaded, told = name, f'pipeline = {name}.from_pretrained("{repo_id}")', ""
    if reference:
        kinds = {part: parts_of(index)[part][1] for part in denoiser_parts(index)}
        imported = ", ".join(sorted({name, *kinds.values()}))
        lines = [f'{part} = {kind}.from_pretrained("{repo_id}", subfolder="{part}")' for part, kind in kinds.items()]
        given = "".join(f", {part}={part}" for part in kinds)
        revision = f'revision="{reference.revision}"' + (f', variant="{reference.variant}"' if reference.variant else "")
        loaded = "\n".join([*lines, f'pipeline = {name}.from_pretrained("{reference.model}", {revision}{given})'])
        told = (
            f"This repository does not hold the rest of the pipeline. It is that of {_linked(reference.model)} at commit "
            f"`{reference.revision}`: {', '.join(reference.parts)}, {amount(sum(reference.files.values()))}.\n\n"
        )
    return (
        f"## Load it\n\n```bash\npip install git+{source()}\n```\n\n{told}```python\n"
        f"import vq4dit  # teaches diffusers to read packed models\nfrom diffusers import {imported}\n\n{loaded}"
        f'{_drawing(pipeline, call)}\n```\n\nWithout `import vq4dit`, diffusers says "Unknown quantization type".'
    )


def _linked(model: str) -> str:
    return f"[{model}]({constants.ENDPOINT}/{model})"


def _drawing(pipeline: type, call: Mapping[str, Any]) -> str:
    """A line of code that draws as the model was calibrated; none for a pipeline that draws otherwise."""
    parameters = _call_parameters(pipeline)
    told = "".join(f", {name}={_literal(value)}" for name, value in call.items() if name in parameters)
    drawn = "video = {}.frames[0]" if makes_films(pipeline) else "image = {}.images[0]"
    if "class_labels" in parameters:
        return "\n" + drawn.format(f"pipeline([0], num_inference_steps=25{told})") + "  # class 0"
    draws = {"prompt", "height"} <= parameters.keys()  # and makes no sound
    return "\n" + drawn.format(f'pipeline("{HELD_OUT[0]}"{told})') if draws else ""


def _literal(value: Any) -> str:
    """A value as Python code that ends no block of code in Markdown, and is no HTML."""
    return re.sub("[`<]", lambda mark: f"\\x{ord(mark[0]):x}", ascii(value))


def source() -> str:
    """Where this vq4dit was installed from, for others to do the same: a Space's repository, or pip's own record."""
    if space := os.environ.get("SPACE_ID"):
        return f"{constants.ENDPOINT}/spaces/{space}"
    try:
        record = json.loads(distribution("vq4dit").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        record = {}
    return record.get("url", "") if "vcs_info" in record else "<repository of vq4dit>"


def _measured(num_bytes: int, quantization: dict[str, Any], report: Comparison | None, kmeans: Comparison | None) -> str:
    bits, recipe = quantization["bits"], quantization["recipe"]
    either = report or kmeans
    rows = [_row("base", either.original_bytes if either else None, "0", "–", "1")]
    rows.append(_figures(f"**this model**, {bits} bits, recipe `{recipe}`", num_bytes, report))
    if recipe != "kmeans":
        rows.append(_figures("plain k-means, same bits", kmeans.quantized_bytes if kmeans else None, kmeans))
    head = "| | transformer, bytes as stored | noise error | PSNR, dB | SSIM |\n|---|---|---|---|---|"
    text = f"## Measured\n\n{head}\n" + "\n".join(rows)
    if report is None:
        return f"{text}\n\nNobody compared this model with its base before publishing it."
    told = {"guidance": f"{report.guidance_scale:g}"} if report.guidance_scale else {}
    drawn_with = "".join(f", {plain(name)} {plain(value)}" for name, value in {**told, **report.call}.items())
    return (
        f"{text}\n\nMeasured on this packed file, by `python -m vq4dit compare`: {report.num_pairs} pairs of samples with the "
        f"same seeds (from {report.seed}), {report.num_inference_steps} steps{drawn_with}. Noise error is the squared error of "
        "the guided prediction over its power, on trajectories that calibration never saw. PSNR and SSIM compare with the "
        "base's sample of the same seed, so they punish any change, also one that looks as good.\n\n"
        "![pairs of images](samples.png)\n\n*The same is drawn from the same seeds. Top: base. Middle: this model. Bottom: "
        "their difference, four times amplified.*"
    )


def _figures(name: str, num_bytes: int | None, report: Comparison | None) -> str:
    if report is None:
        return _row(name, num_bytes, *["not measured"] * 3)
    return _row(name, num_bytes, f"{report.noise_nmse:.4f}", f"{report.psnr_db:.2f}", f"{report.ssim:.4f}")


def _row(name: str, num_bytes: int | None, *figures: str) -> str:
    return f"| {name} | {'not measured' if num_bytes is None else f'{num_bytes:,}'} | {' | '.join(figures)} |"


def _limits(base: Base, report: Comparison | None) -> str:
    lines = [
        "- Quantized weights are approximations: with the same seed, images differ from the base's.",
        f"- What {base.name} cannot or should not do, this model cannot or should not do either.",
        "- No FID and no human judgement was measured."
        + (f" The figures above rest on {report.num_pairs} pairs of images." if report else " No figure at all was measured."),
    ]
    licence = licence_of(base)
    told = (
        f"{plain(licence)}, as of the base" if licence else "not known: ask the author of the base before you use or share it"
    )
    return "## Limits\n\n" + "\n".join(lines) + f"\n\n## Licence\n\n{told}."
