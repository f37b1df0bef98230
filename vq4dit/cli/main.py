"""`python -m vq4dit`: inspect, quantize, sample, compare and push from the terminal.

Exit codes: 0 done; 1 something a person can mend, told in one paragraph; 2 wrong usage; 130 interrupted with Ctrl-C.
Figures go to standard output (`--json` for machines), progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.compare import compare_command
from vq4dit.cli.inspect import inspect_command
from vq4dit.cli.options import (
    add_device,
    chosen_device,
    class_names,
    folder_path,
    guidance,
    model_name,
    picture_path,
    positive,
    seed,
)
from vq4dit.cli.push import add_push_arguments, push_command
from vq4dit.cli.streams import hand_over
from vq4dit.cli.terminal import Console, Parser, Report, errors, notes
from vq4dit.config import CODEBOOKS, RECIPES, CalibrationConfig, QuantizationSettings
from vq4dit.disk.files import check_place, told
from vq4dit.disk.job import Job, check_job_folder
from vq4dit.disk.space import check_space, folder_bytes
from vq4dit.errors import JobError, VQ4DiTError
from vq4dit.evaluation.compare import check_picture, write_picture
from vq4dit.evaluation.metrics import LayerError, check_sampling, grid, image_bytes, label_ids, layer_errors, sample
from vq4dit.interrupts import code_of
from vq4dit.memory import is_out_of_memory, out_of_memory
from vq4dit.models.zero_data import check_supported
from vq4dit.pipelines.inspect import inspect, tensor_bytes
from vq4dit.pipelines.load import load_pipeline, pinned, source_folder
from vq4dit.pipelines.provenance import origin_of
from vq4dit.pipelines.quantizer import decode_mode
from vq4dit.pipelines.repository import located
from vq4dit.pipelines.save import check_output, is_finished, is_result, save
from vq4dit.recipes.estimate import Device, check_fits, estimate
from vq4dit.recipes.quantize import check, run

OPTIONS_OF_PAPER = {  # constants of the calibration, and what they are called here
    "steps": "--steps",
    "num_trajectories": "--trajectories",
    "num_candidates": "--candidates",
    "ratio_start": "--ratio-start",
}


FAILURES = (VQ4DiTError, ValueError, OSError, MemoryError, RuntimeError)
GO_ON = {"quantize": "; go on with the same command and --resume", "push": "; go on with the same command"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        with notes(errors()):
            report = args.command(args)
    except FAILURES as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):  # a fault of ours
            raise
        say(f"[bold red]error:[/] {_reason(error)}")
        return 1
    except KeyboardInterrupt as error:
        say("interrupted" + GO_ON.get(args.name, ""))
        return code_of(error)
    return tell(report, is_all=args.name == "inspect")


def tell(report: Report, is_all: bool) -> int:
    """Tell on standard output what was done. From here on nothing fails any more but the telling; returns the exit code.

    Args:
        is_all: the report is all that was asked for.
    """
    try:
        report()
        hand_over()
    except BrokenPipeError:  # who read it has seen enough
        with suppress(OSError):
            hand_over()
    except FAILURES as error:
        with suppress(OSError):
            hand_over()
        if is_all:
            say(f"[bold red]error:[/] the figures could not be told ({_reason(error)}): give standard output another place")
            return 1
        say(f"the work is done and saved; only its report could not be told ({_reason(error)})")
    except KeyboardInterrupt as error:
        say("interrupted" + ("" if is_all else "; the work is done and saved"))
        return code_of(error)
    return 0


def say(line: str) -> None:
    """One line on standard error."""
    errors().print(line, highlight=False, soft_wrap=True)


def _reason(error: BaseException) -> str:
    text = out_of_memory(error) if not isinstance(error, VQ4DiTError) and is_out_of_memory(error) else str(error)
    return escape(" ".join(text.splitlines()))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m vq4dit", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="name", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], Report], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print the figures as JSON")
        return sub

    sub = add(
        "inspect", inspect_command, "Which layers would be quantized, and the bytes at 2, 3 and 4 bits. Reads headers only."
    )
    sub.add_argument("model", type=model_name, metavar="MODEL", help="a diffusers pipeline folder or a Hub id")
    sub.add_argument("--recipe", default="best", choices=RECIPES, help="default: best")
    _add_keep(sub)

    sub = add("quantize", quantize_command, "Quantize a model into a folder that diffusers loads.")
    sub.add_argument("model", type=model_name, metavar="MODEL", help="a diffusers pipeline folder or a Hub id")
    sub.add_argument("--output", type=folder_path, required=True, metavar="DIR", help="folder to write")
    sub.add_argument("--bits", type=int, default=2, choices=sorted(CODEBOOKS), help="bits per weight (default: 2)")
    sub.add_argument("--recipe", default="best", choices=RECIPES, help="default: best")
    sub.add_argument("--seed", type=seed, default=0)
    _add_keep(sub)
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

    sub = add("sample", sample_command, "Images from an original or a quantized model.")
    sub.add_argument("model", type=model_name, metavar="MODEL")
    sub.add_argument(
        "--labels", type=class_names, required=True, metavar="A,B", help="class names or numbers, separated by commas"
    )
    _add_sampling(sub)
    sub.add_argument("--output", type=picture_path, required=True, metavar="PNG")

    sub = add("compare", compare_command, "Same-seed pictures and figures of an original and a quantized model.")
    sub.add_argument("original", type=model_name, metavar="ORIGINAL")
    sub.add_argument("quantized", type=model_name, metavar="QUANTIZED")
    sub.add_argument("--labels", type=class_names, metavar="A,B", help="classes to draw (default: eight, spread over all)")
    sub.add_argument("--layers", action="store_true", help="also tell what each layer adds to the error (layers.json)")
    _add_sampling(sub)
    sub.add_argument("--output", type=folder_path, required=True, metavar="DIR")
    sub.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")

    add_push_arguments(add("push", push_command, "Publish a quantized model on the Hugging Face Hub, with a card."))
    return parser


def _add_keep(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help='layers to leave in 16 bit, such as "*.ff.*"; repeatable'
    )


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    add_device(sub)
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--steps", type=positive, default=25, help="denoising steps (default: 25)")
    sub.add_argument("--guidance", type=guidance, default=4.0, help="guidance scale (default: 4)")
    sub.add_argument(
        "--decode",
        default="auto",
        choices=["auto", "load", "forward"],
        help="decode a packed model once at load, or in every forward pass (small memory); default: load if memory allows",
    )


def quantize_command(args: argparse.Namespace) -> Report:
    started = time.monotonic()
    device = chosen_device(args)
    check_place(args.output)
    check_not_inside(args.model, args.output)
    revision = pinned(args.model)
    found = inspect(args.model, args.keep, [args.bits], revision=revision)  # refuses what can't be done before weights are read
    settings = settings_of(args)
    kind: Device = "gpu" if device.type == "cuda" else "cpu"
    cost = estimate(found.predictions[0], settings, parameters=found.parameters, tokens=found.tokens, device=kind)
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
    check(pipeline, settings)
    source = source_folder(args.model, revision)
    if seems_done and is_finished(args.output, settings, pipeline, source, args.overwrite):  # killed before it cleaned up
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
            save(quantized, args.output, overwrite=args.overwrite, source=source, origin=origin, scratch=folder)
            job.remove()
    return partial(report_quantized, args, revision, pipeline, quantized, time.monotonic() - started)


def report_quantized(args: argparse.Namespace, revision: str | None, original: Any, quantized: Any, seconds: float) -> None:
    layers = layer_errors(original.transformer, quantized.transformer)
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
    chosen = {field: getattr(args, field) for field in OPTIONS_OF_PAPER if getattr(args, field) is not None}
    if chosen and args.recipe != "paper":
        option = OPTIONS_OF_PAPER[next(iter(chosen))]
        raise ValueError(
            f"{option} belongs to the recipe paper, and the recipe is {args.recipe}: leave it out, or add --recipe paper"
        )
    calibration = CalibrationConfig(**chosen)
    return QuantizationSettings(
        bits=args.bits, recipe=args.recipe, seed=args.seed, keep=tuple(args.keep), calibration=calibration
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


def sample_command(args: argparse.Namespace) -> Report:
    device = chosen_device(args)
    check_picture(args.output)
    with decode_mode(args.decode):
        pipeline = load_pipeline(args.model).to(device)
    check_supported(pipeline)
    labels = label_ids(pipeline, args.labels)
    check_sampling(pipeline, args.steps, args.guidance)
    check_space(args.output, len(labels) * image_bytes(pipeline))
    started = time.monotonic()
    with progress_bars() as on_progress:
        images = sample(
            pipeline,
            labels,
            [args.seed + i for i in range(len(labels))],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            on_progress=on_progress,
        )
    with told(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        check_picture(args.output)  # once more: drawing took its time
        write_picture(args.output, grid(images, columns=min(8, len(images))))
    return partial(report_sampled, args, len(images), time.monotonic() - started)


def report_sampled(args: argparse.Namespace, images: int, seconds: float) -> None:
    if args.json:
        print(json.dumps({"output": str(args.output), "images": images, "seconds": seconds}))
    else:
        Console().print(f"{escape(str(args.output))}: {images} images, {seconds:.1f} s")
