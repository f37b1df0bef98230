"""Pictures and comparisons as files.

Every picture says in a text chunk of its PNG that we drew it, with a checksum of its pixels and its name. So a picture of
ours may be replaced by a new one, and what somebody else drew, changed or gave another name may not. A comparison is a folder
that is written whole:

    report.json                  all figures
    layers.json                  what each layer adds to the error, if that was asked for
    pairs.png                    original, quantized and difference, row by row
    NAME-seedN-original.png      and -quantized.png, -difference.png: one pair
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, PngImagePlugin

from vq4dit.errors import FormatError, JobError
from vq4dit.evaluation import Comparison, SamplePair, as_image, grid
from vq4dit.files import check_free, check_place, told, whole_folder, write_atomically
from vq4dit.json_files import read_object

KINDS = ("original", "quantized", "difference")
CHUNK = "vq4dit"  # of our pictures: their checksum
PICTURE = re.compile(rf".+-seed-?\d+-({'|'.join(KINDS)})\.png|pairs\.png")  # of a comparison
NAME_BYTES = 100  # of a class in a file's name


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    content, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, _checksum(path.name, image))
    image.save(content, "PNG", pnginfo=chunks)
    write_atomically(path, content.getvalue())


def is_our_picture(path: Path) -> bool:
    """Whether we drew this picture, and nobody changed it or its name since."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(path, formats=["PNG"]) as image:
                return CHUNK in image.info and image.info[CHUNK] == _checksum(path.name, image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def _checksum(name: str, image: Image.Image) -> str:
    return hashlib.sha256(f"{name} {image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def check_picture(path: Path) -> None:
    """Raise `JobError` unless a picture can be written to `path` without a loss."""
    with told(path):
        if path.exists() and not (path.is_file() and is_our_picture(path)):
            raise JobError(f"{path} is there already and was not drawn by `sample`: move it away, or choose another output")
    check_place(path)


def check_comparison_output(folder: Path, overwrite: bool) -> None:
    """Raise `JobError` unless a comparison can be written to `folder`; with `overwrite` only one of ours is replaced."""
    check_free(folder, overwrite, comparison_files)
    check_place(folder)


def comparison_files(folder: Path) -> set[str] | None:
    """The names of the files of a comparison that we wrote; None if the folder is no comparison of ours."""
    try:
        Comparison(**read_object(folder / "report.json"))
    except (OSError, FormatError, TypeError):
        return None
    found = (path for path in folder.glob("*.png") if PICTURE.fullmatch(path.name) and path.is_file())
    pictures = {path.name for path in found if is_our_picture(path)}
    return {"report.json", *pictures} | ({"layers.json"} if _is_table(folder / "layers.json") else set())


def _is_table(path: Path) -> bool:
    """Whether a file holds numbers by the names of layers."""
    try:
        values = read_object(path)
    except (OSError, FormatError):
        return False
    return all(isinstance(value, float | int) for value in values.values())


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
    with whole_folder(Path(folder).expanduser(), overwrite, comparison_files) as partial:
        for pair in pairs:
            stem = f"{file_stem(names.get(pair.label, ''), pair.label)}-seed{pair.seed}"
            for kind in KINDS:
                write_picture(partial / f"{stem}-{kind}.png", as_image(getattr(pair, kind)))
        rows = [getattr(pair, kind) for kind in KINDS for pair in pairs]
        write_picture(partial / "pairs.png", grid(rows, columns=len(pairs)))
        if layers:
            write_atomically(partial / "layers.json", (json.dumps(layers, indent=1) + "\n").encode())
        write_atomically(partial / "report.json", (json.dumps(asdict(report), indent=1) + "\n").encode())


def file_stem(name: str, label: int) -> str:
    """A class in a file's name, on every file system: its words, or its number if it has none."""
    words = re.sub(r"[^\w.,()']+", "-", name).strip("-. ")
    return words.encode()[:NAME_BYTES].decode(errors="ignore") or str(label)
