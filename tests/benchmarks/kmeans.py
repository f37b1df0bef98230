"""Our k-means against faiss: inertia over all sub-vectors and seconds, as ratios in one run.

    python tests/benchmarks/kmeans.py [MODEL]

On some layers of MODEL (default: the bundled one), and on layers of DiT-XL/2's shapes with Gaussian weights, the hardest to
cluster; a few seeds each, same number of iterations. "part" is trained on the shipped limit of 512 sub-vectors per codeword,
"all" on all of them; the inertia is always that of *all* sub-vectors. What is shipped is "ours part".
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import faiss
import torch

from vq4dit.config import CODEBOOKS
from vq4dit.layers.codebook import nearest_codewords
from vq4dit.models.blocks import find_targets
from vq4dit.pipelines.load import load_pipeline
from vq4dit.recipes import kmeans
from vq4dit.recipes.vector_quantized import subvectors_of

ITERATIONS = 15
SEEDS = (0, 1)
LAYERS = ("3.attn1.to_q", "3.norm1.linear", "3.ff.net.2")
GAUSSIAN = ((1152, 1152), (1152, 4608))  # DiT-XL/2's attention and feed-forward
COLUMNS = ("part/faiss part", "part/faiss all", "all/faiss all", "part/all", "s part/faiss all", "s part/all")


def inertia(points: torch.Tensor, codebook: torch.Tensor) -> float:
    return nearest_codewords(points, codebook)[0].double().sum().item()


def fit_with_faiss(points: torch.Tensor, k: int, seed: int, limit: int) -> torch.Tensor:
    fit = faiss.Kmeans(points.shape[1], k, niter=ITERATIONS, seed=seed, max_points_per_centroid=limit, verbose=False)
    fit.train(points.numpy())
    return torch.from_numpy(fit.centroids.copy())


def fit_with_ours(points: torch.Tensor, k: int, seed: int, limit: int) -> torch.Tensor:
    with mock.patch.object(kmeans, "MAX_POINTS_PER_CODEWORD", limit):
        return kmeans.fit_codebook(points, k, iterations=ITERATIONS, generator=torch.Generator().manual_seed(seed))


def layers(transformer: torch.nn.Module, k: int, dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    targets, _ = find_targets(transformer, dim, k)
    for name, layer in targets.items():
        if name.endswith(LAYERS):
            yield name, subvectors_of(layer, dim).contiguous()
    for rows, columns in GAUSSIAN:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        yield f"Gaussian {rows} x {columns}", weight.view(-1, dim)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[2] / "assets" / "emoji-dit")
    faiss.omp_set_num_threads(torch.get_num_threads())
    transformer = load_pipeline(model).transformer
    print("inertia (s: seconds) of ours, trained on a part or on all, over that of:")
    print(f"bits  {'layer':35}  sub-vectors  " + "  ".join(COLUMNS))
    for bits, (k, dim) in CODEBOOKS.items():
        for name, points in layers(transformer, k, dim):
            found = {}  # (inertia, seconds), summed over the seeds
            for who, fit in (("ours", fit_with_ours), ("faiss", fit_with_faiss)):
                for limit in (kmeans.MAX_POINTS_PER_CODEWORD, len(points)):
                    total = seconds = 0.0
                    for seed in SEEDS:
                        started = time.perf_counter()
                        codebook = fit(points, k, seed, limit)
                        seconds += time.perf_counter() - started
                        total += inertia(points, codebook)
                    found[who, limit == len(points)] = total, seconds
            part, whole, faiss_part, faiss_all = (found[who, full] for who in ("ours", "faiss") for full in (False, True))
            ratios = (
                part[0] / faiss_part[0],
                part[0] / faiss_all[0],
                whole[0] / faiss_all[0],
                part[0] / whole[0],
                part[1] / faiss_all[1],
                part[1] / whole[1],
            )
            shown = "  ".join(f"{r:{len(c)}.4f}" for r, c in zip(ratios, COLUMNS, strict=True))
            print(f"{bits:4}  {name:35}  {len(points):11}  {shown}", flush=True)


if __name__ == "__main__":
    main()
