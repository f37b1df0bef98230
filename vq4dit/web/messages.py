"""Failures in words: what happened, why, what to do next; details folded away.

The library's messages follow one form, "what was found: what to do", so they split at their last colon.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from vq4dit.errors import CalibrationDivergedError, FormatError, HubError, JobError, UnsupportedModelError, VQ4DiTError
from vq4dit.printable import printable
from vq4dit.projects.messages import on_page
from vq4dit.projects.worker import failure

HEADLINES: list[tuple[type[Exception], str]] = [
    (UnsupportedModelError, "This model cannot be quantized"),
    (FormatError, "This file cannot be read"),
    (CalibrationDivergedError, "The calibration diverged"),
    (JobError, "The work cannot go on"),
    (HubError, "The Hub did not play along"),
    (VQ4DiTError, "This cannot be done"),
    (ValueError, "One of the settings does not fit"),
]
OF_THE_HUB = {
    "login": "You are not signed in",
    "exists": "This repository exists already",
    "cancelled": "The push was cancelled",
    "organization": "You may not publish there",
    "scope": "Your login may not do that",
    "storage": "The storage is full",
    "rate": "The Hub asks to wait",
    "network": "The Hub cannot be reached",
    "offline": "The Hub cannot be reached",
    "gated": "This model is gated",
    "missing": "It is not there, or it is private",
    "name": "This name cannot be used",
}
DEFAULT_NEXT = "Change the choice above and try again."


@dataclass(frozen=True)
class Trouble:
    """What a visitor reads instead of a traceback."""

    what: str
    why: str
    next_step: str
    details: str = ""


def explain(error: Exception) -> Trouble:
    """An exception as trouble in words."""
    status = failure(error)
    headline = next((words for kind, words in HEADLINES if isinstance(error, kind)), "This did not work")
    if isinstance(error, HubError):  # "task: reason. Advice"
        why, _, advice = on_page(error).partition(". ")
        if not advice and error.reason in ("login", "exists", "organization", "missing", "card"):  # "reason: advice"
            return in_words(OF_THE_HUB.get(error.reason, headline), why)
        return Trouble(OF_THE_HUB.get(error.reason, headline), _sentence(why), _sentence(advice) or DEFAULT_NEXT)
    return in_words(headline, status.message, status.next_step, status.details)


def in_words(headline: str, message: str, next_step: str = "", details: str = "") -> Trouble:
    """Split a message of the library into its reason and its advice."""
    if "the disk is full" in message:
        next_step = "Free some space, then press Resume: finished pieces are kept."
    why, colon, advice = message.rpartition(": ")
    if next_step or not colon or not advice[:1].isalpha():
        why, advice = message, next_step or DEFAULT_NEXT
    return Trouble(headline, _sentence(why), _sentence(advice), details)


def escape(text: str) -> str:
    """Text that others wrote as HTML: shown, never obeyed."""
    return html.escape(printable(text))


def _sentence(text: str) -> str:
    """Begin with a capital, unless the first word is a name, and end with a full stop."""
    text = text.strip()
    if text.split(" ")[0].isalpha():
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def duration(seconds: int | float) -> str:
    """'40 s', '3 min', '2 h 10 min'."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clock(seconds: int | float) -> str:
    """'0:07', '2:05', '1:02:05': a time that is seen to run."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def size(num_bytes: int | float) -> str:
    """'3.6 MB', '1.35 GB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
