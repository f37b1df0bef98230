"""Comparisons as HTML: slider, difference, grid, blind test, all widths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vq4dit.projects.drawn_pairs import KINDS, Pair, drawn_pairs
from vq4dit.projects.project import Project
from vq4dit.web.html import data_uri, empty
from vq4dit.web.messages import escape, size

SHORT = 48  # characters of a prompt below a picture
NO_GRID = "Everything you draw appears here, original above quantized."
NO_WIDTHS = "Quantize the same model at another width and draw its pairs: all widths then stand side by side here."


def short(name: str) -> str:
    """A class, or the beginning of a prompt."""
    return name if len(name) <= SHORT else f"{name[: SHORT - 1].rstrip()}…"


def draws_alike(project: Project, other: Project) -> bool:
    """Whether the originals of two projects are the same and draw the same."""
    told = [(p.model, p.revision, p.settings.call) for p in (project, other)]
    return told[0] == told[1]


def picture(project: Project, pair: Pair, kind: str) -> str:
    """A picture of the report as a data URI."""
    return data_uri((project.report / f"{pair.stem}-{kind}.png").read_bytes())


def size_of(project: Project, pair: Pair) -> tuple[int, int]:
    """Width and height of a pair's pictures."""
    with Image.open(project.report / f"{pair.stem}-original.png") as image:
        return image.size


def form(project: Project, pair: Pair) -> str:
    """The class of a strip of frames, which needs a line of its own."""
    width, height = size_of(project, pair)
    return " strip" if width > 2 * height else ""


def slider(project: Project, pair: Pair) -> str:
    """Original and quantized on top of each other, divided where a native range input stands: mouse, finger and arrow keys."""
    what = f"{escape(pair.name)}, seed {pair.seed}"
    move = "this.closest('.compare').style.setProperty('--at', this.value + '%')"
    images = {kind: picture(project, pair, kind) for kind in KINDS}
    bits, (width, height) = project.settings.bits, size_of(project, pair)
    return (
        f'<div class="pair{form(project, pair)}"><div class="compare" '
        f'style="--at:50%;aspect-ratio:{width}/{height}">'
        f'<img class="under" src="{images["quantized"]}" alt="{what}, at {bits} bits"><img class="over" '
        f'src="{images["original"]}" alt="{what}, original"><i aria-hidden="true"></i><span class="tag left">original</span>'
        f'<span class="tag right">{bits} bits</span><input type="range" min="0" max="100" value="50" id="slider" '
        f'aria-label="How much of the original is shown, from the left" oninput="{move}"></div>'
        f'<figure><img src="{images["difference"]}" alt="Difference of the two, four times amplified; black where they agree">'
        f"<figcaption>difference × 4 · PSNR {pair.psnr:.1f} dB · SSIM {pair.ssim:.3f}</figcaption></figure></div>"
    )


def figures(found: dict[str, Any] | None, pairs: Sequence[Pair]) -> str:
    """The measured numbers, each with what it means."""
    shown = {
        "PSNR": (f"{sum(p.psnr for p in pairs) / len(pairs):.1f} dB", "pixels, higher is closer"),
        "SSIM": (f"{sum(p.ssim for p in pairs) / len(pairs):.3f}", "structure, 1 is equal"),
    }
    if found:
        shown |= {
            "noise error": (f"{100 * found['noise_nmse']:.1f} %", "of the predicted noise's power; the figure to trust"),
            "transformer": (
                size(found["quantized_bytes"]),
                f"was {size(found['original_bytes'])}, {found['original_bytes'] / found['quantized_bytes']:.1f} × smaller",
            ),
            "speed": speed(found, pairs),
        }
    cells = "".join(f"<div><dt>{k}</dt><dd>{value}<small>{text}</small></dd></div>" for k, (value, text) in shown.items())
    return f'<dl class="figures">{cells}</dl>'


def speed(found: dict[str, Any], pairs: Sequence[Pair]) -> tuple[str, str]:
    """How fast the packed model draws; no number where the middle half of pairs lies on both sides of one."""
    ratios = sorted(pair.original_seconds / pair.quantized_seconds for pair in pairs)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    if low <= 1 <= high:
        return "the same", f"{low:.2f} to {high:.2f} × the original's in half of the pairs; decoded once at load"
    ratio = found["original_seconds_per_step"] / found["quantized_seconds_per_step"]
    return f"{ratio:.2f} ×", "of the original's; decoded once at load"


def grid(project: Project, pairs: Sequence[Pair]) -> str:
    """Every pair: original above, quantized below."""
    cells = "".join(
        f'<figure><img loading="lazy" src="{picture(project, p, "original")}" alt="{escape(p.name)}, seed {p.seed}, original">'
        f'<img loading="lazy" src="{picture(project, p, "quantized")}" alt="{escape(p.name)}, seed {p.seed}, '
        f'{project.settings.bits} bits"><figcaption>{escape(short(p.name))} · {p.seed}</figcaption></figure>'
        for p in pairs
    )
    told = f"Original above, {project.settings.bits} bits below; the number is the seed."
    return f'<p class="note">{told}</p><div class="grid{form(project, pairs[0])}">{cells}</div>'


def blind(project: Project, pair: Pair, original_is_left: bool, revealed: bool) -> str:
    """Two pictures without names, or with them after the guess."""
    order = ["original", "quantized"] if original_is_left else ["quantized", "original"]
    names = {"original": "original", "quantized": f"{project.settings.bits} bits"}
    cells = "".join(
        f'<figure><img src="{picture(project, pair, kind)}" alt="{side} picture: {escape(pair.name)}">'
        f"<figcaption>{names[kind] if revealed else side}</figcaption></figure>"
        for side, kind in zip(("Left", "Right"), order, strict=True)
    )
    return f'<div class="blind{form(project, pair)}">{cells}</div>'


def widths(projects: Sequence[Project]) -> str:
    """The same conditions and seeds at every width this visitor has made of one model."""
    drawn = {project: {pair.key: pair for pair in drawn_pairs(project)} for project in projects}
    drawn = {project: pairs for project, pairs in drawn.items() if pairs}
    if len(drawn) < 2:
        return empty(NO_WIDTHS)
    common = [key for key in next(iter(drawn.values())) if all(key in pairs for pairs in drawn.values())][:8]
    if not common:
        return empty("Your widths have no pair in common yet: draw the same for each.")
    ordered = sorted(drawn, key=lambda p: (-p.settings.bits, p.settings.recipe))
    rows = [("original", ordered[0], "original")]
    rows += [(f"{p.settings.bits} bits · {p.settings.recipe}", p, "quantized") for p in ordered]
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(
            f'<td><img src="{picture(p, drawn[p][key], kind)}" '
            f'alt="{escape(drawn[p][key].name)}, seed {key.seed}, {escape(label)}"></td>'
            for key in common
        )
        + "</tr>"
        for label, p, kind in rows
    )
    of_strips = form(ordered[0], drawn[ordered[0]][common[0]])
    names = "".join(f"<th>{escape(short(drawn[ordered[0]][key].name))}</th>" for key in common)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="All widths"><table class="widths{of_strips}"><thead><tr>'
        f"<th>width</th>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )
