"""Messages for a page: it has no command line to give options to, and its reader no folders on this machine.

A message whose advice is of the terminal brings its own words for the page (`VQ4DiTError.page`). Whatever else is still about
options or paths is taken out here, at the only way to the page.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from vq4dit.errors import VQ4DiTError

OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
ASIDE = re.compile(r" ?\([^()]*(?<![\w-])--[a-z][^()]*\)")  # "(--resume)"
CLAUSE = re.compile(r"(?:^|[:;,]|\.(?= ))(?:(?!\. )[^:;,])*?(?<![\w-])--[a-z][^:;,.]*")  # ": run it again with --resume"
NAME = r"[^\s'\"`:,;()<>/\\]+"
PATH = re.compile(rf"(?:file://|(?<![\w.:/~]))/(?:{NAME}/)*({NAME})/?")
WINDOWS_PATH = re.compile(rf"\b[A-Za-z]:[\\/](?:{NAME}[\\/])*({NAME})")


def on_page(error: BaseException) -> str:
    """What a page says of an exception."""
    text = error.page if isinstance(error, VQ4DiTError) else str(error)
    return without_paths(without_options(text))


def without_options(text: str) -> str:
    """The text without what speaks of options of a command."""
    text = ASIDE.sub("", text)
    return CLAUSE.sub("", text).strip() if OPTION.search(text) else text


def without_paths(text: str) -> str:
    """The text with every path of this machine shortened to the name at its end. Addresses of the web stay."""
    for folder in (os.environ.get("VQ4DIT_WORKSPACE"), os.getcwd(), str(Path.home()), tempfile.gettempdir()):
        if folder and " " in folder:  # where a path with spaces ends can only be seen of one that is known
            text = text.replace(folder, "")
    return WINDOWS_PATH.sub(r"\1", PATH.sub(r"\1", text))
