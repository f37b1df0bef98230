"""What a quantization will do, found out once, at the door: nothing in here changes while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from vq4dit.layers.linear_maps import LinearMap
from vq4dit.models.blocks import Kept
from vq4dit.models.trajectories import Sampling


@dataclass(frozen=True)
class Plan:
    """The layers to quantize, those of the blocks that stay in 16 bit, and how the pipeline is sampled."""

    targets: dict[str, LinearMap]
    kept: list[Kept]
    sampling: Sampling | None  # None where the recipe needs no samples
