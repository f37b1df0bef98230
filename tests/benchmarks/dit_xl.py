"""No toy: a transformer of DiT-XL/2's shape (675 M parameters, random weights) through the real commands.

    python tests/benchmarks/dit_xl.py WORK [--bits 2 3 4] [--calibration-steps 10]

Writes a pipeline folder with random weights to WORK (1.4 GB, kept for the next run), then runs `python -m vq4dit quantize`
on it in processes of their own and prints seconds, peak memory, and the bytes of the file beside the predicted ones.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from process import run_vq4dit

from vq4dit.inspection import inspect


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
    parser.add_argument("--calibration-steps", type=int, default=10)
    args = parser.parse_args()
    model = args.work / "dit-xl-2-random"
    if not (model / "model_index.json").exists():
        write_model(model)
    predictions = {p.bits: p for p in inspect(str(model)).predictions}
    for bits in args.bits:
        output = args.work / f"kmeans-{bits}bit"
        options = ["--bits", str(bits), "--recipe", "kmeans", "--overwrite", "--json"]
        measured = run_vq4dit("quantize", str(model), "--output", str(output), *options)
        report = json.loads(measured.printed)
        written, predicted = report["transformer_bytes"] / 1e6, predictions[bits].file_bytes / 1e6
        print(
            f"kmeans {bits} bits: {measured.seconds:.0f} s, peak {measured.peak_bytes / 1e9:.2f} GB, "
            f"{len(report['layers'])} layers, {written:.2f} MB written, {predicted:.2f} MB predicted",
            flush=True,
        )
    accounting = predictions[2].paper_accounting()
    print("the paper's accounting at 2 bits:", {key: round(value, 2) for key, value in accounting.items()})
    if args.calibration_steps:
        output = args.work / "paper-2bit"
        options = [
            "--bits",
            "2",
            "--recipe",
            "paper",
            "--steps",
            str(args.calibration_steps),
            "--trajectories",
            "1",
            "--overwrite",
        ]
        measured = run_vq4dit("quantize", str(model), "--output", str(output), *options)
        peak = measured.peak_bytes / 1e9
        print(f"paper 2 bits, {args.calibration_steps} steps of one trajectory: {measured.seconds:.0f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
