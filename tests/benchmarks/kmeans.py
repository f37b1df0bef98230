"""Our k-means against faiss: inertia over all sub-vectors and seconds, as ratios in one run.

    python tests/benchmarks/kmeans.py [MODEL]

On the layers of MODEL (default: the bundled one), three seeds each, same number of iterations. The shipped limits on
training points are used, and the inertia is always that of *all* sub-vectors.
"""

import sys
import time
from pathlib import Path

import faiss
import torch

from vq4dit.codebook import nearest_codewords
from vq4dit.config import CODEBOOKS
from vq4dit.dit import find_targets
from vq4dit.kmeans import MAX_POINTS_PER_CODEWORD, fit_codebook
from vq4dit.loading import load_pipeline
from vq4dit.quantization import subvectors_of

ITERATIONS = 15
SEEDS = (0, 1, 2)
LAYERS = ("3.attn1.to_q", "3.norm1.linear", "3.ff.net.2")


def inertia(points: torch.Tensor, codebook: torch.Tensor) -> float:
    return nearest_codewords(points, codebook)[0].double().sum().item()


def fit_with_faiss(points: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    kmeans = faiss.Kmeans(
        points.shape[1], k, niter=ITERATIONS, seed=seed, max_points_per_centroid=MAX_POINTS_PER_CODEWORD, verbose=False
    )
    kmeans.train(points.numpy())
    return torch.from_numpy(kmeans.centroids.copy())


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[2] / "assets" / "emoji-dit")
    faiss.omp_set_num_threads(torch.get_num_threads())
    transformer = load_pipeline(model).transformer
    print("bits  layer                                sub-vectors  inertia ours/faiss  seconds ours/faiss")
    for bits, (k, dim) in CODEBOOKS.items():
        targets, _ = find_targets(transformer, dim, k)
        for name in (name for name in targets if name.endswith(LAYERS)):
            points = subvectors_of(targets[name], dim).contiguous()
            ours = theirs = our_seconds = their_seconds = 0.0
            for seed in SEEDS:
                started = time.perf_counter()
                codebook = fit_codebook(points, k, iterations=ITERATIONS, generator=torch.Generator().manual_seed(seed))
                our_seconds += time.perf_counter() - started
                started = time.perf_counter()
                other = fit_with_faiss(points, k, seed)
                their_seconds += time.perf_counter() - started
                ours += inertia(points, codebook)
                theirs += inertia(points, other)
            print(f"{bits:4}  {name:35}  {len(points):11}  {ours / theirs:18.4f}  {our_seconds / their_seconds:18.2f}")


if __name__ == "__main__":
    main()
