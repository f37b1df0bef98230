"""`python -m vq4dit quantize`: a model into a folder that diffusers loads, by a job that can stop and go on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.conditions import check_prompts
from vq4dit.cli.options import (
    add_call,
    add_device,
    add_keep,
    call_for,
    chosen_device,
    folder_path,
    model_name,
    positive,
    prompts_file,
    seed,
)
from vq4dit.cli.streams import standard_error
from vq4dit.cli.terminal import Console, Report
from vq4dit.config import CODEBOOKS, RECIPES, CalibrationConfig, EntropyCodingConfig, QuantizationSettings
from vq4dit.denoisers import denoiser_of
from vq4dit.disk.files import check_place
from vq4dit.disk.job import Job, check_job_folder
from vq4dit.disk.space import check_space, folder_bytes
from vq4dit.errors import JobError
from vq4dit.evaluation.images import check_sampling
from vq4dit.evaluation.metrics import LayerError, layer_errors
from vq4dit.pipelines.inspect import inspect, tensor_bytes
from vq4dit.pipelines.load import load_pipeline, pinned, source_folder
from vq4dit.pipelines.provenance import origin_of
from vq4dit.pipelines.references import COMPONENTS, check_base
from vq4dit.pipelines.repository import located
from vq4dit.pipelines.save import check_output, is_finished, is_result, reference_of, save
from vq4dit.recipes.estimate import Device, check_fits, estimate
from vq4dit.recipes.quantize import check, run

OPTIONS = {  # entries of the recipes' configs, and what they are called here
    "paper": {
        "steps": "--steps",
        "num_trajectories": "--trajectories",
        "num_candidates": "--candidates",
        "ratio_start": "--ratio-start",
    },
    "best": {"tokens": "--tokens"},
}


def add_quantize_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=model_name, metavar="MODEL", help="a diffusers pipeline folder or a Hub id")
    sub.add_argument("--output", type=folder_path, required=True, metavar="DIR", help="folder to write")
    sub.add_argument("--bits", type=int, default=2, choices=sorted(CODEBOOKS), help="bits per weight (default: 2)")
    sub.add_argument("--recipe", default="best", choices=RECIPES, help="default: best")
    sub.add_argument("--seed", type=seed, default=0)
    add_keep(sub)
    add_call(sub)
    sub.add_argument(
        "--prompts",
        type=prompts_file,
        metavar="FILE",
        help="prompts to calibrate on, one a line; those with # are left out (default: a neutral list)",
    )
    sub.add_argument(
        "--components",
        default="copy",
        choices=COMPONENTS,
        help="what becomes of text encoders, VAE and the like: copied into DIR, or fetched from MODEL's repository by whoever "
        "loads DIR, at the commit that was quantized (default: copy)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    sub.add_argument("--resume", action="store_true", help="go on with the unfinished job in DIR.job")
    add_device(sub)
    defaults = CalibrationConfig()
    of_paper = sub.add_argument_group("calibration, only of --recipe paper")
    of_paper.add_argument("--steps", type=positive, help=f"updates (default: {defaults.steps})")
    of_paper.add_argument(
        "--trajectories",
        dest="num_trajectories",
        metavar="TRAJECTORIES",
        type=positive,
        help=f"trajectories side by side (default: {defaults.num_trajectories})",
    )
    of_paper.add_argument(
        "--candidates",
        dest="num_candidates",
        type=int,
        choices=range(1, 5),
        help=f"default: {defaults.num_candidates}",
    )
    of_paper.add_argument("--ratio-start", choices=["uniform", "distance"], help=f"default: {defaults.ratio_start}")
    tokens = EntropyCodingConfig().tokens
    of_best = sub.add_argument_group("only of --recipe best")
    of_best.add_argument(
        "--tokens", type=positive, help=f"of the trajectories that layers are fitted on; fewer are quicker (default: {tokens})"
    )


def quantize_command(args: argparse.Namespace) -> Report:
    started = time.monotonic()
    device = chosen_device(args)
    check_place(args.output)
    check_not_inside(args.model, args.output)
    revision = pinned(args.model)
    if args.components == "reference":
        check_base(args.model, revision)
    settings = settings_of(args)
    call = settings.call_arguments
    tell_suggested(args, call)
    # Refuses what can't be done before weights are read.
    found = inspect(args.model, args.keep, [args.bits], recipe=args.recipe, call=call, revision=revision)
    kind: Device = "gpu" if device.type == "cuda" else "cpu"
    cost = estimate(found, settings, kind, args.components)
    check_fits(cost, args.model, device)
    folder = args.output.with_name(f"{args.output.name}.job")
    seems_done = args.resume and is_result(args.output, settings)
    if not seems_done:
        check_output(args.output, args.overwrite)
    check_place(folder, replaced=False)
    check_job_folder(folder)
    if not seems_done:
        check_space(args.output, cost.disk_bytes - (folder_bytes(folder) if folder.exists() else 0))
    origin = origin_of(args.model, revision, settings)
    pipeline = load_pipeline(args.model, revision=revision).to(device)
    check_prompts(pipeline, args.prompts)
    if call:  # whatever the recipe: it is what the model will be drawn with
        check_sampling(pipeline, 1, call)
    check(pipeline, settings)
    source = source_folder(args.model, revision)
    reference = reference_of(pipeline, source, origin) if args.components == "reference" else None
    if seems_done and is_finished(args.output, settings, pipeline, source, args.overwrite, reference):  # killed before cleaning
        quantized = load_pipeline(str(args.output)).to(device)
        if folder.exists():
            with Job.open(folder, settings, pipeline, resume=True) as job:
                job.remove()
    else:
        check_output(args.output, args.overwrite)
        with Job.open(folder, settings, pipeline, resume=args.resume) as job:
            with progress_bars() as on_progress:
                quantized = run(job, pipeline, on_progress=on_progress)
                assert quantized is not None  # it had all the time it wanted
            origin = dataclasses.replace(origin, fingerprint=job.fingerprint)
            where: dict[str, Any] = {"source": source, "scratch": folder, "components": args.components}
            save(quantized, args.output, overwrite=args.overwrite, origin=origin, **where)
            job.remove()
    return partial(report_quantized, args, revision, pipeline, quantized, time.monotonic() - started)


def tell_suggested(args: argparse.Namespace, call: dict[str, Any]) -> None:
    if call and not args.call:
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in call.items())
        standard_error().write(f"call: {told} (suggested for this model; --call NAME=VALUE takes its place)\n")


def report_quantized(args: argparse.Namespace, revision: str | None, original: Any, quantized: Any, seconds: float) -> None:
    layers = layer_errors(denoiser_of(original), denoiser_of(quantized))
    report = {
        "output": str(args.output),
        "transformer_bytes": tensor_bytes(str(args.output)),
        "original_bytes": tensor_bytes(args.model, revision),
        "seconds": seconds,
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print_layers(report, layers)


def check_not_inside(model: str, output: Path) -> None:
    """Raise `JobError` if writing the output would replace the model itself or a folder around it."""
    folder = (located(model) or Path(model)).resolve()
    if output.exists() and any(part.exists() and output.samefile(part) for part in (folder, *folder.parents)):
        raise JobError(f"the output {output} is, or holds, the model {model} itself: choose another output")


def settings_of(args: argparse.Namespace) -> QuantizationSettings:
    chosen: dict[str, dict[str, Any]] = {recipe: {} for recipe in RECIPES}
    for recipe, options in OPTIONS.items():
        chosen[recipe] = {field: getattr(args, field) for field in options if getattr(args, field) is not None}
        if chosen[recipe] and args.recipe != recipe:
            option = options[next(iter(chosen[recipe]))]
            raise ValueError(
                f"{option} belongs to the recipe {recipe}, and the recipe is {args.recipe}: leave it out, or add --recipe "
                f"{recipe}"
            )
    if args.prompts and args.recipe == "kmeans":
        raise ValueError(
            "--prompts are what a model is calibrated on, and the recipe kmeans calibrates nothing: leave it out, or choose "
            "another recipe"
        )
    if "tokens" in chosen["best"]:  # asked for by a person, so of a large model too
        chosen["best"]["tokens_of_large"] = chosen["best"]["tokens"]
    return QuantizationSettings(
        bits=args.bits,
        recipe=args.recipe,
        seed=args.seed,
        keep=tuple(args.keep),
        call=call_for(args),
        prompts=tuple(args.prompts or ()),
        calibration=CalibrationConfig(**chosen["paper"]),
        entropy_coding=EntropyCodingConfig(**chosen["best"]),
    )


def print_layers(report: dict[str, Any], layers: list[LayerError]) -> None:
    table = Table(Column("layer", no_wrap=True), "shape", "bits per weight", "relative error")
    for layer in layers:
        shape = f"{layer.rows} x {layer.columns}"
        table.add_row(layer.name, shape, f"{layer.bits_per_weight:.3f}", f"{layer.relative_error:.5f}")
    console = Console()
    console.print(table)
    now, before = report["transformer_bytes"], report["original_bytes"]
    console.print(
        f"{escape(report['output'])}: transformer {now / 1e6:.2f} MB, was {before / 1e6:.2f} MB "
        f"({before / now:.2f} x smaller), {report['seconds']:.0f} s"
    )
