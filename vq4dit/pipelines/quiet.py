"""What diffusers says while it loads a model, and what of it is held back: we tell our progress ourselves.

Its bars go. Of its remarks one goes: JSON knows no numbers as keys, so every class-conditional pipeline comes with labels of
another type than its class declares, and diffusers remarks upon it each time. All other remarks stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging

REMARK = "Expected types for id2label:"
SPEAKER = logging.getLogger("diffusers.pipelines.pipeline_utils")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars, and no remark about the type of labels, while diffusers loads a pipeline in this block."""
    had_bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    SPEAKER.addFilter(_is_another)
    try:
        yield
    finally:
        SPEAKER.removeFilter(_is_another)
        if had_bars:
            diffusers_logging.enable_progress_bar()


def _is_another(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(REMARK)
