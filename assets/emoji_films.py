"""Animated emoji, 9 frames of 64 x 64 RGB each: the films a text-to-video model learns from.

LobeHub packages Microsoft's animated Fluent emoji as WebP of 256 x 256 and 34 to 72 frames (MIT). About half of the files
stand still and are dropped, and so are skin-tone variants and those that nobody tells apart by a name. Of every film 9 frames
are kept, evenly spaced over its loop: the first latent frame of a causal video autoencoder is a picture, every later one
covers 4. Everything is deterministic.

    python assets/emoji_films.py        # 660 MB of packages, then assets/emoji-work/films64.npz and a sheet to look at
"""

import argparse
import re
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from emoji_images import SIZE, SKIN_TONE, archive, code_point_names, fetch, member, without_selector
from PIL import Image

PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{part}" for part in (1, 2, 3, 4))
VERSION = "1.0.0"
NOTICE = "Fluent Emoji, (c) Microsoft Corporation; LobeHub"
FRAMES = 9
# what nobody tells apart by a name: people at work and in families, and the hours of a clock
ALIKE = re.compile(
    r"^(family|couple|kiss|(wo)?m[ae]n-|person-|people-|boy$|girl$|child$|baby$|health-|breast-)|-(oclock|thirty)$"
)
STILL = 1.0  # mean absolute difference of the most different frame from the first, of 255


class Films(NamedTuple):
    """Moving emoji. `pixels` is (n, 9, 64, 64, 3) uint8 on white; `names` are as artists write them ("dog-face")."""

    pixels: np.ndarray
    names: np.ndarray


def films(folder: Path) -> Films:
    """Read every moving emoji of every package, or what an earlier call left in `folder/films64.npz`.

    Packages are fetched one after the other and stay in `folder`; one takes some minutes on one core.
    """
    cache = folder / "films64.npz"
    if cache.exists():
        stored = np.load(cache)
        return Films(stored["pixels"], stored["names"])
    fetch(folder)
    name_of_code_point = code_point_names(folder)
    found: dict[str, np.ndarray] = {}
    for package in PACKAGES:
        if not archive(folder, package, VERSION).exists():
            subprocess.run(["npm", "pack", f"{package}@{VERSION}", "--silent"], cwd=folder, check=True)
        found |= part_of_films(archive(folder, package, VERSION), name_of_code_point)
        print(f"{package}: {len(found)} moving emoji so far", flush=True)
    result = Films(np.stack(list(found.values())), np.array(list(found)))
    np.savez_compressed(cache, **result._asdict())
    return result


def part_of_films(packed: Path, name_of_code_point: dict[str, str]) -> dict[str, np.ndarray]:
    """Name -> (9, 64, 64, 3) uint8 of the moving emoji of one package. Cached beside it."""
    cache = packed.with_suffix(".npz")
    if not cache.exists():
        found: dict[str, np.ndarray] = {}
        with tarfile.open(packed) as tar:
            for path in sorted(name for name in tar.getnames() if name.endswith(".webp")):
                name = name_of_code_point.get(without_selector(Path(path).stem))
                if name is None or ALIKE.search(name) or SKIN_TONE.search(name) or re.search("1f3f[b-f]", path):
                    continue
                frames = evenly_spaced(Image.open(member(tar, path)))
                if frames is not None:
                    found[name] = frames
        np.savez_compressed(cache, **found)
    return dict(np.load(cache))


def evenly_spaced(film: Image.Image) -> np.ndarray | None:
    """(9, 64, 64, 3) uint8 on white, or None if nothing moves."""
    count = getattr(film, "n_frames", 1)
    if count < FRAMES:
        return None
    frames = []
    for i in range(FRAMES):
        film.seek(i * count // FRAMES)
        drawn = film.convert("RGBA")
        canvas = Image.new("RGBA", drawn.size, "white")
        canvas.alpha_composite(drawn)
        frames.append(np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    stacked = np.stack(frames)
    moved = np.abs(stacked[1:].astype(int) - stacked[0].astype(int)).mean((1, 2, 3)).max()
    return stacked if moved >= STILL else None


def strip(found: Films, count: int) -> Image.Image:
    """Films spread evenly over the names, one a row."""
    chosen = [i * len(found.names) // count for i in range(count)]
    rows = [np.concatenate(list(found.pixels[i]), axis=1) for i in chosen]
    return Image.fromarray(np.concatenate(rows, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "emoji-work", help="packages and images")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = films(args.work)
    strip(found, 12).save(args.work / "films.png")
    print(f"{len(found.names)} films: {args.work / 'films.png'}")


if __name__ == "__main__":
    main()
