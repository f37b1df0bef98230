"""The card of a model as HTML: what it is, what it would weigh at each width, and what that takes.

Everything that comes from outside is escaped here, as in `html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from vq4dit.config import CODEBOOKS
from vq4dit.pipelines.inspect import SizePrediction
from vq4dit.projects.catalog import ModelCard
from vq4dit.recipes.estimate import DAILY_GPU_SECONDS, Estimate
from vq4dit.web.messages import duration, escape, size


def card(name: str, found: ModelCard, costs: dict[int, Estimate], chosen: int, device: str) -> str:
    """What a model is, and what would become of it at each width."""
    inspection = found.inspection
    smallest = inspection.predictions[0]
    facts = {
        "family": f"{found.pipeline} · {inspection.class_name}",
        "blocks": str(inspection.num_blocks),
        "parameters": f"{inspection.parameters / 1e6:.1f} M",
        "transformer file": size(inspection.file_bytes),
        "licence": found.licence or "not stated",
        "access": "gated, and your login may read it" if found.gated else "open",
        "download": size(found.download_bytes) if found.download_bytes else "none",
        "memory needed": size(costs[chosen].memory_bytes),
    }
    terms = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    rows = "".join(
        f'<tr class="{"chosen" if p.bits == chosen else ""}"><th scope="row">{p.bits} bits</th><td>{size(p.file_bytes)}</td>'
        f"<td>{inspection.file_bytes / p.file_bytes:.1f} × smaller</td><td>{duration(costs[p.bits].seconds)}</td></tr>"
        for p in inspection.predictions
    )
    where = "on the GPU" if device == "gpu" else "here"
    kept = "".join(f"<li><code>{escape(k.name)}</code> {escape(k.reason)}</li>" for k in smallest.kept[:80])
    taken = "".join(f"<li><code>{escape(x.name)}</code> {x.rows} × {x.columns}</li>" for x in smallest.layers[:200])
    return (
        f'<article class="card"><h3>{escape(name)}</h3><dl>{terms}</dl><table><caption>Predicted, before anything is loaded'
        f"</caption><thead><tr><th>width</th><th>transformer</th><th>against now</th><th>time {where}, about</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{why_not_smaller(inspection.predictions)}"
        f"{quota(costs[chosen]) if device == 'gpu' else ''}"
        f"<details><summary>{len(smallest.layers)} layers are quantized, {len(smallest.kept)} stay in 16 bit</summary>"
        f'<ul class="layers">{taken}{kept}</ul></details></article>'
    )


def quota(cost: Estimate) -> str:
    """Whether a day's GPU time is enough, for each kind of visitor."""
    fits = "".join(
        f'<li class="{"yes" if ok else "no"}">{escape(visitor)}: {"fits" if ok else "does not fit"} a day of about '
        f"{duration(DAILY_GPU_SECONDS[visitor])}</li>"
        for visitor, ok in cost.fits().items()
    )
    return f'<ul class="quota">{fits}</ul>'


def why_not_smaller(predictions: Sequence[SizePrediction]) -> str:
    """A line on it where more bits take less than fewer: codebooks outweigh what short codes save in tiny layers."""
    ordered = sorted(predictions, key=lambda prediction: prediction.bits)
    pairs = ((narrow.bits, wide.bits) for narrow, wide in combinations(ordered, 2) if wide.file_bytes < narrow.file_bytes)
    narrow, wide = next(pairs, (0, 0))
    if not narrow:
        return ""
    larger, smaller = (f"{CODEBOOKS[bits][0]} codewords at {bits} bits" for bits in (narrow, wide))
    return (
        f'<p class="note">{wide} bits take less than {narrow} here: a layer\'s codebook has {larger} and {smaller}, and in '
        "layers this small the larger codebook takes more than shorter codes save. (The recipe best has no codebooks, but as "
        "many bytes to spend.)</p>"
    )
