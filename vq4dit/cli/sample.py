"""`python -m vq4dit sample`: images from an original or a quantized model."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

from rich.markup import escape

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.options import add_sampling, chosen_device, class_names, model_name, picture_path
from vq4dit.cli.terminal import Console, Report
from vq4dit.disk.files import told
from vq4dit.disk.space import check_space
from vq4dit.evaluation.compare import check_picture, write_picture
from vq4dit.evaluation.images import check_sampling, grid, image_bytes, label_ids, sample
from vq4dit.models.supported import check_supported
from vq4dit.pipelines.decode_modes import decode_mode
from vq4dit.pipelines.load import load_pipeline


def add_sample_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=model_name, metavar="MODEL")
    sub.add_argument(
        "--labels", type=class_names, required=True, metavar="A,B", help="class names or numbers, separated by commas"
    )
    add_sampling(sub)
    sub.add_argument("--output", type=picture_path, required=True, metavar="PNG")


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
