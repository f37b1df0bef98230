"""Words of others inside Markdown: they read as they were written, and make no heading, link, table, HTML or code."""

import re

from vq4dit.printable import printable

LONGEST = 200  # characters; a licence's name, a pattern, a setting
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What begins something in Markdown. An underscore between letters does not, and names have many.
MARKS = re.compile(r"[\\`*{}\[\]#|~!$]|(?<!\w)_|_(?!\w)|(?<=https:)/|(?<=http:)/|(?<=\])\(|@(?=\w)")


def plain(value: object) -> str:
    """A value as one line of text."""
    line = " ".join(printable(str(value)).split())[:LONGEST]
    safe = MARKS.sub(lambda mark: f"\\{mark[0]}", line)
    return "".join(ENTITIES.get(character, character) for character in safe)
