"""What diffusers and transformers say beside us, and what of it is held back: we tell our progress ourselves.

While a model is loaded their bars go. Of diffusers' remarks one goes: JSON knows no numbers as keys, so every class-conditional
pipeline comes with labels of another type than its class declares, and diffusers remarks upon it each time. All others stay.

While a model draws for us, prompts are ours, and for some models too long. What is cut off there is nobody's loss, and would be
told once for every trajectory: all remarks go, errors stay.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging

REMARK = "Expected types for id2label:"
SPEAKER = logging.getLogger("diffusers.pipelines.pipeline_utils")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars, and no remark about the type of labels, while diffusers loads a pipeline in this block."""
    libraries = [diffusers_logging, *_transformers_logging()]
    had_bars = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    SPEAKER.addFilter(_is_another)
    try:
        yield
    finally:
        SPEAKER.removeFilter(_is_another)
        for library in had_bars:
            library.enable_progress_bar()


@contextmanager
def without_remarks() -> Iterator[None]:
    """Diffusers and transformers tell errors only, in this block."""
    before = [(library, library.get_verbosity()) for library in [diffusers_logging, *_transformers_logging()]]
    for library, verbosity in before:
        library.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


def _transformers_logging() -> list[Any]:
    """That of transformers, which loads text encoders, where diffusers has imported it."""
    found = sys.modules.get("transformers.utils.logging")
    return [found] if found else []


def _is_another(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(REMARK)
