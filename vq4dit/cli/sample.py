"""`python -m vq4dit sample`: images from an original or a quantized model."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.markup import escape

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.conditions import call_of, conditions_of
from vq4dit.cli.options import add_conditions, add_sampling, chosen_device, model_name, picture_path
from vq4dit.cli.terminal import Console, Report
from vq4dit.disk.files import told
from vq4dit.disk.space import check_space
from vq4dit.evaluation.compare import PREVIEW, check_picture, write_picture, write_preview
from vq4dit.evaluation.images import check_sampling, grid, image_bytes, makes_films, sample
from vq4dit.pipelines.decode_modes import decode_mode
from vq4dit.pipelines.load import load_pipeline

COLUMNS = 8  # of the grid; a film's frames have a row of their own


def add_sample_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=model_name, metavar="MODEL")
    add_conditions(sub, required=True)
    add_sampling(sub)
    sub.add_argument("--output", type=picture_path, required=True, metavar="PNG", help="of films also a moving .webp beside it")


def sample_command(args: argparse.Namespace) -> Report:
    device = chosen_device(args)
    check_picture(args.output)
    with decode_mode(args.decode):
        pipeline = load_pipeline(args.model).to(device)
    conditions, call = conditions_of(pipeline, args), call_of(pipeline, args.model, args)
    check_sampling(pipeline, args.steps, call)
    outputs = [args.output, *([args.output.with_suffix(PREVIEW)] if makes_films(type(pipeline)) else [])]
    for output in outputs:
        check_picture(output)
    check_space(args.output, len(conditions) * len(outputs) * image_bytes(pipeline, call))
    started = time.monotonic()
    with progress_bars() as on_progress:
        images = sample(
            pipeline,
            conditions,
            [args.seed + i for i in range(len(conditions))],
            num_inference_steps=args.steps,
            call=call,
            on_progress=on_progress,
        )
    with told(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    write_samples(outputs if images.ndim == 5 else outputs[:1], images)
    return partial(report_sampled, args, len(images), time.monotonic() - started)


def write_samples(outputs: list[Path], images: np.ndarray) -> None:
    """A grid of images; of films their strips, and all of them side by side in motion."""
    columns = min(COLUMNS, len(images))
    for output in outputs:
        with told(output):
            check_picture(output)  # once more: drawing took its time
            if output.suffix == PREVIEW:
                write_preview(output, list(images), columns)
            else:
                write_picture(output, grid(images, columns=1 if images.ndim == 5 else columns))


def report_sampled(args: argparse.Namespace, images: int, seconds: float) -> None:
    if args.json:
        print(json.dumps({"output": str(args.output), "images": images, "seconds": seconds}))
    else:
        Console().print(f"{escape(str(args.output))}: {images} images, {seconds:.1f} s")
