"""Standard input, output and error, whatever became of them: closed, full, left by their readers, or of few letters.

What a command is asked for is a file, a folder or a repository, and what it says meanwhile is not worth losing that. So a
closed stream leads nowhere, a letter that a terminal does not have is shown by its code, and what standard error does not take
is lost.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare() -> None:
    """Make the standard streams of this process usable, before files are opened that could take a closed one's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free one: its own
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
        elif mode == "w":
            getattr(sys, name).reconfigure(errors="backslashreplace")


def hand_over() -> None:
    """Give standard output what was written to it.

    Raises:
        OSError: if it does not take it; then it leads nowhere from now on, so that the process can end without a word of that.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # of no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class Patient(io.TextIOBase):
    """A stream to which everything can be written; what it does not take is lost."""

    def __init__(self, stream: Any):  # None where there is none
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            with suppress(OSError, ValueError):  # ValueError: it is closed
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False


def standard_error() -> Patient:
    """Standard error as it is now."""
    return Patient(sys.stderr)
