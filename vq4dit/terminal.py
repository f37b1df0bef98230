"""The door to the terminal: all that commands say goes through it, whether it is a figure, a remark or what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NoReturn

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from vq4dit.printable import printable
from vq4dit.streams import standard_error

Report = Callable[[], None]  # what a command says on standard output when its work is done


class Console(rich.console.Console):
    """The only door to the terminal: what strangers wrote is shown and never obeyed, whichever way it came here."""

    def on_broken_pipe(self) -> NoReturn:
        """What it means that nobody reads is for the command to say (rich would end the process)."""
        raise

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Parser(argparse.ArgumentParser):
    """Names of files come as arguments too, and what is wrong with one is told with the name."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def errors() -> Console:
    """The way to standard error, which never fails."""
    return Console(file=standard_error())  # type: ignore[arg-type]
