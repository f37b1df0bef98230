"""`python -m vq4dit compare`: an original and a quantized model side by side, in figures and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import nullcontext
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.conditions import call_of, conditions_of
from vq4dit.cli.options import add_conditions, add_sampling, chosen_device, folder_path, model_name
from vq4dit.cli.terminal import Console, Report
from vq4dit.disk.space import check_space
from vq4dit.evaluation.compare import KINDS, check_comparison_output, write_comparison
from vq4dit.evaluation.images import image_bytes, makes_films
from vq4dit.evaluation.layer_errors import check_comparable, layer_noise_errors
from vq4dit.evaluation.metrics import Comparison, compare
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.decode_modes import decode_mode
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.pipelines.load import load_pipeline
from vq4dit.quiet import without_remarks


def add_compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("original", type=model_name, metavar="ORIGINAL")
    sub.add_argument("quantized", type=model_name, metavar="QUANTIZED")
    add_conditions(sub, required=False)
    sub.add_argument("--layers", action="store_true", help="also tell what each layer adds to the error (layers.json)")
    add_sampling(sub)
    sub.add_argument("--output", type=folder_path, required=True, metavar="DIR")
    sub.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")


def compare_command(args: argparse.Namespace) -> Report:
    device = chosen_device(args)
    check_comparison_output(args.output, args.overwrite)
    with decode_mode(args.decode):
        original, quantized = (load_pipeline(model).to(device) for model in (args.original, args.quantized))
    conditions, call = conditions_of(original, args), call_of(quantized, args.quantized, args)
    check_comparable(original, quantized)
    files = 2 * len(KINDS) * len(conditions) * (2 if makes_films(type(original)) else 1)  # each alone, and all in one
    check_space(args.output, files * image_bytes(original, call))
    drawn: dict[str, Any] = {"call": call, "prompts": args.prompts or HELD_OUT, "seed": args.seed}
    ours_are_silent = nullcontext() if args.prompts else without_remarks()  # who wrote a prompt wants to know what is cut off
    with progress_bars() as on_progress, ours_are_silent:
        report, pairs = compare(
            original,
            quantized,
            tensor_bytes(args.original),
            tensor_bytes(args.quantized),
            conditions=conditions,
            num_inference_steps=args.steps,
            on_progress=on_progress,
            **drawn,
        )
    parts: dict[str, float] = {}
    if args.layers:
        with progress_bars() as on_progress:
            parts = layer_noise_errors(original, quantized, on_progress=on_progress, **drawn)
    names = {index: name for name, index in (getattr(original, "labels", None) or {}).items()}
    write_comparison(args.output, report, pairs, names, parts, overwrite=args.overwrite)
    return partial(report_compared, args, report, parts)


def report_compared(args: argparse.Namespace, report: Comparison, parts: dict[str, float]) -> None:
    values = dataclasses.asdict(report)
    if args.json:
        print(json.dumps(values, indent=1))
        return
    table = Table("figure", "value")
    call = values.pop("call")
    for key, value in {**values, **call}.items():
        table.add_row(escape(key), f"{value:.6g}" if isinstance(value, float) else escape(str(value)))
    Console().print(table)
    if parts:
        print_worst_layers(parts)
    Console().print(f"pictures and report.json in {escape(str(args.output))}")


def print_worst_layers(errors: dict[str, float], count: int = 8) -> None:
    """Where the remaining error is: the layers that, quantized alone, put the noise off most."""
    total = sum(errors.values()) or 1.0  # a model compared with itself has no error
    table = Table(Column("layer", no_wrap=True), "noise_nmse of it alone", "of the sum of all")
    for name in sorted(errors, key=errors.__getitem__, reverse=True)[:count]:
        table.add_row(name, f"{errors[name]:.2g}", f"{errors[name] / total:.1%}")
    Console().print(table)
