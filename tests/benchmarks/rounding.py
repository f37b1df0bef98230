"""How fast the beam search of `best` rounds, and what it finds: compiled (the CPU's) beside column by column (the GPU's).

    python tests/benchmarks/rounding.py [--threads 1]

Weights are Gaussian, inputs correlated as in a transformer. Each pair runs in this process in alternation, and the median of
five is taken; costs are squared errors for a weight after all corrections, in squared steps, without and with a price of bits.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from vq4dit.config import EntropyCodingConfig
from vq4dit.layers.scale_classes import estimate_levels
from vq4dit.recipes import rounding
from vq4dit.recipes.gptq import of_inputs

SHAPES = (16, 256), (256, 1024), (256, 1152), (64, 4608)
BEAMS = 1, 4, 32
PRICES = 0.0, EntropyCodingConfig().rate_weight
SEARCHES = {"compiled": rounding._round_compiled, "by columns": rounding._round_by_columns}
REPEATS = 5


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is wanted in steps, the factor, the cost of each column."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).unsqueeze(1)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    side = of_inputs(inputs.T @ inputs / len(inputs), EntropyCodingConfig())
    scale = side.costs()[side.order].rsqrt()
    relative = scale / side.factor.diagonal().float()
    factor = side.factor.float() * relative.unsqueeze(1) / scale
    return 2 * torch.randn(rows, columns, generator=generator), factor, relative.square()


def squared_errors(integers: Tensor, wanted: Tensor, factor: Tensor, cost: Tensor) -> float:
    """For each weight."""
    left, total = wanted.double(), 0.0
    for column in range(wanted.shape[1]):
        error = left[:, column] - integers[:, column]
        total += (error.square().sum() * cost[column]).item()
        left[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :].double())
    return total / wanted.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, seed 0, median of {REPEATS}\n")
    print(
        "| rows x columns | beam | price of a bit | ns a weight, compiled | by columns | ratio | error, compiled | by columns |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rows, columns in SHAPES:
        wanted, factor, cost = problem(rows, columns)
        for beam in BEAMS:
            for price in PRICES:
                levels = estimate_levels(wanted.round().short())
                rate = rounding.Rate.under(torch.full((rows,), price * cost.mean().item()), *levels)
                times: dict[str, list[float]] = {name: [] for name in SEARCHES}
                errors = {}
                for _ in range(1 + REPEATS):
                    for name, search in SEARCHES.items():
                        started = time.perf_counter()
                        found = search(wanted, factor, cost, rate, beam)
                        times[name].append(time.perf_counter() - started)
                        errors[name] = squared_errors(found, wanted, factor, cost) if name not in errors else errors[name]
                compiled, by_columns = (statistics.median(of[1:]) / wanted.numel() * 1e9 for of in times.values())
                speeds = f"{compiled:.0f} | {by_columns:.0f} | {compiled / by_columns:.2f}"
                print(
                    f"| {rows} x {columns} | {beam} | {price} | {speeds} | "
                    + " | ".join(f"{e:.5f}" for e in errors.values())
                    + " |"
                )


if __name__ == "__main__":
    main()
