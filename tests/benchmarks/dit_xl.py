"""No toy: a transformer of DiT-XL/2's shape (675 M parameters, random weights) through the real commands.

    python tests/benchmarks/dit_xl.py WORK [--bits 2 3 4] [--learn paper fitting best]

Writes a pipeline folder with random weights to WORK (1.4 GB, kept for the next run), then runs `python -m vq4dit quantize`
on it in processes of their own and prints seconds, peak memory, and the bytes of the file beside the predicted ones. `paper`
learns for ten steps; `best` is whole, and `fitting`, its first block, is quicker to see.
"""

import argparse
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from process import run_vq4dit

from vq4dit.config import QuantizationSettings, Recipe
from vq4dit.disk.job import Job
from vq4dit.memory import peak_memory
from vq4dit.pipelines.inspect import inspect
from vq4dit.pipelines.load import load_pipeline
from vq4dit.progress import Progress
from vq4dit.recipes.quantize import run

LAYERS_OF_A_BLOCK = 7


def write_model(folder: Path) -> None:
    """DiT-XL/2 in fp16 with random weights, and one embedder copied into all blocks as the converter does."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
    ).half()
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--learn", nargs="*", default=["paper", "fitting"], choices=["paper", "fitting", "best"])
    args = parser.parse_args()
    model = args.work / "dit-xl-2-random"
    if not (model / "model_index.json").exists():
        write_model(model)
    for bits in args.bits:
        quantize(model, args.work, "kmeans", bits)
    accounting = inspect(str(model), widths=[2], recipe="kmeans").predictions[0].paper_accounting()
    print("the paper's accounting at 2 bits:", {key: round(value, 2) for key, value in accounting.items()})
    for recipe in args.learn:
        if recipe == "fitting":
            fit(model, args.work)
        else:
            quantize(model, args.work, recipe, 2, *(["--steps", "10", "--trajectories", "1"] if recipe == "paper" else []))


class FirstBlockIsFitted(Exception):
    """Enough was seen: all blocks are alike."""


def fit(model: Path, work: Path) -> None:
    """The first block of `best` in this process; its peak is also that of whatever ran in it before."""
    original = load_pipeline(str(model))

    def stop_after_a_block(progress: Progress) -> None:
        if progress.done >= LAYERS_OF_A_BLOCK:
            raise FirstBlockIsFitted

    started = time.monotonic()
    folder = work / "fitting.job"
    shutil.rmtree(folder, ignore_errors=True)
    with Job.open(folder, QuantizationSettings(recipe="best"), original, resume=False) as job:
        with suppress(FirstBlockIsFitted):
            run(job, original, on_progress=stop_after_a_block)
        job.remove()
    seconds, peak = time.monotonic() - started, peak_memory(torch.device("cpu")) / 1e9
    print(f"best, sensitivities, walk and first block: {seconds:.0f} s, peak {peak:.2f} GB")


def quantize(model: Path, work: Path, recipe: Recipe, bits: int, *options: str) -> None:
    """Run the command as a process of its own and print what it cost and what it wrote."""
    output = work / f"{recipe}-{bits}bit"
    shutil.rmtree(work / f"{output.name}.job", ignore_errors=True)  # of a run that was stopped
    arguments = ["--output", str(output), "--bits", str(bits), "--recipe", recipe, "--overwrite", "--json", *options]
    measured = run_vq4dit("quantize", str(model), *arguments)
    report = json.loads(measured.printed)
    predicted = inspect(str(model), widths=[bits], recipe=recipe).predictions[0].file_bytes / 1e6
    print(
        f"{recipe} {bits} bits {' '.join(options)}: {measured.seconds:.0f} s, peak {measured.peak_bytes / 1e9:.2f} GB, "
        f"{len(report['layers'])} layers, {report['transformer_bytes'] / 1e6:.2f} MB written, {predicted:.2f} MB predicted",
        flush=True,
    )


if __name__ == "__main__":
    main()
