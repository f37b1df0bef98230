"""Ctrl-C: the first is an exception, which whoever works may answer; the next ends the process, at once and without a word.

What is finished is on disk at any moment, so nothing is lost by that. While the slow imports run, and while the interpreter
shuts down, nobody works: there the first one ends it too. A command that is started deaf to Ctrl-C, as shells start what
runs in the background, stays deaf.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

CODE = 130  # of a process that Ctrl-C ended, as shells count


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process."""
    _listen(_leave)


def raise_once() -> None:
    """From now on the first Ctrl-C raises `KeyboardInterrupt`, the next ends the process."""
    _listen(_raise)


def was_pressed() -> bool:
    """Whether there was a first one since `raise_once`."""
    return signal.getsignal(signal.SIGINT) is _leave


def leave() -> NoReturn:
    """End the process as one that Ctrl-C ended, without the long way out: on that a late Ctrl-C would find nobody to answer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    os._exit(CODE)


def _listen(handler: object) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    leave_at_once()
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # bars hide the cursor
    os._exit(CODE)
