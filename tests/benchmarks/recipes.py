"""The README's table: error, image quality, bytes and seconds of every recipe at 2, 3 and 4 bits, from files on disk.

    python tests/benchmarks/recipes.py [--model assets/emoji-dit] [--work DIR] [--seed 0] [--only NAME ...]

Each row is quantized by `python -m vq4dit quantize` in a process of its own (a finished one in WORK is not made again),
loaded back from its file, and compared with the original on 16 held-out trajectories and 64 same-seed images.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch
from process import run_vq4dit

from vq4dit.evaluation import compare
from vq4dit.inspection import tensor_bytes
from vq4dit.loading import load_pipeline
from vq4dit.zero_data import num_classes

ROWS: dict[str, list[str]] = {
    "kmeans, 2 bits": ["--bits", "2", "--recipe", "kmeans"],
    "paper n = 1, 2 bits": ["--bits", "2", "--recipe", "paper", "--candidates", "1"],
    "paper n = 2, 2 bits": ["--bits", "2", "--recipe", "paper"],
    "kmeans, 3 bits": ["--bits", "3", "--recipe", "kmeans"],
    "paper n = 2, 3 bits": ["--bits", "3", "--recipe", "paper"],
    "kmeans, 4 bits": ["--bits", "4", "--recipe", "kmeans"],
    "paper n = 2, 4 bits": ["--bits", "4", "--recipe", "paper"],
    "paper n = 2 from uniform ratios, 2 bits": ["--bits", "2", "--recipe", "paper", "--ratio-start", "uniform"],
    "paper n = 3, 2 bits": ["--bits", "2", "--recipe", "paper", "--candidates", "3"],
    "paper n = 4, 2 bits": ["--bits", "2", "--recipe", "paper", "--candidates", "4"],
}


def quantize(model: str, output: Path, options: list[str], seed: int) -> dict:
    """Run the command unless its report is there already; seconds and peak memory are the process's own."""
    report = output.with_suffix(".json")
    if report.exists():
        return json.loads(report.read_text())
    measured = run_vq4dit("quantize", model, "--output", str(output), *options, "--seed", str(seed), "--resume", "--json")
    values = {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes}
    report.write_text(json.dumps(values))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[2] / "assets" / "emoji-dit"))
    parser.add_argument("--work", type=Path, default=Path("recipes-work"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    original = load_pipeline(args.model)
    count = num_classes(original)
    labels = [i * count // args.images for i in range(args.images)]
    print(f"{args.model}, {date.today()}, {platform.machine()} {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"16 held-out trajectories of 25 steps, {args.images} images, guidance 4, seed {args.seed}\n")
    print("| recipe | transformer, MB | noise_nmse | PSNR, dB | SSIM | seconds | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only:
        output = args.work / f"{name.replace(' ', '-').replace(',', '').replace('=', '')}-seed{args.seed}"
        made = quantize(args.model, output, ROWS[name], args.seed)
        sizes = tensor_bytes(args.model), tensor_bytes(str(output))
        report, _ = compare(original, load_pipeline(str(output)), *sizes, labels=labels, seed=args.seed)
        print(
            f"| {name} | {sizes[1] / 1e6:.2f} | {report.noise_nmse:.5f} | {report.psnr_db:.1f} | {report.ssim:.3f} | "
            f"{made['seconds']:.0f} | {made['peak_bytes'] / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
