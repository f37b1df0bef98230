"""`python -m vq4dit inspect`: what would become of a model, from the headers of its files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial

from rich.markup import escape
from rich.table import Column, Table

from vq4dit.cli.options import add_call, add_keep, call_for, model_name
from vq4dit.cli.terminal import Console, Report
from vq4dit.config import RECIPES
from vq4dit.disk.files import amount
from vq4dit.pipelines.inspect import Inspection, inspect

LEAST_SHARE = 1e-3  # of the parameters, that is worth naming


def add_inspect_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=model_name, metavar="MODEL", help="a diffusers pipeline folder or a Hub id")
    sub.add_argument("--recipe", default="best", choices=RECIPES, help="default: best")
    add_keep(sub)
    add_call(sub)


def inspect_command(args: argparse.Namespace) -> Report:
    return partial(report_inspected, args, inspect(args.model, args.keep, recipe=args.recipe, call=call_for(args)))


def told_kept(inspection: Inspection) -> str:
    """What stays in 16 bit, and what share of the parameters it is."""
    kept = inspection.kept_parameters
    total = sum(kept.values()) + inspection.predictions[0].quantized_weights
    named = [f"{place} {count / total:.1%}" for place, count in kept.items() if count >= LEAST_SHARE * total]
    return f"{sum(kept.values()) / total:.1%} of the parameters stay in 16 bit: {', '.join(named) or 'biases and norms'}"


def report_inspected(args: argparse.Namespace, inspection: Inspection) -> None:
    if args.json:
        values = dataclasses.asdict(inspection) | {"tokens": inspection.positions.tokens}
        for prediction, shown in zip(inspection.predictions, values["predictions"], strict=True):
            shown |= {"file_bytes": prediction.file_bytes, "bits_per_weight": prediction.bits_per_weight}
            if args.recipe != "best":  # which has no codebooks to account for
                shown["paper_accounting"] = prediction.paper_accounting()
        print(json.dumps(values, indent=1))
        return
    console = Console()
    console.print(
        f"{escape(args.model)}: {inspection.class_name}, {inspection.num_blocks} blocks, {inspection.parameters / 1e6:.1f} M "
        f"parameters, {inspection.file_bytes / 1e6:.1f} MB on disk"
    )
    shown = inspection.positions
    text = f" and {shown.text} of text" if shown.text else ""
    console.print(f"calibrated on samples of about {shown.picture} positions{text}, {shown.passes} pass(es) in each step")
    smallest = inspection.predictions[0]
    table = Table(Column("layer", no_wrap=True), "shape", "at 2 bits")
    for layer in smallest.layers:
        table.add_row(layer.name, f"{layer.rows} x {layer.columns}", f"{layer.num_bytes / 1e3:.1f} kB")
    for kept in smallest.kept:
        table.add_row(kept.name, "", escape(f"16 bit: {kept.reason}"))
    console.print(table)
    console.print(escape(told_kept(inspection)))
    if others := inspection.other_bytes:
        told = ", ".join(f"{part} {amount(size)}" for part, size in others.items())
        console.print(f"beside it, copied into a result unless it is quantized with --components reference: {escape(told)}")
    table = Table("bits", "layers quantized", "bits per weight", "transformer file", "against now")
    for p in inspection.predictions:
        ratio = f"{inspection.file_bytes / p.file_bytes:.2f} x smaller"
        table.add_row(str(p.bits), str(len(p.layers)), f"{p.bits_per_weight:.3f}", f"{p.file_bytes / 1e6:.2f} MB", ratio)
    console.print(table)
