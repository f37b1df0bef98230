"""The door to the terminal: all that commands say goes through it, whether it is a figure, a remark or what is wrong."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from vq4dit.cli.streams import standard_error
from vq4dit.errors import LeftBehind
from vq4dit.printable import printable

Report = Callable[[], None]  # what a command says on standard output when its work is done


class Console(rich.console.Console):
    """The only door to the terminal: what strangers wrote is shown and never obeyed, whichever way it came here."""

    def on_broken_pipe(self) -> NoReturn:
        """What it means that nobody reads is for the command to say (rich would end the process)."""
        raise

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


@contextmanager
def notes(console: Console) -> Iterator[None]:
    """Show what a command could not tidy away, whichever warnings are shown otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", LeftBehind)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, LeftBehind):
                console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
            else:
                shown(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


class Parser(argparse.ArgumentParser):
    """Names of files come as arguments too, and what is wrong with one is told with the name."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def errors() -> Console:
    """The way to standard error, which never fails."""
    return Console(file=standard_error())  # type: ignore[arg-type]
