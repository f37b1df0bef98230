"""What a job has come to, as drawings: bars for its blocks, a line for each figure that a stage reports again and again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vq4dit.config import Recipe
from vq4dit.progress import Event
from vq4dit.web.html import empty
from vq4dit.web.messages import escape


def block_of(layer: str) -> str:
    """'transformer_blocks.3' of 'transformer_blocks.3.attn1.to_q'."""
    match = re.match(r"(.*?\.\d+)\.", layer)
    return match.group(1) if match else layer


def by_block(layers: Sequence[dict[str, Any]], figure: str) -> dict[str, list[tuple[int, float]]]:
    """Of each block's finished layers their weights, and a figure that is known of them."""
    blocks: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        if figure in layer:
            weights = layer.get("rows", 1) * layer.get("columns", 1)
            blocks.setdefault(block_of(layer["name"]), []).append((weights, layer[figure]))
    return blocks


def means(layers: Sequence[dict[str, Any]], figure: str) -> dict[str, float]:
    """The mean over all weights of a block."""
    found = by_block(layers, figure).items()
    return {name: sum(n * value for n, value in of) / sum(n for n, _ in of) for name, of in found}


def sums(layers: Sequence[dict[str, Any]], figure: str) -> dict[str, float]:
    """The sum over all layers of a block."""
    return {name: sum(value for _, value in of) for name, of in by_block(layers, figure).items()}


def chart(layers: Sequence[dict[str, Any]], num_blocks: int, events: Sequence[Event], recipe: Recipe = "kmeans") -> str:
    """Bars: what each block's finished layers have of bits and of error. Lines: what calibration reports.

    Where bits are shared out among layers, what hardly shows has large errors on purpose: there the output's error counts.
    """
    if recipe == "best":
        bits = means(layers, "bits_per_weight")
        drawn = bars("Bits per weight of each block", "more where errors show more", bits, num_blocks, 2)
        shares = {name: 100 * share for name, share in sums(layers, "error_share").items()}
        drawn += bars("Part of the output's error in each block", "expected, in percent", shares, num_blocks, 1)
    else:
        drawn = bars("Error of each block's weights", "‖W − Ŵ‖² / ‖W‖²", means(layers, "relative_error"), num_blocks, 4)
    if not drawn:
        return empty("A bar appears here for every block, as soon as its first layer is finished.")
    return drawn + "".join(curve(name, values) for name, values in curves(events).items())


def bars(what: str, how: str, blocks: Mapping[str, float], num_blocks: int, digits: int) -> str:
    """One bar a block; "" if there is none."""
    if not blocks:
        return ""
    values = list(blocks.values())
    count, top = max(num_blocks, len(values)), max(values) * 1.15 or 1.0
    width = 960 / count
    bar = min(46.0, 0.76 * width)
    drawn, rounding = "", min(4, width / 4)
    for i, (name, value) in enumerate(blocks.items()):
        left, height = (i + 0.5) * width - bar / 2, 130 * value / top
        drawn += (
            f'<rect x="{left:.1f}" y="{140 - height:.1f}" width="{bar:.1f}" height="{height:.1f}" rx="{rounding:.1f}">'
            f"<title>{escape(name)}: {value:.{digits}f}</title></rect>"
        )
    every = max(1, count // 14)
    ticks = "".join(f'<text x="{(i + 0.5) * width:.1f}" y="156">{i}</text>' for i in range(0, count, every))
    told = f"{len(values)} of {count} blocks, {min(values):.{digits}f} to {max(values):.{digits}f}"
    return (
        f'<figure class="chart"><figcaption>{what} <span>{how}, {told}</span></figcaption>'
        f'<svg viewBox="0 0 960 162" role="img" aria-label="{what}: {told}"><line x1="0" x2="960" y1="140" y2="140"/>{drawn}'
        f"{ticks}</svg></figure>"
    )


def curves(events: Sequence[Event]) -> dict[str, list[float]]:
    """Every figure that some stage reports again and again."""
    found: dict[str, list[float]] = {}
    for event in events:
        for name, value in event.metrics.items():
            found.setdefault(f"{event.stage}: {name.replace('_', ' ')}", []).append(value)
    return {name: values for name, values in found.items() if len(values) > 1}


def curve(name: str, values: list[float]) -> str:
    """A small line of a figure over time, at most 300 points."""
    shown = values[:: max(1, len(values) // 300)]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    points = " ".join(f"{640 * i / max(1, len(shown) - 1):.1f},{56 - 50 * (v - low) / span:.1f}" for i, v in enumerate(shown))
    told = f"{values[0]:.3g} at first, now {values[-1]:.3g}"
    return (
        f'<div class="curve"><span>{escape(name)} <b>{told}</b></span><svg viewBox="0 0 640 60" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(name)}: {told}"><polyline points="{points}"/></svg></div>'
    )
