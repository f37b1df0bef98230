"""The library needs few packages; its doors (terminal, page) need more: the extras `vq4dit[cli]` and `vq4dit[app]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution


@contextmanager
def of_extra(extra: str, door: str) -> Iterator[None]:
    """Around a door's imports: where a package is missing the program ends with one sentence that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "vq4dit"):  # then it is our mistake
            raise
        sys.exit(f"{door} needs {package}, which is not installed: {_command(extra)} installs all that it needs")


def _command(extra: str) -> str:
    try:
        distribution("vq4dit")
    except PackageNotFoundError:  # run from a checkout
        return "pip install -r requirements.txt"
    return f'pip install "vq4dit[{extra}]"'
