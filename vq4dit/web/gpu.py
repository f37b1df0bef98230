"""ZeroGPU: a GPU that is lent for at most a minute at a time, by a scheduler that may say no.

Each time slice of the work is one event of the page, because the visitor's permission to use the GPU travels with the event and
is good for a few minutes only. What the scheduler says no with is an error of Gradio; here it becomes a paused project that
says how long to wait and what else can be done. Elsewhere `on_gpu` changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from vq4dit.projects.project import Status

LEASE_SECONDS = 60  # the longest lease we ask for
WORK_SECONDS = 40.0  # of them spent on work; the rest is for loading and saving
LOCAL_SLICE_SECONDS = (
    180.0  # without ZeroGPU: after which others that wait come; each one of `best` repeats its trajectories, about 30 s
)

EXPIRED = "Your permission to use the GPU ran out between two time slices."


def is_zero_gpu() -> bool:
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def slice_seconds() -> float:
    """How long a time slice is, for tests from the environment."""
    return float(os.environ.get("VQ4DIT_SLICE_SECONDS", WORK_SECONDS if is_zero_gpu() else LOCAL_SLICE_SECONDS))


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a generator run on a lent GPU, if there is one to lend."""
    if not is_zero_gpu():
        return function
    import spaces  # app.py imported it first of all, as it must be

    from vq4dit.kernels import beam_search, lanes  # noqa: F401  now: each lease is a fork of this process, and numba takes a second

    return spaces.GPU(duration=LEASE_SECONDS)(function)


def refused(error: Exception, before: Status) -> Status:
    """What a project says after the scheduler or the GPU's worker let go of it. Nothing finished is lost."""
    text = f"{getattr(error, 'title', '')}: {error}"
    seconds = before.seconds
    if "Expired ZeroGPU proxy token" in text:
        if before.message == EXPIRED:
            return Status("paused", EXPIRED, "Reload this page and press Resume.", text, seconds)
        return Status("waiting", EXPIRED, "", text, seconds)  # the next event brings a new permission
    if "quota" in text or "GPU limit" in text or "runs limit" in text:
        wait = waiting_seconds(text)
        when = f"Resume in {_clock(wait)}" if wait else "Resume tomorrow"
        choices = (
            f"{when}, or sign in to Hugging Face for a larger share, or copy the command above and use a machine of your own."
        )
        return Status(
            "paused", "Your share of GPU time for today is used up. Finished layers are kept.", choices, text, seconds, wait
        )
    if "No GPU was available" in text or "queue timeout" in text:
        return Status(
            "paused", "No GPU was free just now. Finished layers are kept.", "Press Resume in a minute.", text, seconds, 60.0
        )
    if "GPU task aborted" in text:
        return Status(
            "paused",
            "The GPU was taken away in the middle of its work. Finished layers are kept.",
            "Press Resume: at most the layer it was working on is done again.",
            text,
            seconds,
        )
    return Status("paused", "The GPU's worker failed. Finished layers are kept.", "Press Resume.", text, seconds)


def waiting_seconds(text: str) -> float:
    """The seconds in "Try again in 3:25:00"; 0 if it does not say."""
    match = re.search(r"Try again in (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)", text)
    if not match:
        return 0.0
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _clock(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
