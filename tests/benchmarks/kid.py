"""Do the quantized model's images, as a crowd, look as much like real emoji as the original's do?

    python tests/benchmarks/kid.py QUANTIZED [QUANTIZED ...] [--model assets/emoji-dit] [--images 2000] [--work DIR]

Generates the same classes and seeds with the original and each quantized model and prints the KID (kernel distance of
features, arXiv:1801.01401) of each crowd to the real images of its subjects. Features and real images are those of
`assets/evaluate_emoji_dit.py`: the values compare with each other and with no published KID. Needs `npm` and the packages in
tests/requirements.txt; what WORK holds already is not made again, so two processes can make the images of two models.

Intervals are of a bootstrap (95 %, 1,000 resamples): the generated images of each class are drawn again with replacement, each
with its twin of the same seed, so that a difference to the original is one of pairs; real images stay. No pair is made of an
image with itself, and images of a class are alike, so that resamples lie a little lower on average: intervals are moved back
by that. Inside the original's interval means that the original could have drawn such images with other seeds; whether a
model is worse with the same seeds is what the difference tells.
"""

import argparse
import io
import platform
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import fingerprint
from vq4dit.pipelines.load import load_pipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "assets"))

from emoji_evaluation import BATCH_SIZE, feature_network, features  # noqa: E402
from emoji_images import render  # noqa: E402
from evaluate_emoji_dit import NUM_INFERENCE_STEPS, generate, spread_classes  # noqa: E402
from train_emoji_dit import pixels_as_tensor, subject_images  # noqa: E402

RESAMPLES = 1000


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x·y / d + 1)³, (n, d) and (m, d) -> (n, m)."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


class Crowd(NamedTuple):
    """Kernels of n generated images, with each other and with the m real ones."""

    own: Tensor  # (n, n)
    to_real: Tensor  # (n,): means over the real images

    def kid(self, weights: Tensor, real: float) -> float:
        """The unbiased squared MMD to the real images, whose own mean kernel is `real`; image i counts `weights[i]` times.

        An image drawn twice is no pair: its kernel with itself would raise the mean.
        """
        pairs = weights.sum() ** 2 - (weights**2).sum()
        within = weights @ self.own @ weights - (weights**2) @ self.own.diagonal()
        return (within / pairs + real - 2 * weights @ self.to_real / weights.sum()).item()


def images_of(model: str, args: argparse.Namespace) -> Tensor:
    """(n, 3, 64, 64) uint8, batch by batch; those in WORK are taken from there."""
    pipeline = load_pipeline(model)
    folder = args.work / f"images-{fingerprint(pipeline)[:12]}-guidance{args.guidance:g}-seed{args.seed}-of-{args.images}"
    folder.mkdir(parents=True, exist_ok=True)
    classes = spread_classes(args.images)
    parts = []
    for start in range(0, args.images, BATCH_SIZE):
        file = folder / f"{start:05}.npy"
        if not file.exists():
            drawn = generate(pipeline, classes[start : start + BATCH_SIZE], args.seed + start, args.guidance)
            content = io.BytesIO()
            np.save(content, drawn.numpy())
            write_atomically(file, content.getvalue())
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts)


def interval(value: float, resampled: list[float]) -> tuple[float, float]:
    """95 % of the resampled values, with their mean moved to the value itself."""
    low, high = np.quantile(resampled, [0.025, 0.975]) - np.mean(resampled) + value
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized", nargs="+", help="folders written by `python -m vq4dit quantize`")
    parser.add_argument("--model", default=str(ROOT / "assets" / "emoji-dit"))
    parser.add_argument("--work", type=Path, default=Path("kid-work"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3, as in the card of the bundled model")
    args = parser.parse_args()
    if args.images < 2:
        parser.error(f"--images {args.images}: KID needs at least two")

    models = [args.model, *args.quantized]
    crowds = [images_of(model, args) for model in models]
    emoji = render(args.work / "emoji")
    network = feature_network()
    real = features(network, pixels_as_tensor(emoji)[subject_images(emoji)[0]])
    seen = [features(network, crowd) for crowd in crowds]

    own = kernel(real, real)
    of_real = ((own.sum() - own.trace()) / (len(real) * (len(real) - 1))).item()
    kernels = [Crowd(kernel(x, x), kernel(x, real).mean(1)) for x in seen]
    generator = torch.Generator().manual_seed(args.seed)
    classes = torch.tensor(spread_classes(args.images))  # in order: those of a class stand side by side
    size = classes.bincount()
    first = (size.cumsum(0) - size)[classes]
    draws = []
    for _ in range(RESAMPLES):
        drawn = first + (torch.rand(args.images, generator=generator) * size[classes]).long()
        draws.append(drawn.bincount(minlength=args.images).double())
    once = torch.ones(args.images, dtype=torch.float64)
    resampled = [[crowd.kid(weights, of_real) for weights in draws] for crowd in kernels]

    print(f"\n{date.today()}, {platform.machine()}, torch {torch.__version__}, seed {args.seed}, guidance {args.guidance:g}")
    counts = f"n = {args.images} generated and {len(real)} real images"
    print(f"{counts}; {NUM_INFERENCE_STEPS} steps; 95 % intervals of {RESAMPLES} resamples\n")
    print("| model | KID | interval | minus the original's | interval | inside the original's interval |")
    print("|---|---|---|---|---|---|")
    of_original = kernels[0].kid(once, of_real)
    lowest, highest = interval(of_original, resampled[0])
    for model, crowd, values in zip(models, kernels, resampled, strict=True):
        value = crowd.kid(once, of_real)
        differences = [a - b for a, b in zip(values, resampled[0], strict=True)]
        cells = [
            Path(model).name,
            f"{value:.4f}",
            "{:.4f} to {:.4f}".format(*interval(value, values)),
            f"{value - of_original:+.4f}",
            "{:+.4f} to {:+.4f}".format(*interval(value - of_original, differences)),
            "yes" if lowest <= value <= highest else "no",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
