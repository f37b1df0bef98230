"""Comparisons as HTML: slider, difference, grid, blind test, all widths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vq4dit.projects.drawn_pairs import Pair, drawn_pairs
from vq4dit.projects.workspace import Project
from vq4dit.web.html import data_uri, empty
from vq4dit.web.messages import escape, size


def picture(project: Project, pair: Pair, kind: str) -> str:
    """A picture of the report as a data URI."""
    return data_uri((project.report / f"{pair.stem}-{kind}.png").read_bytes())


def slider(project: Project, pair: Pair) -> str:
    """Original and quantized on top of each other, divided where a native range input stands: mouse, finger and arrow keys."""
    what = f"{escape(pair.name)}, seed {pair.seed}"
    move = "this.closest('.compare').style.setProperty('--at', this.value + '%')"
    images = {kind: picture(project, pair, kind) for kind in ("original", "quantized", "difference")}
    bits = project.settings.bits
    return (
        '<div class="pair"><div class="compare" style="--at:50%">'
        f'<img class="under" src="{images["quantized"]}" alt="{what}, at {bits} bits"><img class="over" '
        f'src="{images["original"]}" alt="{what}, original"><i aria-hidden="true"></i><span class="tag left">original</span>'
        f'<span class="tag right">{bits} bits</span><input type="range" min="0" max="100" value="50" id="slider" '
        f'aria-label="How much of the original is shown, from the left" oninput="{move}"></div>'
        f'<figure><img src="{images["difference"]}" alt="Difference of the two, four times amplified; black where they agree">'
        f"<figcaption>difference × 4 · PSNR {pair.psnr:.1f} dB · SSIM {pair.ssim:.3f}</figcaption></figure></div>"
    )


def figures(found: dict[str, Any] | None, pairs: Sequence[Pair]) -> str:
    """The measured numbers, each with what it means."""
    if not pairs:
        return ""
    shown = {
        "PSNR": (f"{sum(p.psnr for p in pairs) / len(pairs):.1f} dB", "pixels, higher is closer"),
        "SSIM": (f"{sum(p.ssim for p in pairs) / len(pairs):.3f}", "structure, 1 is equal"),
    }
    if found:
        ratio = found["original_seconds_per_step"] / found["quantized_seconds_per_step"]
        shown |= {
            "noise error": (f"{100 * found['noise_nmse']:.1f} %", "of the predicted noise's power; the figure to trust"),
            "transformer": (
                size(found["quantized_bytes"]),
                f"was {size(found['original_bytes'])}, {found['original_bytes'] / found['quantized_bytes']:.1f} × smaller",
            ),
            "speed": (f"{ratio:.2f} ×", "of the original's; decoded once at load"),
        }
    cells = "".join(f"<div><dt>{k}</dt><dd>{value}<small>{text}</small></dd></div>" for k, (value, text) in shown.items())
    return f'<dl class="figures">{cells}</dl>'


def grid(project: Project, pairs: Sequence[Pair]) -> str:
    """Every pair: original above, quantized below."""
    if not pairs:
        return empty("Every class and seed you draw appears here, original above quantized.")
    cells = "".join(
        f'<figure><img loading="lazy" src="{picture(project, p, "original")}" alt="{escape(p.name)}, seed {p.seed}, original">'
        f'<img loading="lazy" src="{picture(project, p, "quantized")}" alt="{escape(p.name)}, seed {p.seed}, '
        f'{project.settings.bits} bits"><figcaption>{escape(p.name)} · {p.seed}</figcaption></figure>'
        for p in pairs
    )
    return f'<div class="grid">{cells}</div>'


def blind(project: Project, pair: Pair, original_is_left: bool, revealed: bool) -> str:
    """Two pictures without names, or with them after the guess."""
    order = ["original", "quantized"] if original_is_left else ["quantized", "original"]
    names = {"original": "original", "quantized": f"{project.settings.bits} bits"}
    cells = "".join(
        f'<figure><img src="{picture(project, pair, kind)}" alt="{side} picture: {escape(pair.name)}">'
        f"<figcaption>{names[kind] if revealed else side}</figcaption></figure>"
        for side, kind in zip(("Left", "Right"), order, strict=True)
    )
    return f'<div class="blind">{cells}</div>'


def widths(projects: Sequence[Project]) -> str:
    """The same classes and seeds at every width this visitor has made of one model."""
    drawn = {project: {(p.label, p.seed): p for p in drawn_pairs(project)} for project in projects}
    drawn = {project: pairs for project, pairs in drawn.items() if pairs}
    if len(drawn) < 2:
        return empty("Quantize the same model at another width and draw its pairs: all widths then stand side by side here.")
    common = [key for key in next(iter(drawn.values())) if all(key in pairs for pairs in drawn.values())][:8]
    if not common:
        return empty("Your widths have no class and seed in common yet: draw the same ones for each.")
    ordered = sorted(drawn, key=lambda p: (-p.settings.bits, p.settings.recipe))
    rows = [("original", ordered[0], "original")]
    rows += [(f"{p.settings.bits} bits · {p.settings.recipe}", p, "quantized") for p in ordered]
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(
            f'<td><img src="{picture(p, drawn[p][key], kind)}" '
            f'alt="{escape(drawn[p][key].name)}, seed {key[1]}, {escape(label)}"></td>'
            for key in common
        )
        + "</tr>"
        for label, p, kind in rows
    )
    names = "".join(f"<th>{escape(drawn[ordered[0]][key].name)}</th>" for key in common)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All widths"><table class="widths"><thead><tr><th>width</th>'
        f"{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )
