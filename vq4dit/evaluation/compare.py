"""Pictures and comparisons as files.

Every picture says in a text chunk of its PNG that we drew it, with a checksum of its pixels and its name. So a picture of
ours may be replaced by a new one, and what somebody else drew, changed or gave another name may not. A film is a strip of
frames there, and moves in a WebP beside it, which bears a checksum of its bytes in a chunk of its own. A comparison is a folder
that is written whole:

    report.json                  all figures
    layers.json                  what each layer adds to the error, if that was asked for
    pairs.png                    original, quantized and difference, row by row
    pairs.webp                   the same of films, moving
    vq4dit.json                  the record of these files
    NAME-seedN-original.png      and -quantized.png, -difference.png: one pair
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from vq4dit.disk.files import check_place, told, write_atomically
from vq4dit.disk.folders import check_free, sweep, whole_folder
from vq4dit.disk.record import has_record, intact, is_own_file, recorded
from vq4dit.errors import JobError
from vq4dit.evaluation.images import SamplePair, as_image, grid
from vq4dit.evaluation.metrics import Comparison
from vq4dit.models.conditions import Condition

KINDS = ("original", "quantized", "difference")
CHUNK = "vq4dit"  # of our pictures: their checksum
REPORT = "report.json"
PREVIEW = ".webp"  # of films, beside their strips
NAME_BYTES = 100  # of a class or a prompt in a file's name
PREVIEW_SIDE, FRAME_MS = 1280, 62  # of a moving preview: pixels at most, and how long a frame is seen
SEAL_CHUNK = b"vq4d" + struct.pack("<I", 64)  # of our previews, the last one: their checksum follows


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    content, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, _checksum(path.name, image))
    image.save(content, "PNG", pnginfo=chunks)
    write_atomically(path, content.getvalue())


def write_preview(path: Path, films: Sequence[np.ndarray], columns: int) -> None:
    """Write films side by side as one animated WebP, whole or not at all."""
    frames = [grid(frame, columns) for frame in zip(*films, strict=True)]
    for frame in frames:
        frame.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    write_atomically(path, _sealed(path.name, content.getvalue()[8:]))


def _sealed(name: str, chunks: bytes) -> bytes:
    """A WebP of these chunks, and one more with a checksum of them and the name."""
    seal = SEAL_CHUNK + hashlib.sha256(name.encode() + b" " + chunks).hexdigest().encode()
    return b"RIFF" + struct.pack("<I", len(chunks + seal)) + chunks + seal


def is_our_picture(path: Path) -> bool:
    """Whether we drew this picture (or preview), and nobody changed it or its name since."""
    try:
        if path.suffix == PREVIEW:
            content = path.read_bytes()
            return content == _sealed(path.name, content[8 : -len(SEAL_CHUNK) - 64])
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(path, formats=["PNG"]) as image:
                is_ours = CHUNK in image.info and image.info[CHUNK] == _checksum(path.name, image)
        return is_ours and _chunks(path.read_bytes()) == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def _chunks(content: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks in their order, repeated IDATs once, and whatever comes after the last."""
    kinds: list[bytes] = []
    place = 8
    while place < len(content) and kinds[-1:] != [b"IEND"]:
        size, kind = struct.unpack_from(">I4s", content, place)
        kinds += [] if kind == b"IDAT" and kinds[-1:] == [kind] else [kind]
        place += 12 + size
    return kinds + ([content[place:]] if place < len(content) else [])


def _checksum(name: str, image: Image.Image) -> str:
    return hashlib.sha256(f"{name} {image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def check_picture(path: Path) -> None:
    """Raise `JobError` unless a picture can be written to `path` without a loss."""
    with told(path):
        if path.exists() and not (path.is_file() and is_our_picture(path)):
            raise JobError(f"{path} is there already and was not drawn by `sample`: move it away, or choose another output")
    check_place(path)
    if path.parent.is_dir():
        sweep(path.parent)


def check_comparison_output(folder: Path, overwrite: bool) -> None:
    """Raise `JobError` unless a comparison can be written to `folder`; with `overwrite` only one of ours is replaced."""
    check_free(folder, overwrite, REPORT)
    check_place(folder)


def comparison_files(folder: Path) -> set[str] | None:
    """The names of the files of a comparison that are as we wrote them; None if the folder is no comparison of ours."""
    files = recorded(folder)
    return None if files is None or REPORT not in files else intact(folder, files)


def is_of_comparison(path: Path) -> bool:
    """Whether a file is as `compare` wrote it. Earlier versions kept no record: there, pictures tell of themselves."""
    if (files := comparison_files(path.parent)) is not None:
        return path.name in files
    is_file = is_own_file(path.parent, path.name) and not has_record(path.parent)
    return is_file and (path.name == REPORT or is_our_picture(path))


def write_comparison(
    folder: Path | str,
    report: Comparison,
    pairs: Sequence[SamplePair],
    names: Mapping[int, str],
    layers: Mapping[str, float] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write all files of a comparison, or none.

    Args:
        names: of the classes.
        layers: what each layer adds to the error.

    Raises:
        JobError: if something would be lost (see `check_comparison_output`), or the disk is full.
    """
    with whole_folder(Path(folder).expanduser(), overwrite, REPORT) as partial:
        for stem, pair in zip(_stems(pairs, names), pairs, strict=True):
            for kind in KINDS:
                write_picture(partial / f"{stem}-{kind}.png", as_image(getattr(pair, kind)))
        rows = [getattr(pair, kind) for kind in KINDS for pair in pairs]
        if rows[0].ndim == 4:
            write_preview(partial / f"pairs{PREVIEW}", rows, columns=len(pairs))
            strips = [getattr(pair, kind) for pair in pairs for kind in KINDS]
            write_picture(partial / "pairs.png", grid(strips, columns=1))
        else:
            write_picture(partial / "pairs.png", grid(rows, columns=len(pairs)))
        if layers:
            write_atomically(partial / "layers.json", (json.dumps(layers, indent=1) + "\n").encode())
        write_atomically(partial / REPORT, (json.dumps(asdict(report), indent=1) + "\n").encode())


def _stems(pairs: Sequence[SamplePair], names: Mapping[int, str]) -> list[str]:
    """What the files of each pair begin with: another one for every pair, on every file system."""
    stems: list[str] = []
    for index, pair in enumerate(pairs):
        stem = f"{_named(pair.condition, names)}-seed{pair.seed}"
        is_taken = stem.casefold() in {other.casefold() for other in stems}
        stems.append(f"{stem}-{index}" if is_taken else stem)
    return stems


def _named(condition: Condition, names: Mapping[int, str]) -> str:
    if isinstance(condition, str):
        return file_stem(condition, "prompt")
    return file_stem(names.get(condition, ""), str(condition))


def file_stem(name: str, otherwise: str) -> str:
    """The words of a class or a prompt in a file's name, on every file system."""
    words = re.sub(r"[^\w.,()']+", "-", name).strip("-. ")
    return words.encode()[:NAME_BYTES].decode(errors="ignore") or otherwise
