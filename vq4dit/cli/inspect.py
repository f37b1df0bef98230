"""`python -m vq4dit inspect`: what would become of a model, from the headers of its files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial

from rich.markup import escape
from rich.table import Column, Table

from vq4dit.cli.options import add_keep, model_name
from vq4dit.cli.terminal import Console, Report
from vq4dit.config import RECIPES
from vq4dit.pipelines.inspect import Inspection, inspect


def add_inspect_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=model_name, metavar="MODEL", help="a diffusers pipeline folder or a Hub id")
    sub.add_argument("--recipe", default="best", choices=RECIPES, help="default: best")
    add_keep(sub)


def inspect_command(args: argparse.Namespace) -> Report:
    return partial(report_inspected, args, inspect(args.model, args.keep, recipe=args.recipe))


def report_inspected(args: argparse.Namespace, inspection: Inspection) -> None:
    if args.json:
        values = dataclasses.asdict(inspection)
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
    smallest = inspection.predictions[0]
    table = Table(Column("layer", no_wrap=True), "shape", "at 2 bits")
    for layer in smallest.layers:
        table.add_row(layer.name, f"{layer.rows} x {layer.columns}", f"{layer.num_bytes / 1e3:.1f} kB")
    for kept in smallest.kept:
        table.add_row(kept.name, "", escape(f"16 bit: {kept.reason}"))
    console.print(table)
    table = Table("bits", "layers quantized", "bits per weight", "transformer file", "against now")
    for p in inspection.predictions:
        ratio = f"{inspection.file_bytes / p.file_bytes:.2f} x smaller"
        table.add_row(str(p.bits), str(len(p.layers)), f"{p.bits_per_weight:.3f}", f"{p.file_bytes / 1e6:.2f} MB", ratio)
    console.print(table)
