"""JSON that somebody else may have written: one object, read whole, or refused in a sentence that names the file.

What can be wrong with a file is more than its syntax. It may be a pipe that never ends, a list where an object belongs, or
nested so deep that whoever walks through it dies of it. Here all of that becomes a `FormatError`.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vq4dit.errors import FormatError

LARGEST_BYTES = 20_000_000  # an index of a hundred thousand tensors is smaller
DEEPEST = 50
AGAIN = "download the model again"


def read_object(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        advice: what to do about a broken one, the end of the message.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        FormatError: if it is no readable file of a reasonable size, no JSON, or no object.
    """
    try:
        values = json.loads(_read(path, advice).decode())
    except RecursionError as error:
        raise FormatError(f"{path} is nested too deep to be a description of a model: {advice}") from error
    except ValueError as error:  # of the JSON, of the UTF-8, or of a number with thousands of digits
        raise FormatError(f"{path} is not valid JSON ({error}): {advice}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, {{...}}, found {shown(values)}: {advice}")
    if any(depth > DEEPEST for depth, _, _ in leaves(values)):
        raise FormatError(f"{path} is nested too deep to be a description of a model: {advice}")
    return values


def _read(path: Path, advice: str) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
            raise FormatError(f"{path} must be a JSON file, and is {kind}: {advice}")
        if found.st_size > LARGEST_BYTES:
            raise FormatError(
                f"{path} has {found.st_size} bytes, and descriptions of models have at most {LARGEST_BYTES}: {advice}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): check who may read it, or {advice}") from error


def leaves(values: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(depth, path such as "a.b.0", value) of everything in an object that is no object or list itself, without recursion."""
    waiting: list[tuple[int, str, Any]] = [(0, "", values)]
    while waiting:
        depth, name, value = waiting.pop()
        if not isinstance(value, dict | list):
            yield depth, name, value
            continue
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        if not items:
            yield depth, name, None
        waiting.extend((depth + 1, f"{name}.{key}" if name else str(key), item) for key, item in reversed(items))


def shown(value: Any) -> str:
    """A value of a stranger's file for a message: short, on one line."""
    return reprlib.repr(value)
