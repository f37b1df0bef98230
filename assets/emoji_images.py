"""Emoji in six free styles, rendered to 64 x 64 RGB: the images the bundled DiT learns from.

The same subject ("pizza", "rocket") is drawn by several artists. A *subject* is a class of the DiT, a *style* is one
package. All packages are under MIT or Apache-2.0 (`STYLES`); sets under share-alike licences are left out on purpose.
Packages come from the npm registry by `npm pack`; SVGs are rendered with resvg. Everything here is deterministic.
"""

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from PIL import Image

SIZE = 64

# style name -> (npm package, version, licence, notice)
STYLES = {
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, (c) Microsoft Corporation"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, (c) Microsoft Corporation"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, (c) Microsoft Corporation; LobeHub"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, (c) Google Inc"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji v1, (c) Google Inc"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "FxEmojis, (c) Mozilla Foundation"),
}
STYLE_NAMES = tuple(STYLES)
SKIN_TONE = re.compile(r"skin|-(light|medium|dark|medium-light|medium-dark)(-|$)")


class Images(NamedTuple):
    """Rendered emoji. `pixels` is (n, 64, 64, 3) uint8 on white; `names` are normalised ("dogface")."""

    pixels: np.ndarray
    names: np.ndarray
    styles: np.ndarray  # index into STYLE_NAMES


def normalise(name: str) -> str:
    """Artists punctuate names differently; letters and digits are what they agree on."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def fetch(folder: Path) -> None:
    """Download every package archive into `folder` (about 36 MB) unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, version, _, _ in STYLES.values():
        if not archive(folder, package, version).exists():
            subprocess.run(["npm", "pack", f"{package}@{version}", "--silent"], cwd=folder, check=True)


def archive(folder: Path, package: str, version: str) -> Path:
    return folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def render(folder: Path) -> Images:
    """Render every usable emoji of every style, or read them back from `folder/emoji64.npz`.

    Hidden icons, flags and skin-tone variants are dropped. Takes about a minute and a half on two cores.
    """
    cache = folder / "emoji64.npz"
    if cache.exists():
        stored = np.load(cache)
        return Images(stored["pixels"], stored["names"], stored["styles"])
    fetch(folder)
    pixels: list[np.ndarray] = []
    names: list[str] = []
    styles: list[int] = []
    name_of_code_point = code_point_names(folder)
    for index, (package, version, _, _) in enumerate(STYLES.values()):
        with tarfile.open(archive(folder, package, version)) as tar:
            pairs = _raster(tar, name_of_code_point) if "3d" in package else _vector(tar)
            for name, image in pairs:
                if SKIN_TONE.search(name) or name.startswith("flag"):
                    continue
                pixels.append(np.asarray(image))
                names.append(normalise(name))
                styles.append(index)
    images = Images(np.stack(pixels), np.array(names), np.array(styles, dtype=np.uint8))
    np.savez(cache, **images._asdict())
    return images


def code_point_names(folder: Path) -> dict[str, str]:
    """'1f355' -> 'pizza', from the Noto package: the 3D images are named by code point only."""
    package, version, _, _ = STYLES["noto"]
    with tarfile.open(archive(folder, package, version)) as tar:
        chars = json.load(member(tar, "package/chars.json"))
    return {without_selector(code): name for code, name in chars.items()}


def without_selector(code_points: str) -> str:
    return "-".join(part for part in code_points.split("-") if part != "fe0f")


def member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    opened = tar.extractfile(name)
    if opened is None:
        raise FileNotFoundError(f"{name} is not in {tar.name!r}: the package changed its layout; pin the version above")
    return opened


def _vector(tar: tarfile.TarFile):
    """Yield (name, image) of an iconify package: `icons.json` holds SVG bodies and their view boxes."""
    icons = json.load(member(tar, "package/icons.json"))
    width, height = icons.get("width", 16), icons.get("height", icons.get("width", 16))
    for name, icon in icons["icons"].items():
        if icon.get("hidden") or SKIN_TONE.search(name) or name.startswith("flag"):
            continue
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{2 * SIZE}" height="{2 * SIZE}">{icon["body"]}</svg>'
        )
        try:
            png = resvg_py.svg_to_bytes(
                svg_string=svg, background="#ffffff", width=2 * SIZE, height=2 * SIZE, skip_system_fonts=True
            )
        except ValueError:  # a handful of icons use features resvg lacks
            continue
        yield name, Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _raster(tar: tarfile.TarFile, name_of_code_point: dict[str, str]):
    """Yield (name, image) of the 3D package: 256 x 256 webp with transparency, put on white."""
    for path in sorted(name for name in tar.getnames() if name.endswith(".webp")):
        name = name_of_code_point.get(without_selector(Path(path).stem))
        if name is None:
            continue
        drawn = Image.open(member(tar, path)).convert("RGBA")
        canvas = Image.new("RGBA", drawn.size, "white")
        canvas.alpha_composite(drawn)
        yield name, canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
