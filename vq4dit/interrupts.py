"""Ctrl-C: the first is an exception, which whoever works may answer; the next ends the process, at once and without a word.

What is finished is on disk at any moment, so nothing is lost by that. While the slow imports run, and while the interpreter
shuts down, nobody works: there the first one ends it too. A command that is started deaf to Ctrl-C, as shells start what
runs in the background, stays deaf. A command may answer the end of its terminal or of the machine (SIGHUP, SIGTERM) in the same
way: else half-written files would stay behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

CODE = 130  # of a process that Ctrl-C ended, as shells count
ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has no SIGHUP


class Ended(KeyboardInterrupt):
    """The process is asked to end, and not by Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process."""
    _listen(signal.SIGINT, _leave)


def raise_once() -> None:
    """From now on the first Ctrl-C raises `KeyboardInterrupt`, the next ends the process."""
    _listen(signal.SIGINT, _raise)


def raise_at_the_end() -> None:
    """From now on the first request to end raises `Ended`, the next, of any kind, ends the process."""
    for number in ENDINGS:
        _listen(number, _raise_ended)


def code_of(error: KeyboardInterrupt) -> int:
    """The exit code of a process that this ended."""
    return error.code if isinstance(error, Ended) else CODE


def was_pressed() -> bool:
    """Whether there was a first one since `raise_once`."""
    return signal.getsignal(signal.SIGINT) is _leave


def leave(code: int = CODE) -> NoReturn:
    """End the process as one that Ctrl-C ended, without the long way out: on that a late Ctrl-C would find nobody to answer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    os._exit(code)


def _listen(number: int, handler: object) -> None:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)  # type: ignore[arg-type]


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    leave_at_once()
    raise KeyboardInterrupt


def _raise_ended(number: int, frame: FrameType | None) -> NoReturn:
    leave_at_once()
    for ending in ENDINGS:
        _listen(ending, _leave)
    raise Ended(number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    if os.isatty(2):
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\x1b[?25h\n")  # bars hide the cursor
    os._exit(128 + number)
