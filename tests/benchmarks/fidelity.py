"""What every method costs in quality: the table in README.md beside this file, its plot, how the default holds up elsewhere.

    python tests/benchmarks/fidelity.py [--model assets/emoji-dit] [--work DIR] [--seeds 0 1 2] [--only NAME ...] [--plot PNG]
    python tests/benchmarks/fidelity.py --model assets/emoji-flux --prompts assets/emoji_flux_prompts.txt
    python tests/benchmarks/fidelity.py --transfer "best, 2 bits"      # unseen guidance, step counts, scheduler
    python tests/benchmarks/fidelity.py --picture "best, 2 bits" PNG   # original, quantized, difference

Recipes of vq4dit are quantized by `python -m vq4dit quantize` in a process of its own and loaded back from the file; what
WORK holds of this model already is neither made nor measured again. With several seeds (of quantizing and of measuring
alike) a row is their mean, and the lowest and highest stand behind it.

Round-to-nearest and GPTQ are made here, without a packed format: their bits per weight count b bits for each weight and an fp16
scale and offset for each row or group. Noise errors are measured on 16 held-out zero-data trajectories of 25 steps, PSNR and
SSIM on same-seed images of classes spread over all. A model of prompts is told what `suggested_call` says; of the lines of
--prompts every eighth is held out, to measure with, and the others are what it is calibrated on.
"""

import argparse
import copy
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from process import run_vq4dit
from scalar_methods import SCALAR
from torch import Tensor

from vq4dit.bundled import suggested_call
from vq4dit.cli.options import prompts_file
from vq4dit.config import CODEBOOKS, EntropyCodingConfig
from vq4dit.denoisers import denoiser_of
from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import fingerprint
from vq4dit.evaluation.images import SamplePair, grid, label_ids, sample
from vq4dit.evaluation.metrics import layer_errors, noise_nmse
from vq4dit.models.blocks import find_targets
from vq4dit.models.conditions import Condition, condition_kind, num_classes
from vq4dit.models.prompts import HELD_OUT, PROMPTS
from vq4dit.models.rehearsal import rehearse
from vq4dit.models.student import student_with
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.pipelines.load import load_pipeline
from vq4dit.randomness import named_generator
from vq4dit.recipes.layerwise import groups_in_turn, record_replays

ROOT = Path(__file__).parents[2]
GUIDANCE = (1.5, 4.0)
RECIPES = {
    "kmeans": ["--recipe", "kmeans"],
    "paper n = 1": ["--recipe", "paper", "--candidates", "1"],
    "paper n = 2": ["--recipe", "paper", "--candidates", "2"],
    "paper n = 3": ["--recipe", "paper", "--candidates", "3"],
    "paper n = 4": ["--recipe", "paper", "--candidates", "4"],
    "best": ["--recipe", "best"],
}


ROWS = [f"{name}, {bits} bits" for bits in CODEBOOKS for name in (*SCALAR, *RECIPES)]


def method_and_bits(row: str) -> tuple[str, int]:
    name, width = row.rsplit(", ", 1)
    return name, int(width.split()[0])


class Conditions(NamedTuple):
    """What is calibrated with, and what is measured with."""

    calibration_call: dict[str, Any]
    calls: dict[str, dict[str, Any]]  # to measure noise errors with, by the name of the figure
    prompts: list[str]  # to calibrate on
    held_out: list[str]

    def drawn(self, original: Any, count: int) -> list[Condition]:
        if condition_kind(original) == "prompt":
            return [self.held_out[i % len(self.held_out)] for i in range(count)]
        return [i * num_classes(original) // count for i in range(count)]


def conditions_for(original: Any, model: str, prompts: Path | None) -> Conditions:
    if condition_kind(original) != "prompt":
        calls = {f"nmse_{g}": {"guidance_scale": g} for g in GUIDANCE}
        return Conditions({"guidance_scale": GUIDANCE[-1]}, calls, [], [])
    call = suggested_call(model)
    if prompts is None:
        return Conditions(call, {"nmse": call}, list(PROMPTS), list(HELD_OUT))
    lines = prompts_file(str(prompts))
    return Conditions(call, {"nmse": call}, [line for i, line in enumerate(lines) if i % 8], lines[::8])


@torch.no_grad()
def scalar_pipeline(original: Any, conditions: Conditions, name: str, bits: int, seed: int) -> tuple[Any, dict[str, float]]:
    """The pipeline with rounded weights, and its figures."""
    started = time.monotonic()
    k, dim = CODEBOOKS[bits]
    targets, _ = find_targets(original.transformer, dim, k)
    transformer = copy.deepcopy(original.transformer)
    generator = named_generator(seed, "layer by layer")
    sampling = rehearse(original, conditions.calibration_call, prompts=conditions.prompts or PROMPTS)
    replays = record_replays(original, sampling, generator, EntropyCodingConfig())
    teacher = replays.of(original.transformer)
    bits_used = weights = 0.0
    for group in groups_in_turn(teacher, teacher, list(targets), num_classes=replays.num_classes):
        moments: list[Tensor] = []

        def second_moments(group: Any = group, moments: list[Tensor] = moments) -> Tensor:
            if not moments:
                moments.append(group.statistics().about_zero()[0])
            return moments[0]

        for layer in group.names:
            weight = targets[layer].weight
            rounded, bits_per_weight = SCALAR[name](weight, bits, second_moments)
            transformer.get_submodule(layer).weight.copy_(rounded)
            bits_used += bits_per_weight * weight.numel()
            weights += weight.numel()
    pipeline = copy.copy(original)
    pipeline.register_modules(transformer=transformer)
    rest = sum(p.numel() for p in student_with(original.transformer, {}).parameters()) - weights  # equal embedders once
    megabytes = (bits_used / 8 + 2 * rest) / 1e6
    return pipeline, {"bits_per_weight": bits_used / weights, "megabytes": megabytes, "seconds": time.monotonic() - started}


# --- vq4dit's own ----------------------------------------------------------------------------------------------------


def stem_of(row: str, seed: int) -> str:
    """What the files of a row are called."""
    return f"{row.replace(',', '').replace(' ', '-').replace('=', '')}-seed{seed}"


def recipe_pipeline(original: Any, args: argparse.Namespace, row: str, seed: int) -> tuple[Any, dict[str, float]]:
    """Quantize by the command, unless that is done already, and load the file."""
    name, bits = method_and_bits(row)
    output = args.work / stem_of(row, seed)
    report = output.with_suffix(".json")
    if not report.exists():
        options = [*RECIPES[name], "--bits", str(bits), "--seed", str(seed), "--resume", "--json"]
        if name != "kmeans" and (prompts := conditions_for(original, args.model, args.prompts).prompts):
            write_atomically(args.work / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts).encode())
            options += ["--prompts", str(args.work / "prompts.txt")]
        made = run_vq4dit("quantize", args.model, "--output", str(output), *options)
        report.write_text(json.dumps({"seconds": made.seconds, "peak_gb": made.peak_bytes / 1e9}))
    pipeline = load_pipeline(str(output))
    layers = layer_errors(denoiser_of(original), denoiser_of(pipeline))
    weights = sum(layer.rows * layer.columns for layer in layers)
    used = sum(layer.bits_per_weight * layer.rows * layer.columns for layer in layers)
    figures = {"bits_per_weight": used / weights, "megabytes": tensor_bytes(str(output)) / 1e6}
    return pipeline, figures | json.loads(report.read_text())


def measure(
    original: Any, pipeline: Any, conditions: Conditions, images: np.ndarray, drawn: list[Condition], seed: int
) -> dict[str, float]:
    among = conditions.held_out or HELD_OUT
    figures = {
        name: noise_nmse(original, pipeline, call=call, prompts=among, seed=seed) for name, call in conditions.calls.items()
    }
    seeds = [seed + i for i in range(len(drawn))]
    found = sample(pipeline, drawn, seeds, call=drawing_call(conditions))
    pairs = [SamplePair(condition, s, a, b) for condition, s, a, b in zip(drawn, seeds, images, found, strict=True)]
    return figures | {
        "psnr_db": float(np.mean([pair.psnr for pair in pairs])),
        "ssim": float(np.mean([pair.ssim for pair in pairs])),
    }


def drawing_call(conditions: Conditions) -> dict[str, Any]:
    """Classes are drawn with the pipeline's own defaults."""
    return conditions.calibration_call if conditions.held_out else {}


# --- tables and the plot ---------------------------------------------------------------------------------------------


COLUMNS = {  # of the table, where they were measured: how each figure is printed
    "bits_per_weight": "{:.2f}",
    "megabytes": "{:.2f}",
    "nmse": "{:.5f}",
    "nmse_1.5": "{:.5f}",
    "nmse_4.0": "{:.5f}",
    "psnr_db": "{:.1f}",
    "ssim": "{:.3f}",
    "seconds": "{:.0f}",
    "peak_gb": "{:.1f}",
}


def table(original: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    conditions = conditions_for(original, args.model, args.prompts)
    columns = {name: form for name, form in COLUMNS.items() if not name.startswith("nmse") or name in conditions.calls}
    print(f"| method | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    references: dict[int, np.ndarray] = {}
    rows = []
    for row in args.only:
        found = [figures_of(original, args, conditions, row, seed, references) for seed in args.seeds]
        cells = [cell([figures[name] for figures in found if name in figures], form) for name, form in columns.items()]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
        name, bits = method_and_bits(row)
        means = {column: float(np.mean([figures[column] for figures in found])) for column in found[0]}
        rows.append({"name": name, "bits": bits} | means)
    return rows


def cell(values: list[float], form: str) -> str:
    """The mean, and the lowest and highest if they print differently."""
    if not values:
        return ""
    low, mean, high = (form.format(value) for value in (min(values), float(np.mean(values)), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def figures_of(
    original: Any, args: argparse.Namespace, conditions: Conditions, row: str, seed: int, references: dict[int, np.ndarray]
) -> dict[str, float]:
    """All figures of a row with one seed; kept in WORK. `references`: images of the original by seed, made when needed."""
    kept = args.work / f"{stem_of(row, seed)}-{args.images}-images.figures.json"
    if kept.exists():
        return json.loads(kept.read_text())
    name, bits = method_and_bits(row)
    if name in SCALAR:
        pipeline, figures = scalar_pipeline(original, conditions, name, bits, seed)
    else:
        pipeline, figures = recipe_pipeline(original, args, row, seed)
    drawn = conditions.drawn(original, args.images)
    if seed not in references:
        call = drawing_call(conditions)
        references[seed] = sample(original, drawn, [seed + i for i in range(args.images)], call=call)
    figures |= measure(original, pipeline, conditions, references[seed], drawn, seed)
    write_atomically(kept, json.dumps(figures, indent=1).encode())
    return figures


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Noise error against the file's bytes, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    error = "nmse" if "nmse" in rows[0] else "nmse_1.5"
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted((row["megabytes"], row[error]) for row in rows if row["name"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == "best" else 1.5)
    axes.set(yscale="log", xlabel="transformer file, MB", ylabel=error.replace("nmse_", "nmse, guidance "))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def transfer(original: Any, args: argparse.Namespace) -> None:
    """Noise errors of one row where calibration never looked, and of `paper` at the same bits after a slash."""
    beside = f"paper n = 2, {args.transfer.split(', ')[-1]}"
    pipelines = [recipe_pipeline(original, args, row, args.seeds[0])[0] for row in (args.transfer, beside)]
    print(f"{args.transfer} / {beside}\n")
    ddim = original.scheduler
    solver = DPMSolverMultistepScheduler.from_config(ddim.config)
    print("| scheduler | steps | " + " | ".join(f"guidance {g:g}" for g in (1, 1.5, 4, 7)) + " |")
    print("|---|---|---|---|---|---|")
    for scheduler_name, scheduler in (("DDIM", ddim), ("DPM-Solver++", solver)):
        for steps in (10, 25, 50, 100):
            original.register_modules(scheduler=scheduler)
            cells = []
            for g in (1.0, 1.5, 4.0, 7.0):
                settings = {"num_trajectories": 8, "num_inference_steps": steps, "seed": args.seeds[0]}
                settings["call"] = {"guidance_scale": g}
                cells.append(" / ".join(f"{noise_nmse(original, pipeline, **settings):.4f}" for pipeline in pipelines))
            print(f"| {scheduler_name} | {steps} | " + " | ".join(cells) + " |", flush=True)


SUBJECTS = ["grinning face", "panda", "unicorn", "maple leaf", "hamburger", "tractor", "guitar", "gift"]


def picture(original: Any, args: argparse.Namespace) -> None:
    """Some subjects: original, quantized and their difference, one above the other, at twice their size; guidance 3."""
    row, path = args.picture
    pipeline, _ = recipe_pipeline(original, args, row, args.seeds[0])
    labels, seeds = label_ids(original, SUBJECTS), [args.seeds[0] + i for i in range(len(SUBJECTS))]
    both = (sample(p, labels, seeds, call={"guidance_scale": 3.0}) for p in (original, pipeline))
    pairs = [SamplePair(*values) for values in zip(labels, seeds, *both, strict=True)]
    shown = [
        getattr(pair, kind).repeat(2, 0).repeat(2, 1) for kind in ("original", "quantized", "difference") for pair in pairs
    ]
    grid(shown, len(pairs), gap=4).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets" / "emoji-dit"))
    parser.add_argument("--work", type=Path, default=Path("fidelity-work"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the plot has means; other tasks take the first")
    parser.add_argument("--prompts", type=Path, help="a model's own, a line each; by default those of the library")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--plot", type=Path, help="also draw error against bytes")
    parser.add_argument(
        "--transfer",
        choices=[row for row in ROWS if method_and_bits(row)[0] in RECIPES],
        help="only this: one row under unseen settings",
    )
    parser.add_argument("--picture", nargs=2, metavar=("ROW", "PNG"), help="only this: images of one row beside the original's")
    args = parser.parse_args()
    original = load_pipeline(args.model)
    args.work /= fingerprint(original)[:12]
    args.work.mkdir(parents=True, exist_ok=True)
    threads, version = torch.get_num_threads(), torch.__version__
    print(f"{args.model}, {date.today()}, {platform.machine()}, {threads} threads, torch {version}")
    print(f"n = {args.images} images, seeds {args.seeds}\n")
    if args.transfer:
        transfer(original, args)
        return
    if args.picture:
        picture(original, args)
        return
    rows = table(original, args)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
